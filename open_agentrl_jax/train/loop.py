"""The RL loop: rollouts -> advantages -> packed mini-batches -> updates -> publish. It knows no algorithm, engine or
environment.

One step: (1) wait for a batch of groups; (2) pack it; (3) compute log-probs where the trainer has to; (4) update once
per mini-batch; (5) publish the weights; (6) evaluate if due; (7) let the scheduler start the next episodes; (8) write
the step's metrics and trajectories meanwhile; (9) checkpoint, whose frontier contains trained groups only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from open_agentrl_jax.parallel import processes
from open_agentrl_jax.telemetry.metrics import episode_table, rollout_metrics, wall_metrics
from open_agentrl_jax.train.checkpoint import Progress
from open_agentrl_jax.train.learner import Learner
from open_agentrl_jax.train.progress import Clock, Interrupted, Publish, Run
from open_agentrl_jax.train.state import TrainState
from open_agentrl_jax.types import Group, NothingToLearn, UserError

logger = logging.getLogger(__name__)
IDLE_STEPS = 3  # steps in a row without a trained token that end the run


class Rollouts(Protocol):
    """The source of batches; see rollout.scheduler."""

    def next_batch(self, check: Callable[[], None]) -> list[Group]:
        """Waits for a batch; `check` may raise to stop waiting. Raises NothingToLearn."""
        ...

    def trained(self, groups: Sequence[Group]) -> Any:
        """Marks groups as trained; returns the frontier (`next`, `pending`)."""
        ...

    def published(self, version: int) -> None:
        """The engine now samples from `version`."""
        ...


@dataclasses.dataclass
class HeldOut:
    """Evaluates the policy inside the loop, at most once per step."""

    evaluate: Callable[[int], float | None] | None  # step -> accuracy, None if nothing was graded; None: no problems
    every: int  # steps; 0: never
    last: int  # step that is evaluated after the loop
    best: float
    evaluated: int  # last step that was evaluated

    def due(self, step: int) -> bool:
        """Whether the policy is to be evaluated after this step, and was not yet."""
        wanted = self.evaluate is not None and self.every and step % self.every == 0
        return bool(wanted) and step not in (self.evaluated, self.last)

    def __call__(self, step: int) -> float | None:
        """The accuracy after a step."""
        accuracy = self.evaluate(step) if self.evaluate is not None else None
        self.best, self.evaluated = max(self.best, -1.0 if accuracy is None else accuracy), step
        return accuracy


def train_rl(
    learner: Learner,
    rollouts: Rollouts,
    publish: Publish,
    held_out: HeldOut,
    run: Run,
    *,
    steps: int,
    start: Progress,
    engine_metrics: Callable[[], dict[str, float]],
) -> TrainState:
    """Trains from step `start.step` to `steps`.

    Args:
        learner: the policy and its optimizer.
        rollouts: batches of groups.
        publish: (params, version) -> None; when it returns, engines sample from these weights.
        held_out: the evaluation inside the loop.
        run: files, checkpoints, signals.
        steps: total steps of the phase.
        start: progress of a resumed run.
        engine_metrics: the engine's own counters, which depend on timing.

    Raises:
        UserError: several steps in a row trained no token.
        Interrupted: a signal came; the state is saved.
    """
    clock = Clock()

    def save(step: int, accuracy: float | None = None) -> None:
        frontier = rollouts.trained(())
        progress = Progress("rl", step, frontier.next, list(frontier.pending))
        progress.best, progress.evaluated = held_out.best, held_out.evaluated
        run.save(learner.state, progress, accuracy=accuracy)

    def evaluated_at(step: int) -> float | None:
        with clock("evaluate"):
            return held_out(step) if held_out.due(step) else None

    evaluated_at(start.step)  # the interrupted run may have stopped before this evaluation
    for step in range(start.step, steps):
        run.mark()
        with clock("rollout"):
            try:
                groups = rollouts.next_batch(run.stopper.check)
            except Interrupted:
                save(step)
                raise
            except NothingToLearn as end:
                logger.warning("RL ends after step %d of %d: %s", step, steps, end)
                save(step)
                break
        with clock("pack"):
            batches, useful = learner.pack(groups)
        with clock("old_logprobs"):
            batches = learner.with_logprobs(batches)
            run.checkpoints.wait()  # the updates donate the buffers that a checkpoint still reads
        with clock("update"):
            numbers = learner.update(batches)
        version = step + 1
        with clock("publish"):
            publish(learner.state.params, version)
        accuracy = None
        with contextlib.suppress(Interrupted):  # the step is saved below; the continued run evaluates it first
            accuracy = evaluated_at(version)
        rollouts.trained(groups)
        rollouts.published(version)
        with clock("log"):
            rate = learner.rates[version * learner.rl.mini_batches - 1]
            episodes = processes.gather(episode_table(groups, version=step))
            numbers = rollout_metrics(episodes) | numbers | {"packing/useful": useful, "lr": rate}
            run.writer.trajectories(version, "rl", groups)
            warn_of_drift(version, numbers, learner.rl.logprob_tolerance)
        times = clock.read() | wall_metrics(episodes) | engine_metrics()
        speed = float(episodes["tokens"].sum() / times["time/step"])
        run.writer.metrics(version, "rl", numbers | times | {"tokens_per_second": speed})
        run.bar(version, steps, summary(numbers))
        run.stopper.agree()
        ends = run.stopper.asked or learner.idle >= IDLE_STEPS
        if version == steps or version % run.every == 0 or ends or accuracy is not None:
            with clock("checkpoint"):
                save(version, accuracy)
        if run.stopper.asked:
            raise Interrupted
        refuse_idleness(version, learner.idle, numbers)
    run.mark()
    run.checkpoints.wait()
    return learner.state


def summary(numbers: Mapping[str, float]) -> str:
    """The text beside the progress bar."""
    shown = [f"{name} {numbers.get(f'{name}/mean', 0):.2f}" for name in ("reward", "accuracy", "tool_calls")]
    if numbers["episodes/aborted"]:
        shown.append(f"aborted {numbers['episodes/aborted']:.0f} of {numbers['episodes']:.0f}")
    return "  ".join(shown)


def warn_of_drift(step: int, numbers: Mapping[str, float], tolerance: float) -> None:
    """Logs a warning if engine and trainer disagree about the log-probs of the sampled tokens."""
    gap = numbers.get("rollout/logprob_difference", 0.0)
    if not gap <= tolerance:  # also for NaN
        logger.warning(
            "step %d: the engine's log-probs differ from the trainer's by %.3f nats per token, more than "
            "rl.logprob_tolerance=%g: other weights, another precision or a truncated distribution",
            step,
            gap,
            tolerance,
        )


def refuse_idleness(step: int, idle: int, numbers: Mapping[str, float]) -> None:
    """Logs a warning for a step that trained no token, and ends the run after IDLE_STEPS of them.

    Raises:
        UserError: with the reason.
    """
    if not idle:
        return
    if numbers["actor/tokens"]:
        norm = numbers["actor/grad_norm"]
        reason = f"all updates were skipped, because their gradient norm is {norm if math.isnan(norm) else 'infinite'}"
        cure = "the policy has diverged; start again with a lower learning rate"
    else:
        reason = f"{numbers['episodes/aborted']:.0f} of {numbers['episodes']:.0f} episodes were aborted"
        cure = "see engine, sandbox, grader and agent.seconds; then run the same command again"
    logger.warning("step %d trained no token: %s", step, reason)
    if idle >= IDLE_STEPS:
        raise UserError(f"steps {step - idle + 1} to {step} trained no token: {reason}; {cure}")
