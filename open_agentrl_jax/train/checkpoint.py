"""Orbax checkpoints of the training state and of the run's progress.

`checkpoints/<number>` holds the TrainState (parameters, moments, counters) and, as metadata, `Progress`: phase, step,
the trained frontier of the data stream and the lengths of the run's files. No random state is stored: every draw is a
function of the seed and of a position in the progress.

A checkpoint becomes visible by orbax's marker file, commit_success.txt, which is written last. No directory is
renamed, so that buckets mounted as a file system work too.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tenacity
from orbax.checkpoint import v1 as ocp

from open_agentrl_jax.parallel import processes
from open_agentrl_jax.train.mirror import Mirror
from open_agentrl_jax.train.state import TrainState
from open_agentrl_jax.types import UserError

DAMAGED = "damaged.txt"  # marks a checkpoint that restore skips; holds the reason
ATTEMPTS = 3
WAIT = tenacity.wait_exponential(multiplier=1.0, max=30.0)  # seconds between two attempts to read a checkpoint
CHUNK = 2**24  # bytes
STATE = "state"  # orbax's name for the tree within a checkpoint

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
    """The position of a run."""

    phase: str  # "sft" | "rl": the current phase
    step: int  # completed steps of that phase
    next: int = 0  # data stream: the first position never started
    pending: list[int] = dataclasses.field(default_factory=list)  # positions started and not yet trained
    offsets: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes of metrics.jsonl and the like
    best: float = -1.0  # best held-out accuracy so far
    evaluated: int = 0  # the last RL step with an evaluation


class Checkpoints:
    """The checkpoints of one run directory; saving is asynchronous. With several processes all make every call."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_best: bool = False,
        mirror: Mirror | None = None,
    ):
        """Opens the folder, and creates it if it is missing.

        Args:
            directory: `<run_dir>/checkpoints`.
            keep: number of newest checkpoints to keep.
            keep_best: also keep the checkpoint with the best held-out accuracy.
            mirror: copies each finished checkpoint in a thread of its own.
        """
        # Orbax logs every step, and each error several times with its traceback before it raises it.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._path = Path(directory).absolute()
        self._path.mkdir(parents=True, exist_ok=True)
        context = ocp.Context()
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        policies: Any = ocp.training.preservation_policies
        decisions: Any = ocp.training.save_decision_policies
        kept: list[Any] = [_Newest(self._path, keep)]
        if keep_best:
            best = {"n": 1, "keep_checkpoints_without_metrics": False}
            kept.append(policies.BestN(get_metric_fn=lambda metrics: metrics["accuracy"], **best))
        path: Any = self._path
        self._checkpointer = ocp.training.Checkpointer(
            path,
            context=context,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )
        self._numbers: list[int] = processes.share([checkpoint.step for checkpoint in self._checkpointer.checkpoints])
        self._last: tuple[int, Progress] = 0, Progress("", 0)
        self._pending: Any = None
        self._mirror = mirror

    def save(self, state: TrainState, progress: Progress, *, accuracy: float | None = None) -> None:
        """Starts to write a checkpoint, unless the last one has the same progress.

        Checkpoint numbers count the steps of all phases and always grow, whatever becomes of the number of SFT steps
        between two starts: the newest number is the last one written.

        Args:
            state: its arrays are read in the background and must live until `wait` returns.
            progress: where a resumed run continues.
            accuracy: held-out accuracy, for keep_best.
        """
        self.wait()
        number, last = self._last
        if dataclasses.replace(last, offsets=progress.offsets) == progress and accuracy is None:
            return
        number += progress.step - (last.step if last.phase == progress.phase else 0)
        number = max([number, *(n + 1 for n in self._numbers)])
        if self._mirror is not None:
            self._mirror.wait()  # a new checkpoint may evict the one that is being copied
        self._pending = self._checkpointer.save_async(
            number,
            _tree(state),
            metrics=None if accuracy is None else {"accuracy": accuracy},
            custom_metadata={"progress": dataclasses.asdict(progress)},
        )
        self._numbers.append(number)
        self._last = number, progress
        if self._mirror is not None:
            self._mirror.saved(number, self._pending.result)

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def restore(self, abstract_states: Mapping[str, Callable[[], TrainState]]) -> tuple[TrainState, Progress] | None:
        """Loads the newest intact checkpoint; returns None if there is none.

        All processes agree on one checkpoint. Reads are retried. A damaged checkpoint stays where it is: once an older
        one is loaded, it is marked by a file `damaged.txt` and ignored from then on.

        Args:
            abstract_states: for each phase ("sft", "rl") a function that returns its state as ShapeDtypeStructs with
                shardings.

        Raises:
            UserError: the newest checkpoint cannot be read for want of permission or memory or by an I/O error; or
                every checkpoint is damaged.
        """
        damaged: dict[int, str] = {}
        for number in sorted(self._numbers, reverse=True):
            if processes.any_of((self._path / str(number) / DAMAGED).exists()):
                continue
            try:
                state, progress = self._agreed_load(number, abstract_states)
            except _Damaged as error:
                damaged[number] = str(error)
                logger.warning("checkpoint %d is damaged (%s); trying the one before", number, error)
                continue
            self._mark_damaged(damaged)
            self._last = number, progress
            return state, progress
        if damaged:
            reasons = "; ".join(f"{number} ({reason})" for number, reason in damaged.items())
            raise UserError(
                f"{self._path}: no checkpoint can be read: {reasons}; restore the folder from a copy, or remove it to "
                "start again"
            )
        return None

    def close(self) -> None:
        """Waits for the last checkpoint and its copy, then closes."""
        self.wait()
        if self._mirror is not None:
            self._mirror.close()
        self._checkpointer.close()

    def _agreed_load(
        self, number: int, abstract_states: Mapping[str, Callable[[], TrainState]]
    ) -> tuple[TrainState, Progress]:
        """Loads a checkpoint in all processes or in none: one failure is a failure of all, which try again together."""
        folder = self._path / str(number)

        @tenacity.retry(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=WAIT,
            retry=tenacity.retry_if_exception_type((_Damaged, _Unreadable)),
            reraise=True,
        )
        def attempt() -> tuple[TrainState, Progress]:
            loaded, failure = None, ("", "")
            try:
                loaded = _load(folder, abstract_states)
            except Exception as error:  # the readers raise whatever a damaged file makes them raise
                failure = _cause(folder, error), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            failures = [(cause, text) for cause, text in processes.all_values(failure) if cause]
            for cause, text in failures:
                if cause != "damage":
                    raise _Unreadable(f"{cause}: {text}")
            if failures:
                raise _Damaged(failures[0][1])
            assert loaded is not None
            return loaded

        try:
            return attempt()
        except _Unreadable as error:
            raise UserError(
                f"{folder}: the newest checkpoint cannot be read, {error}; nothing was changed: repair that and start "
                "again, or move the folder away to continue from the checkpoint before it"
            ) from error

    def _mark_damaged(self, reasons: Mapping[int, str]) -> None:
        for number, reason in reasons.items() if processes.first() else ():
            try:
                (self._path / str(number) / DAMAGED).write_text(reason + "\n")
            except OSError as error:  # it is found damaged again at the next start
                logger.warning("checkpoint %d cannot be marked as damaged: %s", number, error)


