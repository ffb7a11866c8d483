"""Synthetic trajectories of agentic lengths for planning and benchmarks: many short ones, a few at the limit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from open_agentrl_jax.train.packing import Batch, Example, choose_length, pack

_SPREAD = 0.8  # standard deviation of the logarithm


def lengths(count: int, *, mean: int = 4096, cap: int = 23040, seed: int = 0) -> np.ndarray:
    """`count` log-normal lengths in tokens, of this mean before clipping to `cap`."""
    draw = np.random.default_rng(seed).lognormal(np.log(mean) - _SPREAD**2 / 2, _SPREAD, count)
    return np.clip(draw.round().astype(int), 2, cap)


def packed(sizes: np.ndarray, *, rows: int, length: int, vocab: int = 2) -> tuple[Batch, int]:
    """Random tokens of these lengths, all trained on, in packed rows: the Batch and its used micro-batches."""
    rng = np.random.default_rng(1)
    examples = [
        Example(
            tokens=rng.integers(0, vocab, size + 1).astype(np.int32),
            mask=np.ones(size + 1, bool),
            advantage=float(rng.standard_normal()),
            rollout_logprobs=np.full(size + 1, -np.log(vocab), np.float32),
        )
        for size in sizes
    ]
    return pack(examples, rows=rows, length=length)


def utilization(sequences: int, *, rows: int, lengths: Sequence[int], longest: int = 0, draws: int = 8) -> float:
    """Fraction of useful tokens in the micro-batches that hold a mini-batch, as the trainer packs it.

    Args:
      sequences: per mini-batch; log-normal lengths of mean 4,096 (a quarter of the limit if that is less).
      rows: per micro-batch.
      lengths: row lengths to choose from, see `packing.choose_length`.
      longest: the limit on sequence lengths; 0: the first of `lengths`.
      draws: mini-batches to average over.
    """
    cap = longest or lengths[0]
    useful = places = 0
    for seed in range(draws):
        sizes = _lengths(sequences, mean=min(4096, cap // 4), cap=cap, seed=seed)
        length, micro_batches = choose_length(sizes.tolist(), rows=rows, lengths=lengths)
        useful, places = useful + int(sizes.sum()), places + micro_batches * rows * length
    return useful / places


def better_packing(
    sequences: int, *, groups: int, seq: int, length: int, longest: int
) -> tuple[float, int, tuple[int, ...]] | None:
    """The smallest `mesh.seq`, with longer rows, that makes 90 % of the tokens useful, else the best one.

    Args:
      sequences: per mini-batch.
      groups: devices of data x fsdp, among which `seq` may take more.
      seq: parts of a row now.
      length: tokens per row now.
      longest: the limit on sequence lengths.

    Returns:
      The fraction of useful tokens, `seq`, and further row lengths; None if `groups` does not divide by 2.
    """
    found: list[tuple[float, int, tuple[int, ...]]] = []
    factor = 2
    while groups % factor == 0:
        more = tuple(length * quarters // 4 // 128 * 128 for quarters in (5, 6, 7))
        useful = utilization(sequences, rows=groups // factor, lengths=(length, *more), longest=longest)
        found.append((useful, seq * factor, more))
        if useful >= 0.9:
            return found[-1]
        factor *= 2
    return max(found, default=None)


_lengths = lengths
