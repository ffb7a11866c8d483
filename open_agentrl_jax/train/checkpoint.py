"""Checkpoints by orbax: the training state, and the progress that says how the run goes on.

A step's folder holds the TrainState as a tree (parameters, moments, counters) and, in its metadata, `progress`:
phase, step, the frontier of the data stream that has been TRAINED, and the lengths of the run's files. Random numbers
need nothing more: every draw is a function of the seed and of a position that is part of the progress.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from open_agentrl_jax.train.mirror import Mirror
from open_agentrl_jax.train.state import TrainState
from open_agentrl_jax.types import UserError

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
    """Where a run stands."""

    phase: str  # "sft" | "rl": the phase that goes on
    step: int  # steps of the phase that are done
    next: int = 0  # data stream: the first position never started
    pending: list[int] = dataclasses.field(default_factory=list)  # started, not trained
    offsets: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes of metrics.jsonl and the like
    best: float = -1.0  # best held-out accuracy so far
    evaluated: int = 0  # the last RL step after which the policy was evaluated


class Checkpoints:
    """The checkpoints of one run directory; saving is asynchronous."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_best: bool = False,
        mirror: Mirror | None = None,
    ):
        """Opens, and creates, the folder.

        Args:
            directory: `<run_dir>/checkpoints`.
            keep: newest checkpoints to keep.
            keep_best: keep the one of the best held-out accuracy as well.
            mirror: copies each checkpoint, once it is on disk, in a thread of its own.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates each step
        policies: Any = ocp.training.preservation_policies
        decisions: Any = ocp.training.save_decision_policies
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_best:
            best = {"n": 1, "keep_checkpoints_without_metrics": False}
            kept.append(policies.BestN(get_metric_fn=lambda metrics: metrics["accuracy"], **best))
        path: Any = Path(directory).absolute()
        path.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            path,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )
        self._pending: Any = None
        self._mirror = mirror

    def save(self, number: int, state: TrainState, progress: Progress, *, accuracy: float | None = None) -> None:
        """Begins to write a checkpoint; the arrays of `state` must live until `wait` returns.

        Args:
            number: the folder's name; it grows over the phases of a run.
            state: its arrays are read while the caller goes on.
            progress: how the run goes on from here.
            accuracy: held-out, for keep_best.
        """
        self.wait()
        if self._mirror is not None:
            self._mirror.wait()  # a new checkpoint may remove the one that is being copied
        self._pending = self._checkpointer.save_async(
            number,
            _tree(state),
            overwrite=True,
            metrics=None if accuracy is None else {"accuracy": accuracy},
            custom_metadata={"progress": dataclasses.asdict(progress)},
        )
        if self._mirror is not None:
            self._mirror.saved(number, self._pending.result)

    def wait(self) -> None:
        """Until what was begun is on disk."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def restore(self, abstract_states: Mapping[str, Callable[[], TrainState]]) -> tuple[TrainState, Progress] | None:
        """The newest checkpoint that can be read, or None where there is none; damaged newer ones are deleted.

        Args:
            abstract_states: for each phase ("sft", "rl") what gives its state as ShapeDtypeStructs with shardings.

        Raises:
            UserError: there are checkpoints, and none can be read; or the newest is of another model.
        """
        failures = []
        for checkpoint in sorted(self._checkpointer.checkpoints, key=lambda c: -c.step):
            try:
                metadata = self._checkpointer.metadata(checkpoint.step)
                progress = Progress(**metadata.custom_metadata["progress"])  # type: ignore[index]
                abstract = abstract_states[progress.phase]()
                state = jax.block_until_ready(self._checkpointer.load(checkpoint.step, _tree(abstract)))
            except Exception as error:  # whatever a damaged file makes the reader raise
                failures.append(f"{checkpoint.step} ({' '.join(str(error).split())[:200]})")
                logger.warning("checkpoint %s cannot be read; trying the one before", failures[-1])
                continue
            for broken in failures:
                self._checkpointer.delete(int(broken.split()[0]))
            return TrainState(**state), progress
        if failures:
            raise UserError(
                f"no checkpoint can be read: {'; '.join(failures)}; "
                "restore the folder from a copy, or remove it to start again"
            )
        return None

    def close(self) -> None:
        """Waits and closes."""
        self.wait()
        if self._mirror is not None:
            self._mirror.close()
        self._checkpointer.close()


def _tree(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
