"""The figures of an evaluation: accuracy with intervals, and how the agent used its tool."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from open_agentrl_jax.evaluation.metrics import summarize
from open_agentrl_jax.types import Episode, Group, Trajectory

DELIBERATIVE = 0.7  # a deliberative response has more than this share of successful tool calls
FEW_CALLS = 4  # and at most this many calls


def report(groups: Sequence[Group]) -> dict[str, Any]:
    """The figures of n samples per problem.

    Args:
        groups: one per row; rows that repeat a problem count as more samples of it (see `by_problem`).

    Returns:
        "accuracy": see metrics.summarize, {} where nothing was graded. "tools": see tool_use. "episodes": "all",
        "graded" and "aborted"; aborted ones enter no figure. "problems_and_rows": the numbers of both.
    """
    problems = by_problem(groups)
    samples = max((len(group.trajectories) for group in problems), default=0)
    accuracy = np.full((len(problems), samples), np.nan)
    predictions = [[""] * samples for _ in problems]
    for i, group in enumerate(problems):
        for j, trajectory in enumerate(group.trajectories):
            accuracy[i, j] = np.nan if trajectory.aborted else trajectory.accuracy
            predictions[i][j] = trajectory.prediction
    everyone = [t for group in groups for t in group.trajectories]
    graded = [t for t in everyone if not t.aborted]
    truths = [str(group.task.answer) for group in problems]
    return {
        "accuracy": summarize(accuracy, predictions, truths) if graded else {},
        "tools": tool_use(graded),
        "episodes": {"all": len(everyone), "graded": len(graded), "aborted": len(everyone) - len(graded)},
        "problems_and_rows": {"problems": len(problems), "rows": len(groups)},
    }


def by_problem(groups: Sequence[Group]) -> list[Group]:
    """One group per problem: rows with equal messages and answers are one problem, under the id of the first.

    Some public sets repeat each problem 32 times. Counted as problems of their own, their samples would look
    independent and the intervals would be too narrow.
    """
    merged: dict[Any, Group] = {}
    for group in groups:
        task = group.task
        asked = tuple((message.role, message.content) for message in task.messages)
        key = (asked, repr(task.answer)) if asked else task.id
        if key in merged:
            first = merged[key]
            merged[key] = dataclasses.replace(first, trajectories=[*first.trajectories, *group.trajectories])
        else:
            merged[key] = group
    return list(merged.values())


def per_problem(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Each problem with the accuracy of its samples, null for one that was not graded, as a paired test needs it."""
    return [
        {
            "id": group.task.id,
            "source": group.task.source,
            "accuracy": [None if t.aborted else t.accuracy for t in group.trajectories],
        }
        for group in by_problem(groups)
    ]


def livecodebench(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The programs of each question, in the format of LiveCodeBench's `custom_evaluator --custom_output_file`.

    Questions are in the order of their ids; a sample without a program, or an aborted one, has an empty program.
    """
    asked = [g for g in groups if g.task.extra.get("question_id") and g.task.extra.get("grader") == "code"]
    rows = [
        {"question_id": group.task.extra["question_id"], "code_list": [t.prediction for t in group.trajectories]}
        for group in asked
    ]
    return sorted(rows, key=lambda row: str(row["question_id"]))


def tool_use(trajectories: Sequence[Trajectory | Episode]) -> dict[str, Any]:
    """How a set of responses used the tool.

    A response is "deliberative" with one to FEW_CALLS calls of which more than DELIBERATIVE succeed, "none" without a
    call, and "reactive" otherwise.
    """

    def mode(calls: float, succeeded: float) -> str:
        if not calls:
            return "none"
        return "deliberative" if calls <= FEW_CALLS and succeeded / calls > DELIBERATIVE else "reactive"

    calls = [t.metrics["tool_calls"] for t in trajectories]
    succeeded = [t.metrics["tool_success"] for t in trajectories]
    by_calls: dict[int, list[float]] = collections.defaultdict(list)
    by_mode: dict[str, list[float]] = collections.defaultdict(list)
    for trajectory, n, good in zip(trajectories, calls, succeeded, strict=True):
        by_calls[int(n)].append(trajectory.accuracy)
        by_mode[mode(n, good)].append(trajectory.accuracy)
    count = max(len(trajectories), 1)
    return {
        "calls_a_response": sum(calls) / count,
        "calls_succeeded": sum(succeeded) / sum(calls) if sum(calls) else 0.0,
        "responses_without_call": sum(n == 0 for n in calls) / count,
        "tokens_before_first_call": _mean(
            [t.metrics["first_call"] for t in trajectories if t.metrics["first_call"] >= 0]
        ),
        "accuracy_by_calls": {n: {"responses": len(a), "accuracy": _mean(a)} for n, a in sorted(by_calls.items())},
        "accuracy_by_mode": {m: {"share": len(a) / count, "accuracy": _mean(a)} for m, a in sorted(by_mode.items())},
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
