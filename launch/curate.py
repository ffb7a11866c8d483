"""The model-aware RL set: the problems that this policy solves sometimes, spread over difficulties.

    python -m launch.curate --config=configs/quickstart.py --model=runs/quickstart/export --target=flat

Plays up to `--tries` rollouts a problem, fewer where the rest can change nothing; leaves out what is never or always
solved; resamples the others to a target histogram of hard (pass rate <= 0.25), medium and easy (>= 0.75). Writes
rl.parquet with the rates, card.json, README.md and difficulty.svg to `--output`. Started again after a kill it goes on
where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from launch import command
from launch.command import define, option
from open_agentrl_jax.collect import collection, teachers
from open_agentrl_jax.collect.curating import rate as rate
from open_agentrl_jax.collect.curating import rate_all, write
from open_agentrl_jax.collect.journal import Journal
from open_agentrl_jax.config import Config
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.world import open_world, reader_of
from open_agentrl_jax.telemetry.screen import Screen
from open_agentrl_jax.types import Sampling, UserError


@dataclasses.dataclass
class Options:
    """The flags of this command."""

    model: str = option("", "the policy: a Hugging Face folder or Hub id; empty: <run_dir>/export")
    tries: int = option(8, "most rollouts per problem", lower_bound=2)
    limit: int = option(0, "use only the first problems; 0: all", lower_bound=0)
    target: str = option("flat", "shares of difficulties: flat, or e.g. hard=2,medium=2,easy=1")
    size: int = option(0, "problems wanted; 0: as many as the scarcest difficulty allows", lower_bound=0)
    decontaminate: str = option(
        "data.eval", "evaluation sets (names or paths, with commas) that nothing kept may share 13 words with"
    )
    output: str = option("", "folder of the data set; empty: <run_dir>/curated")


def parse_target(text: str) -> dict[str, float] | None:
    """Reads --target: None for `flat`, else shares by difficulty.

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


def main(config: Config, options: Options) -> int:
    """Curates one RL set."""
    if not config.data.problems:
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
            raise UserError(f"data.train {config.data.problems}: all {len(read)} problems are in an evaluation set")
        for note in notes:
            screen.say(note)
        policy = teacher.start()
        stack.callback(policy.close)
        outcomes, rollouts = loop.run(
            rate_all(
                policy.play,
                tasks,
                options.tries,
                policy.concurrency,
                lambda done, made: screen.bar("curate", done, len(tasks), f"{made} rollouts"),
            )
        )
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
            "title": f"{config.data.problems} by difficulty for {model}",
            "made": {
                "model": model, "problems": config.data.problems, "tries": options.tries, "target": options.target,
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


if __name__ == "__main__":
    load, read = command.config_flag(), define(Options)
    command.run(lambda: main(load(), read()))
