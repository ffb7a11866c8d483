"""Batches and evaluations: every process plays its share of them, and all agree on how they end."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np

from open_agentrl_jax.data.loader import Mixture, task_stream
from open_agentrl_jax.parallel import agreement, processes
from open_agentrl_jax.rollout.scheduler import Frontier, Scheduler, Share, joined
from open_agentrl_jax.run.engines import Generation
from open_agentrl_jax.run.opened import OpenRun
from open_agentrl_jax.run.players import play_through, player_of
from open_agentrl_jax.telemetry.metrics import episode_table, rollout_metrics
from open_agentrl_jax.train.checkpoint import Progress
from open_agentrl_jax.train.progress import Interrupted
from open_agentrl_jax.types import Group, NothingToLearn, Sampling, Task, UserError

T = TypeVar("T")
POLL_SECONDS = 2.0  # between two looks at whether another process has stopped

logger = logging.getLogger(__name__)
_shown: set[str] = set()  # tracebacks that were logged


@dataclasses.dataclass
class SharedRollouts:
    """The rollouts of all processes: each collects its share of every batch."""

    scheduler: Scheduler
    prompts: int  # per batch, over all processes
    most_errors: float = 1.0  # share of episodes that user code may end, see `refuse_failing_code`

    def next_batch(self, check: Callable[[], None]) -> list[Group]:
        """This process's share of the next batch; see Scheduler.next_batch.

        Raises:
            NothingToLearn, Interrupted, UserError: in all processes, if one of them raises it.
        """
        groups = played_by_all(self.scheduler.next_batch, check, "batch")
        refuse_failing_code(groups, self.most_errors)
        return groups

    def trained(self, groups: Sequence[Group]) -> Frontier:
        """Marks groups as trained and returns the frontier of the run, over all processes."""
        mine = self.scheduler.trained(groups)
        everyone = processes.all_values(dataclasses.asdict(mine))
        return joined([Frontier(**frontier) for frontier in everyone], self.prompts)

    def published(self, version: int) -> None:
        """See Scheduler.published."""
        self.scheduler.published(version)

    def metrics(self) -> dict[str, float]:
        """See Scheduler.metrics; this process's own."""
        return self.scheduler.metrics()

    def close(self) -> None:
        """See Scheduler.close."""
        self.scheduler.close()


def played_by_all(play: Callable[[Callable[[], None]], T], check: Callable[[], None], name: str) -> T:
    """Calls `play` in every process; where it fails in one, it ends in all of them.

    Args:
        play: takes a function that it calls twice per second, and that may raise to stop it.
        check: raises Interrupted if this process is to stop.
        name: of what is played.

    Raises:
        Interrupted: a process is to stop.
        NothingToLearn: raised by `play` in a process.
        UserError: raised by `play` in a process, which the message names.
    """
    looked = time.monotonic()

    def check_all() -> None:
        nonlocal looked
        check()
        if time.monotonic() > looked + POLL_SECONDS:
            looked = time.monotonic()
            if agreement.flag_raised(name):
                raise Interrupted

    result, kind, text = None, "", ""
    try:
        result = play(check_all)
    except Interrupted:
        kind = "interrupted"
    except NothingToLearn as end:
        kind, text = "nothing", str(end)
    except UserError as error:
        kind, text = "failed", str(error)
    if kind:
        agreement.raise_flag(name)
    ends = processes.all_values((kind, text))
    if any(kind == "failed" for kind, _ in ends):
        processes.raise_failures(text if kind == "failed" else "")
    for kind, text in ends:
        if kind == "nothing":
            raise NothingToLearn(text)
    if any(kind for kind, _ in ends):
        raise Interrupted
    return result  # type: ignore[return-value]


def own_share(prompts: int) -> Share:
    """The places of a batch that this process plays."""
    return Share(prompts, jax.process_index(), jax.process_count())


def open_scheduler(
    run: OpenRun, generation: Generation, tasks: Mixture[Task], steps: int, progress: Progress
) -> Scheduler:
    """Starts playing this process's problems, from `progress` on."""
    config, rl = run.config, run.config.rl
    sampling = Sampling(0, config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)
    return Scheduler(
        run.loop,
        player_of(config, generation.engine, run.chat, run.world, sampling, "rl"),
        task_stream(tasks.sources, config.seed, weights=tasks.weights),
        prompts=rl.prompts,
        samples=rl.samples,
        concurrency=generation.concurrency,
        batches=steps,
        max_staleness=rl.max_staleness,
        filter_groups=rl.filter_groups,
        share=own_share(rl.prompts),
        frontier=Frontier(progress.next, list(progress.pending)),
        version=progress.step,
    )


def evaluator(run: OpenRun, generation: Generation, held_out: Sequence[Task]) -> Callable[[int], float | None]:
    """Returns a function that plays the held-out problems after a step, writes the results and returns the accuracy.

    Each process plays its share of the problems. The accuracy is None if no episode was graded.
    """
    config = run.config
    sampling = Sampling(0, config.eval.temperature, config.eval.top_p)
    player = player_of(config, generation.evaluation, run.chat, run.world, sampling, "eval")
    mine = dict(list(enumerate(held_out))[jax.process_index() :: jax.process_count()])

    def evaluate(step: int) -> float | None:
        def play(check: Callable[[], None]) -> list[Group]:
            return play_through(
                player,
                mine,
                config.eval.samples,
                generation.concurrency,
                run.loop,
                lambda done, total: run.screen.bar(f"eval at {step}", done, total),
                check,
            )

        groups = played_by_all(play, run.stopper.check, f"evaluation {step}")
        episodes = processes.gather(episode_table(groups))
        numbers = rollout_metrics(episodes)
        run.writer.metrics(step, "eval", numbers)
        run.writer.trajectories(step, "eval", groups)
        refuse_failing_code(groups, config.agent.max_errors)
        if "accuracy/mean" not in numbers:
            logger.warning("evaluation at step %d: none of %d episodes was graded", step, numbers["episodes"])
        return numbers.get("accuracy/mean")

    return evaluate


def refuse_failing_code(groups: Sequence[Group], most: float) -> None:
    """Ends the run if user code (a tool, grader or environment) is what usually ends an episode.

    Args:
        groups: played by this process; the share is that of all processes.
        most: the largest share of episodes that may end with an exception of user code.

    Raises:
        UserError: more episodes did.
    """
    episodes = [t for group in groups for t in group.trajectories]
    errors = [t.error for t in episodes if t.faulted]
    for text in set(errors) - _shown:
        _shown.add(text)
        logger.warning("an exception of a tool, grader or environment ended an episode:\n%s", text)
    failed, total = np.sum(processes.all_values((len(errors), len(episodes))), axis=0)
    if failed > most * total:
        raise UserError(
            f"{failed} of {total} episodes ended with an exception of a tool, grader or environment, "
            f"more than agent.max_errors={most:g}; see the traceback above"
        )
