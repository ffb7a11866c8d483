"""Collects the SFT set: right tool-use trajectories of a teacher.

    python -m launch.collect --config=configs/quickstart.py --teacher=runs/quickstart/export --tries=4
    python -m launch.collect --config=configs/qwen3_4b_grpo_tcr.py --config.data.problems=gsm8k_train.jsonl \\
        --endpoint=https://host/v1 --endpoint_model=NAME          # OPENAI_API_KEY holds the key

The teacher is a Hugging Face folder on the embedded engine, SGLang servers (`--config.rollout.engine=sglang`) or an
OpenAI-compatible endpoint; agent loop, sandbox and grader are those of training. `--style=stitched` needs no teacher:
it turns the calculator annotations of GSM8K's solutions into tool calls, the paper's synthetic baseline.
Writes sft.parquet, card.json and README.md to `--output`. Run again after a kill, it continues.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from launch import command
from launch.command import define, option
from open_agentrl_jax.collect import collection
from open_agentrl_jax.collect.gathering import STYLES, Gathering
from open_agentrl_jax.config import Config
from open_agentrl_jax.data.conversations import write_conversations
from open_agentrl_jax.run.world import reader_of
from open_agentrl_jax.telemetry.screen import Screen
from open_agentrl_jax.types import UserError


@dataclasses.dataclass
class Options:
    """The flags of this command."""

    teacher: str = option("", "a Hugging Face folder or Hub id; empty: <run_dir>/export")
    endpoint: str = option("", "base URL of an OpenAI-compatible server, in place of --teacher")
    endpoint_model: str = option("", "the model's name on the endpoint")
    style: str = option("real", "source: a teacher or annotated solutions", choices=["real", "stitched"])
    tries: int = option(4, "trajectories per problem", lower_bound=1)
    limit: int = option(0, "use only the first problems; 0: all", lower_bound=0)
    size: int = option(0, "keep at most so many, balanced by source and number of calls; 0: all", lower_bound=0)
    decontaminate: str = option(
        "data.eval", "evaluation sets (names or paths, with commas) that nothing kept may share 13 words with"
    )
    output: str = option("", "folder of the data set; empty: <run_dir>/collected")


def main(config: Config, options: Options) -> int:
    """Collects one SFT set."""
    if not config.data.problems:
        raise UserError(f"config {config.name!r}: data.train is empty; name the problems to collect on")
    output = Path(options.output or Path(config.directory) / "collected").absolute()
    output.mkdir(parents=True, exist_ok=True)
    contaminated, against = collection.contamination(options.decontaminate, config.data.eval, reader_of(config))
    card: dict[str, Any] = {
        "title": f"{options.style} trajectories, {config.data.problems}",
        "made": {
            "style": options.style, "problems": config.data.problems, "seed": config.seed,
            "decontaminated": ", ".join(against) or "against nothing",
            "evaluation problems": contaminated.texts, "words in a row": collection.NGRAM,
        },
    }  # fmt: skip
    url = options.endpoint
    if url and not options.endpoint_model:
        raise UserError("--endpoint_model is missing; give the model's name on the endpoint")
    model = options.endpoint_model if url else options.teacher or str(Path(config.directory) / "export")
    with Screen() as screen:
        gathering = Gathering(
            config, output, contaminated, card, screen, model=model, url=url, tries=options.tries, limit=options.limit
        )
        samples, counts = STYLES[options.style](gathering)
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
            raise UserError(f"{output / 'card.json'}: none of {counts['tries']} trajectories was kept; it counts why")
        write_conversations(output / "sft.parquet", [s.conversation for s in kept], [s.columns for s in kept])
        screen.say(f"{len(kept)} conversations: {output / 'sft.parquet'}; counts: {output / 'README.md'}")
    return 0


if __name__ == "__main__":
    load, read = command.config_flag(), define(Options)
    command.run(lambda: main(load(), read()))
