"""Numbers of a batch of episodes, under the field's names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from open_agentrl_jax.types import Group


def rollout_metrics(groups: Sequence[Group], *, version: int | None = None) -> dict[str, float]:
    """Means over the episodes that were graded; what the infrastructure lost is only counted.

    Args:
        groups: the batch.
        version: the trainer's weight version, for staleness.
    """
    everyone = [t for group in groups for t in group.trajectories]
    graded = [t for t in everyone if not t.aborted]
    metrics = {
        "episodes": float(len(everyone)),
        "episodes/aborted": float(len(everyone) - len(graded)),
        "episodes/retried": float(sum(t.metrics.get("attempts", 1) > 1 for t in everyone)),
    }
    if not graded:
        return metrics
    rewards = np.array([t.reward for t in graded])
    lengths = np.array([t.metrics["response_length"] for t in graded])
    calls = np.array([t.metrics["tool_calls"] for t in graded])
    succeeded = sum(t.metrics["tool_success"] for t in graded)
    metrics |= {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(),
        "reward/min": rewards.min(),
        "reward/max": rewards.max(),
        "accuracy/mean": float(np.mean([t.accuracy for t in graded])),
        "response_length/mean": lengths.mean(),
        "response_length/max": lengths.max(),
        "response_length/min": lengths.min(),
        "response_length/clip_ratio": float(np.mean([t.stop == "length" for t in graded])),
        "prompt_length/mean": float(np.mean([t.metrics["prompt_length"] for t in graded])),
        "num_turns/mean": float(np.mean([t.metrics["num_turns"] for t in graded])),
        "tool_calls/mean": calls.mean(),
        "tool_calls/none": float((calls == 0).mean()),
        "tool_success/mean": float(succeeded / calls.sum()) if calls.sum() else 0.0,
        "groups/equal": float(np.mean([group.all_equal for group in groups])),
    }
    if version is not None:
        sampled = [s.versions[s.versions >= 0] for t in graded for s in t.sequences]
        ages = version - np.concatenate(sampled)
        metrics |= {"staleness/mean": float(ages.mean()), "staleness/max": float(ages.max())}
    return {name: float(value) for name, value in metrics.items()}


def wall_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Times of the episodes, in seconds; they are kept apart since no two runs agree on them."""
    seconds = [t.metrics.get("seconds", 0.0) for group in groups for t in group.trajectories]
    return {"time/episode_mean": float(np.mean(seconds)), "time/episode_max": float(np.max(seconds))} if seconds else {}
