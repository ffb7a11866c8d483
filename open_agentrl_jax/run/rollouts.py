"""Batches and evaluations, played by the first process and shared with all others."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence

from open_agentrl_jax.data.loader import Mixture, task_stream
from open_agentrl_jax.parallel import processes
from open_agentrl_jax.rollout.scheduler import Frontier, Scheduler
from open_agentrl_jax.run.engines import Generation
from open_agentrl_jax.run.opened import OpenRun
from open_agentrl_jax.run.players import Player, play_through
from open_agentrl_jax.telemetry.metrics import rollout_metrics
from open_agentrl_jax.train.checkpoint import Progress
from open_agentrl_jax.train.progress import Interrupted
from open_agentrl_jax.types import Group, NothingToLearn, Sampling, Task, UserError

logger = logging.getLogger(__name__)
_shown: set[str] = set()  # tracebacks that were logged


@dataclasses.dataclass
class SharedRollouts:
    """Gives every process the batches that the first one collects."""

    scheduler: Scheduler | None  # None in the other processes
    most_errors: float = 1.0  # share of episodes that user code may end, see `refuse_failing_code`

    def next_batch(self, check: Callable[[], None]) -> list[Group]:
        """See Scheduler.next_batch."""
        groups, ended = None, ""
        if self.scheduler is not None:
            try:
                groups = self.scheduler.next_batch(check)
            except NothingToLearn as end:
                ended = str(end)
            except Interrupted:
                pass
        groups, ended = processes.share((groups, ended))
        if ended:
            raise NothingToLearn(ended)
        if groups is None:
            raise Interrupted
        refuse_failing_code(groups, self.most_errors)
        return groups

    def trained(self, groups: Sequence[Group]) -> Frontier:
        """See Scheduler.trained."""
        return processes.share(self.scheduler.trained(groups) if self.scheduler else Frontier())

    def published(self, version: int) -> None:
        """See Scheduler.published."""
        if self.scheduler is not None:
            self.scheduler.published(version)

    def metrics(self) -> dict[str, float]:
        """See Scheduler.metrics."""
        return self.scheduler.metrics() if self.scheduler is not None else {}

    def close(self) -> None:
        """See Scheduler.close."""
        if self.scheduler is not None:
            self.scheduler.close()


def open_scheduler(
    run: OpenRun, generation: Generation, tasks: Mixture[Task], steps: int, progress: Progress
) -> Scheduler:
    """Starts playing the problems, from `progress` on."""
    config, rl = run.config, run.config.rl
    sampling = Sampling(0, config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)
    return Scheduler(
        run.loop,
        Player(config, generation.engine, run.chat, run.world, sampling, "rl"),
        task_stream(tasks.sources, config.seed, weights=tasks.weights),
        prompts=rl.prompts,
        samples=rl.samples,
        concurrency=generation.concurrency,
        batches=steps,
        max_staleness=rl.max_staleness,
        filter_groups=rl.filter_groups,
        frontier=Frontier(progress.next, list(progress.pending)),
        version=progress.step,
    )


def evaluator(run: OpenRun, generation: Generation, held_out: Sequence[Task]) -> Callable[[int], float | None]:
    """A function that plays the held-out problems after a step, writes the results and returns the accuracy.

    The accuracy is None if no episode was graded.
    """
    config = run.config
    sampling = Sampling(0, config.eval.temperature, config.eval.top_p)
    player = Player(config, generation.evaluation, run.chat, run.world, sampling, "eval")

    def evaluate(step: int) -> float | None:
        groups = None
        if processes.first():
            with contextlib.suppress(Interrupted):
                groups = play_through(
                    player,
                    held_out,
                    config.eval.samples,
                    generation.concurrency,
                    run.loop,
                    lambda done, total: run.screen.bar(f"eval at {step}", done, total),
                    run.stopper.check,
                )
        if (groups := processes.share(groups)) is None:
            raise Interrupted
        numbers = rollout_metrics(groups)
        run.writer.metrics(step, "eval", numbers)
        run.writer.trajectories(step, "eval", groups)
        refuse_failing_code(groups, config.agent.max_errors)
        if "accuracy/mean" not in numbers:
            logger.warning("evaluation at step %d: none of %d episodes was graded", step, numbers["episodes"])
        return numbers.get("accuracy/mean")

    return evaluate


def refuse_failing_code(groups: Sequence[Group], most: float) -> None:
    """Ends the run if user code (a tool, grader or environment) is what usually ends an episode.

    Raises:
        UserError: more than the share `most` of the episodes ended with an exception of user code.
    """
    episodes = [t for group in groups for t in group.trajectories]
    failed = [t for t in episodes if t.faulted]
    for text in {t.error for t in failed} - _shown:
        _shown.add(text)
        logger.warning("an exception of a tool, grader or environment ended an episode:\n%s", text)
    if len(failed) > most * len(episodes):
        raise UserError(
            f"{len(failed)} of {len(episodes)} episodes ended with an exception of a tool, grader or environment, "
            f"more than agent.max_errors={most:g}; see the traceback above"
        )
