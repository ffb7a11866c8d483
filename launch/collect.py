"""Real tool-use trajectories from a teacher, kept where they are right: the SFT set.

    python -m launch.collect --config=configs/quickstart.py --teacher=runs/quickstart/export --tries=4
    python -m launch.collect --config=configs/qwen3_4b_grpo_tcr.py --config.data.train=gsm8k_train.jsonl \\
        --endpoint=https://host/v1 --endpoint_model=NAME          # OPENAI_API_KEY holds the key

The teacher is a Hugging Face folder on the embedded engine, SGLang servers (`--config.rollout.engine=sglang`) or an
OpenAI-compatible endpoint; agent loop, sandbox and grader are those of training. `--style=stitched` asks nobody: it
turns the calculator annotations of GSM8K's solutions into tool calls, the paper's synthetic baseline.
Writes sft.parquet, card.json and README.md to `--output`. Started again after a kill it goes on where it was.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from launch import command
from launch.command import define, option
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.collect import collection, teachers
from open_agentrl_jax.collect.journal import Journal
from open_agentrl_jax.collect.stitched import NotStitchable, stitch
from open_agentrl_jax.config import Config
from open_agentrl_jax.data.conversations import write_conversations
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.players import play_through
from open_agentrl_jax.run.world import open_world, reader_of
from open_agentrl_jax.telemetry.screen import Screen
from open_agentrl_jax.types import Sampling, Task, UserError


@dataclasses.dataclass
class Options:
    """The flags of this command."""

    teacher: str = option("", "a Hugging Face folder or Hub id; empty: <run_dir>/export")
    endpoint: str = option("", "base URL of an OpenAI-compatible server, in place of --teacher")
    endpoint_model: str = option("", "the name that the endpoint knows its model by")
    style: str = option("real", "what is collected", choices=["real", "stitched"])
    tries: int = option(4, "trajectories a problem", lower_bound=1)
    limit: int = option(0, "only the first so many problems; 0: all", lower_bound=0)
    size: int = option(0, "keep at most so many, balanced by source and number of calls; 0: all", lower_bound=0)
    decontaminate: str = option(
        "data.eval", "evaluation sets (names or paths, with commas) that nothing kept may share 13 words with"
    )
    output: str = option("", "folder of the data set; empty: <run_dir>/collected")


@dataclasses.dataclass
class Work:
    """What the parts of the command share; `card` is filled as it goes."""

    config: Config
    options: Options
    output: Path
    contaminated: collection.Contamination
    card: dict[str, Any]
    screen: Screen


def main(config: Config, options: Options) -> int:
    """Makes one SFT set."""
    if not config.data.train:
        raise UserError(f"config {config.name!r}: data.train is empty; name the problems to collect on")
    output = Path(options.output or Path(config.directory) / "collected").absolute()
    output.mkdir(parents=True, exist_ok=True)
    contaminated, against = collection.contamination(options.decontaminate, config.data.eval, reader_of(config))
    card: dict[str, Any] = {
        "title": f"{options.style} trajectories, {config.data.train}",
        "made": {
            "style": options.style, "problems": config.data.train, "seed": config.seed,
            "decontaminated": ", ".join(against) or "against nothing",
            "evaluation problems": contaminated.texts, "words in a row": collection.NGRAM,
        },
    }  # fmt: skip
    with Screen() as screen:
        samples, counts = STYLES[options.style](Work(config, options, output, contaminated, card, screen))
        kept, more = collection.select(samples, contaminated, size=options.size, seed=config.seed)
        counts |= more
        card |= {
            "trajectories": counts,
            "kept": collection.table(kept),
            "right and readable, before the rest": collection.table(samples),
        }
        collection.write_card(output, card)
        screen.table("trajectories", ["", ""], [[name, str(count)] for name, count in counts.items()])
        if not kept:
            raise UserError(f"{output / 'card.json'}: none of {counts['tries']} trajectories was kept; it says why")
        write_conversations(output / "sft.parquet", [s.conversation for s in kept], [s.columns for s in kept])
        screen.say(f"{len(kept)} conversations: {output / 'sft.parquet'}; counts: {output / 'README.md'}")
    return 0


def choose(work: Work, chat: Any) -> list[Task]:
    """The problems to ask, contaminated ones left out before anybody is paid for them."""
    train = work.config.data.train
    mixture, notes = inputs.training_problems(work.config, chat)
    tasks = list(mixture)[: work.options.limit or None]
    clean = [task for task in tasks if not work.contaminated(collection.problem_of(task))]
    if not clean:
        raise UserError(f"data.train {train}: all {len(tasks)} problems are in an evaluation set; use other ones")
    for note in notes:
        work.screen.say(note)
    work.card["problems"] = {"read": len(tasks), "contaminated": len(tasks) - len(clean), "used": len(clean)}
    work.card["made"]["left out"] = "; ".join(notes) or "nothing"
    return clean


def real(work: Work) -> tuple[list[collection.Sample], dict[str, int]]:
    """A teacher's own trajectories."""
    config, options, url = work.config, work.options, work.options.endpoint
    model = options.endpoint_model if url else options.teacher or str(Path(config.directory) / "export")
    sampling = Sampling(0, config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)
    loop = EventLoop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        journal = Journal(work.output, "journal", teachers.settings(config, model, sampling, "collect", url=url))
        stack.callback(journal.close)
        world = open_world(config)
        stack.callback(lambda: loop.run(world.close()))
        spec = teachers.PlayerSpec(config, work.output, loop, world, journal, sampling, "collect", model=model, url=url)
        teacher = teachers.TEACHERS[teachers.kind_of(config, url)](spec)
        tasks = choose(work, teacher.chat)
        player = teacher.start()
        stack.callback(player.close)
        groups = play_through(
            player.play,
            tasks,
            options.tries,
            player.concurrency,
            loop,
            lambda done, total: work.screen.bar("collect", done, total),
        )
        work.card["made"] |= {"teacher": f"{model} at {url}" if url else model, "tries a problem": options.tries}
        work.card["teacher"] = {**player.counts(), "calls saved by the journal": journal.saved}
    counts: collections.Counter[str] = collections.Counter({name: 0 for name, _ in collection.CHECKS})
    samples = []
    for group in groups:
        for number, trajectory in enumerate(group.trajectories):
            if reason := collection.refusal(trajectory):
                counts[reason] += 1
            else:
                samples.append(collection.sample_of(group.task, trajectory, number, teacher.chat.tools))
    work.card["problems"]["solved"] = sum(any(t.accuracy == 1 for t in group.trajectories) for group in groups)
    return samples, {"tries": len(tasks) * options.tries, **counts}


def stitched(work: Work) -> tuple[list[collection.Sample], dict[str, int]]:
    """The annotated solutions of the problems themselves."""
    tasks = choose(work, teachers.Uncounted([PythonTool.schema]))
    counts, samples = collections.Counter[str](), []
    for task in tasks:
        try:
            samples.append(stitch(task))
        except NotStitchable as error:
            counts[str(error)] += 1
    return samples, {"tries": len(tasks), **counts}


STYLES = {"real": real, "stitched": stitched}


if __name__ == "__main__":
    load, read = command.config_flag(), define(Options)
    command.run(lambda: main(load(), read()))
