"""Accuracy of a model on an evaluation set, with n samples a problem.

    python -m launch.evaluate --config=configs/quickstart.py --model=runs/quickstart/export --config.eval.samples=8
    python -m launch.evaluate --config=configs/qwen3_4b_grpo_tcr.py --config.data.eval=aime_2025 --tools=false

`data.eval` is a name of data/benchmarks.py (`aime_2024`, `gpqa_diamond`, `livecodebench_v6` ...; `aime_2024=FILE` reads
a local copy) or any file of problems. Writes one JSON (`--output`) and one table. `--tools=false` evaluates without
the tool, and says so wherever a figure stands; `--compare=OTHER.json` tests the difference to another run, problem by
problem. Started again after a kill it goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import command
from launch.command import define, option
from open_agentrl_jax.collect import teachers
from open_agentrl_jax.collect.journal import Journal
from open_agentrl_jax.config import Config
from open_agentrl_jax.evaluation.compare import accuracies, paired
from open_agentrl_jax.evaluation.evaluate import livecodebench, per_problem, report
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.directory import write_atomically
from open_agentrl_jax.run.players import play_through
from open_agentrl_jax.run.world import open_world
from open_agentrl_jax.telemetry.screen import Screen
from open_agentrl_jax.types import Group, Sampling, UserError


@dataclasses.dataclass
class Options:
    """The flags of this command."""

    model: str = option("", "a Hugging Face folder; empty: <run_dir>/export")
    tools: bool = option(True, "show the tools to the model and run its calls")
    output: str = option("", "the JSON; empty: <run_dir>/evaluation.json")
    compare: str = option("", "the JSON of another run on the same problems")


def main(config: Config, options: Options) -> int:
    """Evaluates one model."""
    if not config.data.eval:
        raise UserError(f"config {config.name!r}: data.eval is empty; name the held-out problems")
    directory = Path(config.directory).absolute()
    output = Path(options.output or directory / "evaluation.json").absolute()
    model = options.model or str(directory / "export")
    other = read_figures(options.compare) if options.compare else None
    sampling = Sampling(0, config.eval.temperature, config.eval.top_p)
    loop = EventLoop()
    with contextlib.ExitStack() as stack:
        screen = stack.enter_context(Screen())
        stack.callback(loop.close)
        settings = teachers.settings(config, model, sampling, "evaluate", tools=options.tools)
        journal = Journal(output.parent / "journals", output.stem, settings)
        stack.callback(journal.close)
        world = open_world(config, tools=options.tools)
        stack.callback(lambda: loop.run(world.close()))
        spec = teachers.PlayerSpec(config, directory, loop, world, journal, sampling, "evaluate", model=model)
        teacher = teachers.policy(spec)
        found, notes = inputs.problems(config, config.data.eval, teacher.chat, evaluation=True)
        tasks = list(found)
        for note in notes:
            screen.say(note)
        player = teacher.start()
        stack.callback(player.close)
        groups = play_through(
            player.play,
            tasks,
            config.eval.samples,
            player.concurrency,
            loop,
            lambda done, total: screen.bar("evaluate", done, total),
        )
        if journal.found:
            total = len(tasks) * config.eval.samples
            screen.say(f"{journal.found} of {total} episodes were there already: {journal.path}")
        if all(t.aborted for group in groups for t in group.trajectories):
            raise UserError(all_aborted(groups))
        figures = {
            "model": model,
            "data": config.data.eval,
            "mode": "agentic" if options.tools else "tool-free",
            "sampling": {"temperature": config.eval.temperature, "top_p": config.eval.top_p, "n": config.eval.samples},
            "left out": notes,
            **report(groups),
            "problems": per_problem(groups),
        }
        if other is not None:
            figures["comparison"] = {"with": options.compare, **compare(options.compare, other, figures)}
        write(output, figures, groups)
        show(screen, figures, other)
        screen.say(f"all figures: {output}")
    return 0


def all_aborted(groups: Sequence[Group]) -> str:
    """The message where no episode was graded, with the most frequent reason."""
    trajectories = [t for group in groups for t in group.trajectories]
    late = sum(bool(t.metrics.get("timed_out")) for t in trajectories)
    faults = [t.error.strip().splitlines()[-1] for t in trajectories if t.error]
    if faults:
        reason = f"{len(faults)} ended by an error in a tool, grader or environment, the first: {faults[0]}"
    elif late:
        reason = f"{late} ran out of time: raise agent.seconds"
    else:
        reason = "engine, sandbox or grader failed each of them"
    return f"none of {len(trajectories)} episodes was graded ({reason})"


def read_figures(path: str) -> dict[str, Any]:
    """An evaluation's JSON. Raises UserError for anything else."""
    try:
        figures = json.loads(Path(path).read_text())
        accuracies(figures)
        return {name: figures[name] for name in ("model", "data", "mode", "sampling", "accuracy", "problems")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--compare={path}: {type(error).__name__} {error}; give the JSON that launch.evaluate wrote"
        ) from error


def compare(path: str, other: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """The paired test against another run. Raises UserError where no problem is in both."""
    try:
        test = paired(accuracies(other), accuracies(figures))
    except ValueError as error:
        raise UserError(f"--compare={path}: {error}; compare runs on the same data") from error
    return {"model": other["model"], "mode": other["mode"], "sampling": other["sampling"], **test}


def write(output: Path, figures: dict[str, Any], groups: Sequence[Group]) -> None:
    """The JSON, and beside it LiveCodeBench's own where its problems are among them."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(figures, indent=1))
    if programs := livecodebench(groups):
        write_atomically(output.with_suffix(".livecodebench.json"), json.dumps(programs, indent=1))


def show(screen: Screen, figures: dict[str, Any], other: dict[str, Any] | None) -> None:
    """The table, a line about the tool, and the comparison."""

    def cell(table: dict[str, Any], name: str) -> list[str]:
        v = table.get(name)
        return [f"{v['value']:.3f}", f"{v['low']:.3f} .. {v['high']:.3f}"] if v else ["-", "-"]

    mine, theirs = figures["accuracy"], other["accuracy"] if other else {}
    columns = ["", "value", "95 % interval"] + (["other", "95 % interval"] if other else [])
    rows = [
        [name, *cell(mine, name), *(cell(theirs, name) if other else [])]
        for name in mine
        if not name.startswith("bootstrap")
    ]
    screen.table(f"{figures['data']}, {figures['mode']}", columns, rows)
    tools, episodes = figures["tools"], figures["episodes"]
    screen.say(
        f"{episodes['all'] - episodes['aborted']} of {episodes['all']} episodes graded, {episodes['aborted']} aborted"
    )
    screen.say(
        f"{figures['mode']}: {tools['calls_a_response']:.2f} calls per response, {tools['calls_succeeded']:.0%} "
        f"succeeded, {tools['responses_without_call']:.0%} of the responses made none"
    )
    if test := figures.get("comparison"):
        screen.say(
            f"minus {test['with']} ({test['mode']}): {test['difference']:+.3f}, 95 % {test['low']:+.3f} .. "
            f"{test['high']:+.3f}, p = {test['p_value']:.3g} on {test['problems']} problems "
            f"({test['better']} better, {test['worse']} worse)"
        )


if __name__ == "__main__":
    load, read = command.config_flag(), define(Options)
    command.run(lambda: main(load(), read()))
