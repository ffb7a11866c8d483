"""GRPO: rollouts -> advantages -> packed mini-batches -> updates -> publish. Blind to algorithm, engine and
environment.

Order of one step: (1) wait for a batch of groups; (2) advantages; (3) old log-probs, where the trainer computes them;
(4) one update a mini-batch; (5) publish the weights; (6) evaluate where due; (7) let the scheduler start the next
episodes; (8) write the step's numbers and texts while those run; (9) checkpoint. A checkpoint's frontier counts what
was trained and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from open_agentrl_jax.algorithms.advantages import group_relative
from open_agentrl_jax.behaviour import Behaviour
from open_agentrl_jax.config import RL, Packing
from open_agentrl_jax.telemetry.metrics import rollout_metrics, wall_metrics
from open_agentrl_jax.train.checkpoint import Progress
from open_agentrl_jax.train.packing import Batch, Example, pack_mini_batch
from open_agentrl_jax.train.progress import Clock, Interrupted, Publish, Run
from open_agentrl_jax.train.state import TrainState
from open_agentrl_jax.types import Group

logger = logging.getLogger(__name__)


class Rollouts(Protocol):
    """Where batches come from: see rollout.scheduler."""

    def next_batch(self, check: Callable[[], None]) -> list[Group]:
        """Waits for a batch; `check` may raise to end the waiting."""
        ...

    def trained(self, groups: Sequence[Group]) -> Any:
        """Marks groups as trained; returns the frontier (`next`, `pending`)."""
        ...

    def published(self, version: int) -> None:
        """The engine samples from `version` now."""
        ...


@dataclasses.dataclass(frozen=True)
class Functions:
    """The compiled parts."""

    step: Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Any]]]
    score: Callable[[Any, Batch, Any], Any]
    place: Callable[[Batch], Batch]  # onto the mesh


def advantages(groups: Sequence[Group], *, normalize_std: bool, behaviour: Behaviour) -> np.ndarray:
    """[g n] advantages of the shaped rewards; aborted samples have no part in them."""
    rewards = np.array([[t.reward for t in group.trajectories] for group in groups], np.float32)
    valid = np.array([[not t.aborted for t in group.trajectories] for group in groups])
    if behaviour.equal_groups_leave_residue:
        # Added up one by one in fp32, as a framework does that leaves a residue.
        mean = np.cumsum(rewards, axis=1, dtype=np.float32)[:, -1:] / np.float32(rewards.shape[1])
        std = rewards.std(axis=1, ddof=1, keepdims=True) if rewards.shape[1] > 1 else np.ones_like(mean)
        centred = rewards - (mean if rewards.shape[1] > 1 else 0)
        return np.where(valid, centred / (std + 1e-6) if normalize_std else centred, 0).astype(np.float32)
    return group_relative(rewards, normalize_std=normalize_std, valid=valid)


def examples(groups: Sequence[Group], advantages: np.ndarray) -> list[Example]:
    """What trains of a batch: every trajectory that the infrastructure did not lose."""
    return [
        Example(t.tokens, t.loss_mask, float(a), t.logprobs)
        for group, row in zip(groups, advantages, strict=True)
        for t, a in zip(group.trajectories, row, strict=True)
        if not t.aborted and t.loss_mask.any()
    ]


def warn_of_drift(version: int, numbers: dict[str, Any], tolerance: float) -> None:
    """Says so where engine and trainer disagree about the log-probs of what was sampled."""
    if not (gap := numbers.get("rollout/logprob_difference", 0.0)) <= tolerance:  # NaN warns too
        logger.warning(
            "step %d: the engine's log-probs are %.3f nats a token from the trainer's, more than "
            "rl.logprob_tolerance=%g: other weights, another precision or a truncated distribution",
            version,
            gap,
            tolerance,
        )


def train_rl(
    state: TrainState,
    functions: Functions,
    rollouts: Rollouts,
    publish: Publish,
    evaluate: Callable[[int], float] | None,
    run: Run,
    rl: RL,
    packing: Packing,
    behaviour: Behaviour,
    *,
    steps: int,
    rates: np.ndarray,
    engine_metrics: Callable[[], dict[str, float]],
    start: Progress,
    ref_params: Any = None,
    eval_every: int = 0,
) -> TrainState:
    """Trains from step `start.step` to `steps`.

    Args:
        state: of this phase's optimizer.
        functions: compiled step and score.
        rollouts: batches of groups.
        publish: (params, version) -> None; when it returns, engines sample from these weights.
        evaluate: (step) -> held-out accuracy; None: no held-out data.
        run: files, checkpoints, signals.
        rl: prompts, samples, mini-batches and the loss.
        packing: rows and row length.
        behaviour: robust or reference.
        steps: of the whole phase.
        rates: learning rate of each update, for the log.
        engine_metrics: the engine's own counts; they depend on timing.
        start: where a resumed run goes on.
        ref_params: of the reference policy, where the loss has a KL term.
        eval_every: steps; 0: never inside the loop.
    """
    share = rl.prompts // rl.mini_batches
    rescore = rl.loss.old_logprobs == "trainer"
    clock, best, evaluated = Clock(), start.best, start.evaluated

    def save(version: int, accuracy: float | None = None) -> None:
        frontier = rollouts.trained(())
        progress = Progress("rl", version, frontier.next, list(frontier.pending), best=best, evaluated=evaluated)
        run.save(state, progress, accuracy=accuracy)

    def evaluated_at(version: int) -> float | None:
        """Held-out accuracy where it is due and not known yet."""
        nonlocal best, evaluated
        if evaluate is None or not eval_every or version % eval_every or version in (evaluated, steps):
            return None
        with clock("evaluate"):
            accuracy = evaluate(version)
        best, evaluated = max(best, accuracy), version
        return accuracy

    evaluated_at(start.step)  # the run may have been stopped while it evaluated
    for step in range(start.step, steps):
        run.mark()
        with clock("rollout"):
            try:
                groups = rollouts.next_batch(run.stopper.check)
            except Interrupted:
                save(step)
                raise
        with clock("pack"):
            rows = advantages(groups, normalize_std=rl.loss.normalize_std, behaviour=behaviour)
            parts = [slice(i * share, (i + 1) * share) for i in range(rl.mini_batches)]
            packed = [
                pack_mini_batch(examples(groups[part], rows[part]), packing, sequences=share * rl.samples)
                for part in parts
            ]
            useful = float(np.mean([batch.useful for batch, _ in packed]))
            placed = [(functions.place(batch), np.int32(used)) for batch, used in packed if used]
        with clock("old_logprobs"):
            if rescore:
                placed = [
                    (dataclasses.replace(batch, old_logprobs=functions.score(state.params, batch, used)), used)
                    for batch, used in placed
                ]
            if rl.loss.kl_coef > 0:
                placed = [
                    (dataclasses.replace(batch, ref_logprobs=functions.score(ref_params, batch, used)), used)
                    for batch, used in placed
                ]
            run.checkpoints.wait()  # the updates give the checkpointed buffers away
        with clock("update"):
            updates = []
            for batch, used in placed:
                state, metrics = functions.step(state, batch, used)
                updates.append(metrics)
        version = step + 1
        with clock("publish"):
            publish(state.params, version)
        accuracy = None
        with contextlib.suppress(Interrupted):  # the step is saved below; the continued run evaluates first
            accuracy = evaluated_at(version)
        rollouts.trained(groups)
        rollouts.published(version)
        with clock("update"):  # the device works while the lines above run; here its numbers are waited for
            updates = [{name: float(value) for name, value in metrics.items()} for metrics in updates]
        with clock("log"):
            numbers = rollout_metrics(groups, version=step)
            for name in updates[0] if updates else ():
                numbers[name] = float(np.mean([metrics[name] for metrics in updates]))
            numbers["actor/tokens"] = sum(metrics["actor/tokens"] for metrics in updates)
            numbers |= {"packing/useful": useful, "lr": rates[version * rl.mini_batches - 1]}
            tokens = sum(len(t.tokens) for group in groups for t in group.trajectories)
            run.writer.trajectories(version, "rl", groups)
            warn_of_drift(version, numbers, rl.logprob_tolerance)
        times = clock.read() | wall_metrics(groups) | engine_metrics()
        run.writer.metrics(version, "rl", numbers | times | {"tokens_per_second": tokens / times["time/step"]})
        shown = [f"{name} {numbers.get(f'{name}/mean', 0):.2f}" for name in ("reward", "accuracy", "tool_calls")]
        run.bar(version, steps, "  ".join(shown))
        run.stopper.agree()
        if version == steps or version % run.every == 0 or run.stopper.asked or accuracy is not None:
            with clock("checkpoint"):
                save(version, accuracy)
        if run.stopper.asked:
            raise Interrupted
    run.mark()
    run.checkpoints.wait()
    return state
