"""Trajectories of agentic lengths, to plan and to measure with: many short ones, a few as long as they may be."""

from __future__ import annotations

import numpy as np

from open_agentrl_jax.train.packing import Batch, Example, pack

_SPREAD = 0.8  # standard deviation of the logarithm


def lengths(count: int, *, mean: int = 4096, cap: int = 23040, seed: int = 0) -> np.ndarray:
    """`count` log-normal lengths in tokens, of this mean before they are cut at `cap`."""
    draw = np.random.default_rng(seed).lognormal(np.log(mean) - _SPREAD**2 / 2, _SPREAD, count)
    return np.clip(draw.round().astype(int), 2, cap)


def packed(sizes: np.ndarray, *, rows: int, length: int, vocab: int = 2) -> tuple[Batch, int]:
    """Random tokens of these lengths, all trained on, in packed rows: the Batch and its micro-batches in use."""
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