class _Damaged(Exception):
    """The files can be read, and they do not hold a checkpoint."""


class _Unreadable(Exception):
    """The files could not be read; they may be intact."""


@dataclasses.dataclass
class _Newest:
    """Preserves the newest `keep` intact checkpoints, and every damaged one: the user decides about those."""

    path: Path
    keep: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        damaged = [(self.path / str(checkpoint.step) / DAMAGED).exists() for checkpoint in checkpoints]
        newer_intact = [damaged[i + 1 :].count(False) for i in range(len(damaged))]
        return [bad or newer < self.keep for bad, newer in zip(damaged, newer_intact, strict=True)]


def _load(folder: Path, abstract_states: Mapping[str, Callable[[], TrainState]]) -> tuple[TrainState, Progress]:
    """Loads one checkpoint in this process alone: orbax's own barriers would hang where another process fails."""
    context = ocp.Context()
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.barrier_sync_key_prefix = f"process{jax.process_index()}"
    with context:
        metadata: Any = ocp.metadata(str(folder), checkpointable_name=STATE)
        progress = Progress(**metadata.custom_metadata["progress"])
        abstract = abstract_states[progress.phase]()
        state = jax.block_until_ready(ocp.load(str(folder), _tree(abstract), checkpointable_name=STATE))
    return TrainState(**state), progress


def _cause(folder: Path, error: Exception) -> str:
    """Why a checkpoint did not load: "damage" only if memory sufficed and every file can be read to its end."""
    text = str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "not enough memory"
    try:
        for file in _files(folder):
            with open(file, "rb") as opened:
                while opened.read(CHUNK):
                    pass
    except OSError as problem:
        return f"{problem.strerror or problem} ({problem.filename or folder})"
    return "damage"


def _files(folder: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=refuse):
        yield from (os.path.join(parent, name) for name in names)


def _tree(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
