"""The warm start: supervised fine-tuning on tool-use trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from open_agentrl_jax.config import Packing
from open_agentrl_jax.train.checkpoint import Progress
from open_agentrl_jax.train.packing import Batch, Example, pack_mini_batch
from open_agentrl_jax.train.progress import Clock, Interrupted, Run
from open_agentrl_jax.train.state import TrainState


class Examples(Protocol):
    """An endless stream of examples; the same position always gives the same one."""

    def __getitem__(self, position: int, /) -> Example: ...


def example(ids: Sequence[int], mask: Sequence[bool], *, max_length: int) -> Example:
    """One conversation as an example, truncated on the right.

    Args:
        ids: tokens.
        mask: True for the tokens that an assistant produces.
        max_length: tokens to keep.
    """
    return Example(np.asarray(ids[:max_length], np.int32), np.asarray(mask[:max_length], bool))


def train_sft(
    state: TrainState,
    step_fn: Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Any]]],
    examples: Examples,
    run: Run,
    *,
    steps: int,
    batch_size: int,
    packing: Packing,
    place: Callable[[Batch], Batch],
    rates: np.ndarray,
    start: int = 0,
) -> TrainState:
    """Trains from step `start` to `steps`, with a checkpoint at the end.

    Args:
        state: of this phase's optimizer.
        step_fn: see train.step.make_step.
        examples: conversations.
        run: files, checkpoints, signals.
        steps: total steps of the phase.
        batch_size: conversations per step.
        packing: rows and row lengths.
        place: puts a batch on the mesh.
        rates: learning rate of each update, for the log.
        start: steps already done.
    """
    clock = Clock()
    waiting: tuple[int, dict[str, Any], float] | None = None

    def log() -> None:
        # A step is logged after the next one is dispatched, so that reading its metrics never leaves the device idle.
        if waiting is None:
            return
        step, metrics, useful = waiting
        with clock("train"):
            metrics = {name: float(value) for name, value in metrics.items()}
        tokens = metrics.pop("actor/tokens")
        times = clock.read()
        loss = metrics.pop("actor/loss")
        numbers = {
            "loss": loss,
            **metrics,
            "tokens": tokens,
            "packing/useful": useful,
            "lr": rates[step - 1],
            **times,
            "tokens_per_second": tokens / times["time/step"],
        }
        run.writer.metrics(step, "sft", numbers)
        run.bar(step, steps, f"loss {loss:.3f}")

    for step in range(start, steps):
        run.mark()
        with clock("pack"):
            taken = [examples[step * batch_size + i] for i in range(batch_size)]
            batch, used = pack_mini_batch(taken, packing, sequences=batch_size)
            useful = batch.useful
        with clock("dispatch"):
            state, metrics = step_fn(state, place(batch), np.int32(used))
        log()
        waiting = (step + 1, metrics, useful)
        run.stopper.agree()
        done = step + 1 == steps
        if done or run.stopper.asked or (step + 1) % run.every == 0:
            log()
            waiting = None
            with clock("checkpoint"):
                run.save(state, Progress("sft", step + 1))
                run.checkpoints.wait()  # the next step donates these buffers
        if run.stopper.asked:
            raise Interrupted
    log()
    run.mark()
    return state
