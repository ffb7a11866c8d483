"""Model-aware curation: rates problems by rollouts of the policy and writes the set that was chosen."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from open_agentrl_jax.collect import collection, curation
from open_agentrl_jax.collect.curation import PassRate
from open_agentrl_jax.collect.picture import bars
from open_agentrl_jax.data.prompts import write_tasks
from open_agentrl_jax.rollout.scheduler import ATTEMPTS, Play
from open_agentrl_jax.types import Task, UserError

Outcome = tuple[int, int, int]  # right, wrong and lost rollouts of a problem


async def rate(
    play: Play, task: Task, position: int, tries: int, limit: asyncio.Semaphore, on_rollout: Callable[[], None]
) -> tuple[int, int, int]:
    """Counts (right, wrong, lost) rollouts of one problem; stops when more cannot change its difficulty."""
    right = wrong = lost = 0

    async def one(sample: int) -> bool | None:
        for attempt in range(ATTEMPTS):
            async with limit:
                trajectory = await play(task, position=position, sample=sample, attempt=attempt)
            if not trajectory.aborted:
                on_rollout()
                return trajectory.accuracy == 1
        return None

    while more := curation.undecided(right, wrong, tries - lost):
        made = right + wrong + lost
        outcomes = await asyncio.gather(*(one(sample) for sample in range(made, made + more)))
        right += outcomes.count(True)
        wrong += outcomes.count(False)
        lost += outcomes.count(None)
    return right, wrong, lost


async def rate_all(
    play: Play, tasks: Sequence[Task], tries: int, concurrency: int, bar: Callable[[int, int], None]
) -> tuple[list[Outcome], int]:
    """Rates all problems, at most `concurrency` rollouts at a time.

    Args:
        play: plays one rollout.
        tasks: the problems.
        tries: most rollouts per problem.
        concurrency: rollouts at a time.
        bar: called with the problems rated and the rollouts graded so far.

    Returns:
        An outcome per problem, and the number of graded rollouts.
    """
    limit, rollouts, problems = asyncio.Semaphore(concurrency), 0, 0

    def on_rollout() -> None:
        nonlocal rollouts
        rollouts += 1

    async def one(i: int, task: Task) -> Outcome:
        nonlocal problems
        result = await rate(play, task, i, tries, limit, on_rollout)
        problems += 1
        bar(problems, rollouts)
        return result

    return list(await asyncio.gather(*(one(i, task) for i, task in enumerate(tasks)))), rollouts


def write(
    output: Path,
    rated: Sequence[tuple[Task, tuple[int, int, int]]],
    card: dict[str, Any],
    target: dict[str, float] | None,
    *,
    size: int = 0,
    seed: int = 0,
) -> int:
    """Writes the set, its card and its picture; returns the number of problems kept.

    Raises:
        UserError: none can be kept; the card, which is written first, holds the reason.
    """
    known = [(task, PassRate(right, right + wrong)) for task, (right, wrong, _) in rated if right + wrong]
    rates = [r for _, r in known]
    refused: UserError | None = None
    chosen: list[int] = []
    try:
        chosen = curation.resample(rates, target, size=size or None, seed=seed)
    except UserError as error:
        refused = error
    kept = [known[i] for i in chosen]
    table = curation.report(rates, [r for _, r in kept])
    card["counts"]["kept"], card["difficulty"] = len(kept), table
    collection.write_card(output, card)
    with open(output / "README.md", "a") as readme:
        readme.write("\n![difficulty](difficulty.svg)\n")
    series = {name: [row[name] for row in table] for name in ("before", "after")}
    picture = bars("problems by pass rate of the policy", [row["class"] for row in table], series)
    (output / "difficulty.svg").write_text(picture)
    if refused:
        raise UserError(f"{output / 'card.json'}: {refused}")
    columns = [
        {"pass_rate": r.rate, "right": r.right, "tries": r.tries, "difficulty": curation.classify(r)} for _, r in kept
    ]
    tasks = [dataclasses.replace(t, extra=t.extra | more) for (t, _), more in zip(kept, columns, strict=True)]
    write_tasks(output / "rl.parquet", tasks, columns)
    return len(kept)
