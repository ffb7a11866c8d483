"""Metrics of a batch of episodes, under the field's names.

Each process makes a table of its episodes; the metrics are computed from the tables of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from open_agentrl_jax.types import Group

EPISODE = np.dtype(
    [
        *((name, "?") for name in ("aborted", "cut", "equal", "retried")),
        *((name, "f8") for name in ("reward", "accuracy", "response_length", "prompt_length", "num_turns")),
        *((name, "f8") for name in ("tool_calls", "tool_success", "seconds")),
        *((name, "i8") for name in ("tokens", "sampled", "age", "oldest")),
        ("source", "S32"),  # name of the row of data.sources, in UTF-8
        *((name, "i8") for name in ("sequences", "refused", "retokenised", "trained_twice")),  # of foreign agents
    ]
)
COPIED = ("response_length", "prompt_length", "num_turns", "tool_calls", "tool_success", "seconds")
BY_SOURCE = ("reward", "accuracy", "response_length", "num_turns", "tool_calls")
COPIED += ("sequences", "refused", "retokenised", "trained_twice")


def episode_table(groups: Sequence[Group], *, version: int | None = None) -> np.ndarray:
    """One row of dtype EPISODE per trajectory.

    Args:
        groups: played by this process.
        version: the trainer's weight version, for staleness; None: not measured.
    """
    table = np.zeros(sum(len(group.trajectories) for group in groups), EPISODE)
    for row, (group, t) in zip(table, ((g, t) for g in groups for t in g.trajectories), strict=True):
        row["aborted"], row["cut"], row["equal"] = t.aborted, t.stop == "length", group.all_equal
        row["retried"] = t.metrics.get("attempts", 1) > 1
        row["reward"], row["accuracy"] = t.reward, t.accuracy
        row["source"] = group.task.extra.get("row_name", "").encode()
        row["tokens"] = sum(len(sequence.tokens) for sequence in t.sequences)
        for name in COPIED:
            row[name] = t.metrics.get(name, 0.0)
        if version is not None:
            for sequence in t.sequences:
                ages = version - sequence.versions[sequence.versions >= 0]
                row["sampled"] += len(ages)
                row["age"] += ages.sum()
                row["oldest"] = max(row["oldest"], ages.max(initial=0))
    return table


def rollout_metrics(episodes: np.ndarray) -> dict[str, float]:
    """Means over the graded episodes; those that the infrastructure lost are only counted.

    Args:
        episodes: see `episode_table`.
    """
    metrics = {
        "episodes": float(len(episodes)),
        "episodes/aborted": float(episodes["aborted"].sum()),
        "episodes/retried": float(episodes["retried"].sum()),
    }
    graded = episodes[~episodes["aborted"]]
    if not len(graded):
        return metrics
    column = {name: np.ascontiguousarray(graded[name]) for name in EPISODE.names or ()}
    rewards, lengths, calls = column["reward"], column["response_length"], column["tool_calls"]
    metrics |= {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(),
        "reward/min": rewards.min(),
        "reward/max": rewards.max(),
        "accuracy/mean": column["accuracy"].mean(),
        "response_length/mean": lengths.mean(),
        "response_length/max": lengths.max(),
        "response_length/min": lengths.min(),
        "response_length/clip_ratio": column["cut"].mean(),
        "prompt_length/mean": column["prompt_length"].mean(),
        "num_turns/mean": column["num_turns"].mean(),
        "tool_calls/mean": calls.mean(),
        "tool_calls/none": (calls == 0).mean(),
        "tool_success/mean": column["tool_success"].sum() / calls.sum() if calls.sum() else 0.0,
        "groups/equal": episodes["equal"].mean(),
    }
    for name in sorted({*column["source"].tolist()} - {b""}):
        own = graded[graded["source"] == name]
        metrics |= {f"{name.decode('utf-8', 'replace')}/{key}/mean": own[key].mean() for key in BY_SOURCE}
        metrics[f"{name.decode('utf-8', 'replace')}/episodes"] = float(len(own))
    if (foreign := column["sequences"] > 0).any():
        metrics |= {
            "harness/sequences": column["sequences"][foreign].mean(),
            "harness/refused": column["refused"][foreign].mean(),
            "harness/retokenised": column["retokenised"].sum(),
            "harness/trained_twice": column["trained_twice"].sum(),
        }
    if sampled := column["sampled"].sum():
        metrics |= {"staleness/mean": column["age"].sum() / sampled, "staleness/max": column["oldest"].max()}
    return {name: float(value) for name, value in metrics.items()}


def wall_metrics(episodes: np.ndarray) -> dict[str, float]:
    """Times of the episodes in seconds, kept apart because no two runs agree on them."""
    seconds = episodes["seconds"]
    return {"time/episode_mean": seconds.mean(), "time/episode_max": seconds.max()} if len(seconds) else {}
