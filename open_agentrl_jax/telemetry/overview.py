"""A run in the terminal: held-out metrics, curves as text, stop reasons, the problems with the lowest accuracy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from open_agentrl_jax.telemetry.index import Table, read_metrics
from open_agentrl_jax.telemetry.screen import curve
from open_agentrl_jax.text import printable

SHOWN = ("accuracy/mean", "reward/mean", "tool_calls/mean", "tool_success/mean", "response_length/mean")
CURVES = {
    "sft": ("loss",),
    "rl": (
        "reward/mean",
        "accuracy/mean",
        "actor/entropy",
        "actor/pg_clipfrac",
        "response_length/mean",
        "tool_calls/mean",
    ),
}


def show(directory: Path, console: Console) -> None:
    """Prints an overview of a run.

    Raises:
        UserError: `directory` is no run directory.
    """
    metrics = read_metrics(directory)
    table = Table(directory / "trajectories.jsonl")
    table.update()

    def say(text: str) -> None:
        console.print(Text(printable(text)), soft_wrap=True)

    steps = ", ".join(f"{len(columns['step'])} {phase}" for phase, columns in metrics.items())
    damaged = f"; {table.damaged} damaged lines left out" if table.damaged else ""
    say(f"{directory}  {steps} steps, {len(table)} trajectories{damaged}")
    if evals := metrics.get("eval", {}):
        ends = (f"step {evals['step'][0]}", f"step {evals['step'][-1]}")
        grid = Grid("held-out problems", *ends, title_justify="left")
        for name in SHOWN:
            if name in evals:
                grid.add_row(name, *(_figure(evals[name][i]) for i in (0, -1)))
        console.print(grid)
    curves = Grid("by step", "", box=None, show_header=False)
    curves.columns[1].no_wrap = True
    for phase, names in CURVES.items():
        for name in names:
            found = metrics.get(phase, {}).get(name, ())
            if values := [value for value in found if isinstance(value, int | float)]:
                curves.add_row(f"{phase} {name}", curve(values, width=36))
    if curves.row_count:
        console.print(curves)
    if len(table):
        c, last = table.columns, max(table.columns["step"])
        say("stops: " + ", ".join(f"{stop} {n}" for stop, n in Counter(c["stop"]).most_common()))
        worst = [
            (sum(c["accuracy"][first:end]) / (end - first), end - first, c["phase"][first], c["problem"][first])
            for first, end in table.groups()
            if c["step"][first] == last
        ]
        for accuracy, n, phase, problem in sorted(worst)[:5]:
            say(f"  {phase} {last}: {accuracy:.2f} of {n} right: {problem[:80]}")


def _figure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""
