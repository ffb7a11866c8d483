"""Advantages of a group of samples of one problem (GRPO, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def group_relative(
    rewards: Float[np.ndarray, "g n"],
    *,
    normalize_std: bool = True,
    eps: float = 1e-6,
    valid: Bool[np.ndarray, "g n"] | None = None,
) -> Float[np.ndarray, "g n"]:
    """Advantage of each sample over its group.

    A = (r - mean) / (std + eps) with the unbiased std, or r - mean. A group with equal rewards, or of one sample, gets
    exactly 0: the rounding error of a mean is not a signal.

    Args:
        rewards: one row per problem.
        normalize_std: False omits the division by the std (Dr.GRPO).
        eps: keeps the division finite.
        valid: False for samples lost to the infrastructure; they do not enter mean and std, and get 0.
    """
    rewards = np.asarray(rewards, np.float64)
    valid = np.ones(rewards.shape, bool) if valid is None else np.asarray(valid, bool)
    count = valid.sum(axis=1, keepdims=True)
    mean = np.where(valid, rewards, 0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    deviation = np.where(valid, rewards - mean, 0)
    lowest = np.where(valid, rewards, np.inf).min(axis=1, keepdims=True)
    highest = np.where(valid, rewards, -np.inf).max(axis=1, keepdims=True)
    if normalize_std:
        std = np.sqrt(np.square(deviation).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
        deviation = deviation / (std + eps)
    return np.where(lowest < highest, deviation, 0.0).astype(np.float32)


def turn_relative(
    rewards: Float[np.ndarray, "n k"], present: Bool[np.ndarray, "n k"], *, normalize_std: bool = True
) -> Float[np.ndarray, "n k"]:
    """How much better than its group's k-th turns each sample's k-th turn is (MT-GRPO, arXiv 2505.11821).

    Args:
        rewards: of the turns of n samples of one problem, padded to k turns.
        present: False for padding and lost samples, which have no part in mean and std and get 0.
        normalize_std: as in `group_relative`.
    """
    return group_relative(rewards.T, normalize_std=normalize_std, valid=present.T).T
