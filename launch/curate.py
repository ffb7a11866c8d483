"""The model-aware RL set: the problems that this policy solves sometimes, spread over difficulties.

    python -m launch.curate --config=configs/quickstart.py --model=runs/quickstart/export --target=flat

Plays up to `--tries` rollouts a problem, fewer where the rest can change nothing; leaves out what is never or always
solved; resamples the others to a target histogram of hard (pass rate <= 0.25), medium and easy (>= 0.75). Writes
rl.parquet with the rates, card.json, README.md and difficulty.svg to `--output`. Started again after a kill it goes on
where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch import command
from launch.command import define, option
from open_agentrl_jax.collect import collection, curation, teachers
from open_agentrl_jax.collect.curation import PassRate
from open_agentrl_jax.collect.journal import Journal
from open_agentrl_jax.collect.picture import bars
from open_agentrl_jax.config import Config
from open_agentrl_jax.data.prompts import write_tasks
from open_agentrl_jax.rollout.scheduler import ATTEMPTS, EventLoop, Play
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.world import open_world, reader_of
from open_agentrl_jax.telemetry.screen import Screen
from open_agentrl_jax.types import Sampling, Task, UserError


@dataclasses.dataclass
class Options:
    """The flags of this command."""

    model: str = option("", "the policy: a Hugging Face folder or Hub id; empty: <run_dir>/export")
    tries: int = option(8, "rollouts a problem at most", lower_bound=2)
    limit: int = option(0, "only the first so many problems; 0: all", lower_bound=0)
    target: str = option("flat", "shares of difficulties: flat, or e.g. hard=2,medium=2,easy=1")
    size: int = option(0, "problems wanted; 0: as many as the scarcest difficulty allows", lower_bound=0)
    decontaminate: str = option(
        "data.eval", "evaluation sets (names or paths, with commas) that nothing kept may share 13 words with"
    )
    output: str = option("", "folder of the data set; empty: <run_dir>/curated")


def parse_target(text: str) -> dict[str, float] | None:
    """`flat` is None; else shares by difficulty.

    Raises:
        UserError: it is neither.
    """
    if text == "flat":
        return None
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(share) for name, share in pairs}
    except ValueError as error:
        raise UserError(f"--target={text}: write flat, or shares such as hard=2,medium=2,easy=1") from error


async def rate(
    play: Play, task: Task, position: int, tries: int, limit: asyncio.Semaphore, on_rollout: Callable[[], None]
) -> tuple[int, int, int]:
    """(right, wrong, lost) of one problem's rollouts, made as long as they can change its difficulty."""
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


def main(config: Config, options: Options) -> int:
    """Makes one RL set."""
    if not config.data.train:
        raise UserError(f"config {config.name!r}: data.train is empty; name the problems to choose from")
    target = parse_target(options.target)
    contaminated, against = collection.contamination(options.decontaminate, config.data.eval, reader_of(config))
    output = Path(options.output or Path(config.directory) / "curated").absolute()
    model = options.model or str(Path(config.directory) / "export")
    sampling = Sampling(0, config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)
    loop = EventLoop()
    with contextlib.ExitStack() as stack:
        screen = stack.enter_context(Screen())
        stack.callback(loop.close)
        journal = Journal(output, "journal", teachers.settings(config, model, sampling, "curate"))
        stack.callback(journal.close)
        world = open_world(config)
        stack.callback(lambda: loop.run(world.close()))
        teacher = teachers.policy(
            teachers.PlayerSpec(config, output, loop, world, journal, sampling, "curate", model=model)
        )
        mixture, notes = inputs.training_problems(config, teacher.chat)
        read = list(mixture)[: options.limit or None]
        tasks = [task for task in read if not contaminated(collection.problem_of(task))]
        if not tasks:
            raise UserError(f"data.train {config.data.train}: all {len(read)} problems are in an evaluation set")
        for note in notes:
            screen.say(note)
        policy = teacher.start()
        stack.callback(policy.close)
        rollouts = problems = 0

        def on_rollout() -> None:
            nonlocal rollouts
            rollouts += 1

        async def rate_all() -> list[tuple[int, int, int]]:
            limit = asyncio.Semaphore(policy.concurrency)

            async def one(i: int, task: Task) -> tuple[int, int, int]:
                nonlocal problems
                result = await rate(policy.play, task, i, options.tries, limit, on_rollout)
                problems += 1
                screen.bar("curate", problems, len(tasks), f"{rollouts} rollouts")
                return result

            return list(await asyncio.gather(*(one(i, task) for i, task in enumerate(tasks))))

        outcomes = loop.run(rate_all())
        counts = {
            "problems read": len(read),
            "contaminated": len(read) - len(tasks),
            "not graded": sum(right + wrong == 0 for right, wrong, _ in outcomes),
            "rollouts": rollouts,
            "rollouts lost": sum(lost for _, _, lost in outcomes),
            "rollouts spared by early stop": len(tasks) * options.tries - sum(map(sum, outcomes)),
            "rollouts saved by the journal": journal.found,
        }
        card = {
            "title": f"{config.data.train} as {model} finds it",
            "made": {
                "model": model, "problems": config.data.train, "tries": options.tries, "target": options.target,
                "seed": config.seed, "temperature": config.rollout.temperature,
                "decontaminated": ", ".join(against) or "against nothing",
                "left out": "; ".join(notes) or "nothing",
            },
            "counts": counts,
        }  # fmt: skip
        rated = list(zip(tasks, outcomes, strict=True))
        try:
            kept = write(output, rated, card, target, size=options.size, seed=config.seed)
        finally:
            if "difficulty" in card:
                rows = [[str(value) for value in row.values()] for row in card["difficulty"]]
                screen.table("problems by difficulty", ["", "before", "after"], rows)
        screen.say(f"{kept} of {len(tasks)} problems: {output / 'rl.parquet'}; counts: {output / 'README.md'}")
    return 0


def write(
    output: Path,
    rated: Sequence[tuple[Task, tuple[int, int, int]]],
    card: dict[str, Any],
    target: dict[str, float] | None,
    *,
    size: int = 0,
    seed: int = 0,
) -> int:
    """Writes the set, its card and its picture; returns how many problems were kept.

    Raises:
        UserError: none can be kept; the card, written before, tells why.
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


if __name__ == "__main__":
    load, read = command.config_flag(), define(Options)
    command.run(lambda: main(load(), read()))
