"""Pack sequences of any length into rows of a fixed shape, with segment ids."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32

from open_agentrl_jax.config import Config, Packing
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.types import UserError

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Example:
    """One training sequence; where `mask[i]`, `tokens[i]` is the target given `tokens[:i]`."""

    tokens: Int32[np.ndarray, " t"]
    mask: Bool[np.ndarray, " t"]
    advantage: float | Float32[np.ndarray, " t"] = 0.0  # of the sequence, or of each token
    rollout_logprobs: Float32[np.ndarray, " t"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """One mini-batch: m micro-batches of b rows of t tokens; position i predicts `targets[i]`, the token after it.

    `segment_ids` number the sequences of a row from 1; 0 is padding. Streams are 0 off the mask. Arrays are numpy until
    the trainer places them on devices.
    """

    tokens: Int32[Any, "m b t"]
    positions: Int32[Any, "m b t"]
    segment_ids: Int32[Any, "m b t"]
    targets: Int32[Any, "m b t"]
    mask: Bool[Any, "m b t"]
    advantages: Float32[Any, "m b t"]
    old_logprobs: Float32[Any, "m b t"]
    rollout_logprobs: Float32[Any, "m b t"]
    ref_logprobs: Float32[Any, "m b t"]

    @property
    def useful(self) -> float:
        """Fraction of positions in used micro-batches that hold a token."""
        occupied = self.segment_ids.any(axis=(1, 2))
        return float((self.segment_ids[occupied] > 0).mean()) if occupied.any() else 0.0


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` by bin of `capacity`: longest first, each into the first bin with room.

    Raises:
        ValueError: a length exceeds `capacity`.
    """
    if len(lengths) and max(lengths) > capacity:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a row of {capacity}")
    bins: list[list[int]] = []
    room = np.empty(len(lengths), np.int64)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = np.flatnonzero(room[: len(bins)] >= lengths[index])
        place = int(fits[0]) if len(fits) else len(bins)
        if place == len(bins):
            bins.append([])
            room[place] = capacity
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def most_micro_batches(sequences: int, rows: int) -> int:
    """Micro-batches that hold `sequences` sequences of any length: one sequence per row."""
    return -(-sequences // rows)


def choose_length(sizes: Sequence[int], *, rows: int, lengths: Sequence[int]) -> tuple[int, int]:
    """The row length that packs sequences into the fewest places, and its number of micro-batches.

    Many devices have few rows each, so that a last, nearly empty micro-batch wastes most of a step: 46 full rows of
    23,040 tokens on 32 row groups use two micro-batches at 71 %, but one of 34,560-token rows at 95 %.

    Args:
        sizes: tokens per sequence.
        rows: per micro-batch.
        lengths: the static row lengths to choose from; each compiles its own step.

    Raises:
        ValueError: a sequence is longer than every row length.
    """
    fitting = [length for length in lengths if length >= max(sizes, default=0)] or [max(lengths)]
    counts = {length: most_micro_batches(len(first_fit_decreasing(sizes, length)), rows) for length in fitting}
    return min(counts.items(), key=lambda item: (item[0] * item[1], item[0]))


def choose_packing(config: Config, longest: int, mesh: jax.sharding.Mesh | None) -> Packing:
    """Rows and row lengths of a micro-batch on this mesh, for sequences of at most `longest` tokens.

    On a TPU, lengths are rounded up to what its attention kernels take.

    Raises:
        UserError: the rows or lengths do not divide by the mesh axes.
    """
    given = config.packing
    groups, parts = (1, 1) if mesh is None else (sharding.ways(axes, mesh) for axes in sharding.HIDDEN[:2])
    rows, length = given.rows or groups, given.length or -(-longest // parts) * parts
    if rows % groups:
        raise UserError(
            f"packing.rows={rows} does not divide by mesh data x fsdp x expert = {groups}; use a multiple, or 0 for "
            "one per device"
        )
    lengths = (length, *given.more_lengths)
    for value in lengths:
        if value % parts:
            raise UserError(
                f"packing.length={value} does not divide by mesh seq x tensor = {parts}; use a multiple, or 0"
            )
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform == "tpu":
        lengths = tuple(round_up(value, parts) for value in lengths)
        if lengths[0] != length:
            logger.info("rows of %d tokens are rounded up to %d for the TPU attention kernels", length, lengths[0])
    return Packing(rows, lengths[0], lengths[1:])


def pack_mini_batch(examples: Sequence[Example], packing: Packing, *, sequences: int) -> tuple[Batch, int]:
    """`pack` in the cheapest of the packing's row lengths, where every process packs the same examples.

    Args:
        examples: usually at most `sequences` of them; episodes of several sequences may give more.
        packing: of `choose_packing`.
        sequences: per mini-batch; sets the static number of micro-batches. Examples that need more take a multiple of
            it, so that few shapes are compiled.
    """
    lengths = (packing.length, *packing.more_lengths)
    sizes = [len(example.tokens) - 1 for example in examples]
    length = choose_length(sizes, rows=packing.rows, lengths=lengths)[0] if packing.more_lengths else packing.length
    micro_batches = most_micro_batches(sequences, packing.rows)
    if len(examples) > sequences:
        micro_batches *= -(-most_micro_batches(len(first_fit_decreasing(sizes, length)), packing.rows) // micro_batches)
    return pack(examples, rows=packing.rows, length=length, micro_batches=micro_batches)


def round_up(length: int, parts: int) -> int:
    """A row length of which each of `parts` devices holds a multiple of 128 tokens, as splash attention requires.

    Rows of 8,192 tokens and more become a multiple of 512: blocks are at most 768 tokens, and a length such as
    128 x 79 would leave only blocks of 128, with 36 times the grid steps.
    """
    unit = parts * (512 if length // parts >= 8192 else 128)
    return -(-length // unit) * unit


def pack(examples: Sequence[Example], *, rows: int, length: int, micro_batches: int | None = None) -> tuple[Batch, int]:
    """Packs examples into a Batch.

    Args:
        examples: each of 2 to `length + 1` tokens; the last token of a sequence is only a target.
        rows: b of a micro-batch.
        length: t.
        micro_batches: m, the static shape; None: as many as needed.

    Returns:
        The batch and the number of used micro-batches; the step skips the rest.

    Raises:
        ValueError: an example is too short or too long.
    """
    if any(len(example.tokens) < 2 for example in examples):
        raise ValueError("a sequence of fewer than 2 tokens predicts nothing")
    bins = first_fit_decreasing([len(example.tokens) - 1 for example in examples], length)
    used = most_micro_batches(len(bins), rows)
    m = max(1, used) if micro_batches is None else micro_batches
    return fill(examples, bins, rows=rows, length=length, micro_batches=m, used=used), used


def fill(
    examples: Sequence[Example],
    bins: Sequence[Sequence[int]],
    *,
    rows: int,
    length: int,
    micro_batches: int,
    used: int,
) -> Batch:
    """Places examples in rows.

    Args:
        examples: each of 2 to `length + 1` tokens.
        bins: the examples of each row, by index.
        rows: b of a micro-batch.
        length: t.
        micro_batches: m, the static shape.
        used: micro-batches that the rows are dealt over, so that all are equally full.

    Raises:
        ValueError: the rows do not fit.
    """
    m = micro_batches
    if used > m:
        raise ValueError(f"{used} micro-batches do not fit the {m} of the static shape")
    shape = (m * rows, length)
    ids = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids", "targets")}
    streams = {name: np.zeros(shape, np.float32) for name in ("advantages", "rollout_logprobs")}
    mask = np.zeros(shape, bool)
    for place, members in enumerate(bins):
        row = (place % max(used, 1)) * rows + place // max(used, 1)
        start = 0
        for segment, index in enumerate(members, start=1):
            example = examples[index]
            t = len(example.tokens) - 1
            span = slice(start, start + t)
            ids["tokens"][row, span] = example.tokens[:-1]
            ids["targets"][row, span] = example.tokens[1:]
            ids["positions"][row, span] = np.arange(t)
            ids["segment_ids"][row, span] = segment
            trains = example.mask[1:]
            mask[row, span] = trains
            streams["advantages"][row, span] = np.where(trains, np.broadcast_to(example.advantage, t + 1)[1:], 0)
            if example.rollout_logprobs is not None:
                streams["rollout_logprobs"][row, span] = np.where(trains, example.rollout_logprobs[1:], 0)
            start += t
    arrays = {**ids, **streams, "mask": mask, "old_logprobs": streams["rollout_logprobs"].copy()}
    arrays["ref_logprobs"] = np.zeros(shape, np.float32)
    return Batch(**{name: array.reshape(m, rows, length) for name, array in arrays.items()})
