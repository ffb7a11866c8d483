"""What a person sees of a run: bars on a terminal, a line now and then elsewhere, tables and curves as text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from open_agentrl_jax.telemetry.redact import redact
from open_agentrl_jax.text import printable

QUIET_SECONDS = 15.0  # between two lines where there is no terminal
BLOCKS = "▁▂▃▄▅▆▇█"


class Screen:
    """Progress of the phases of a run."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(soft_wrap=True, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description:>14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._spoke: dict[str, float] = {}

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Prints one line above the bars, without secrets and control characters."""
        self._progress.console.print(printable(redact(text)), highlight=False, markup=False)

    def bar(self, phase: str, done: int, total: int, text: str = "") -> None:
        """Moves the bar of a phase, or says how far it is where there is no terminal."""
        if self.console.is_terminal:
            if phase not in self._tasks:
                self._tasks[phase] = self._progress.add_task(phase, total=total, text=text)
            self._progress.update(self._tasks[phase], completed=done, total=total, text=text)
        elif done == total or time.monotonic() - self._spoke.get(phase, 0.0) > QUIET_SECONDS:
            self._spoke[phase] = time.monotonic()
            self.say(f"{phase:>14} {done}/{total} {text}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of text."""
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        self._progress.console.print(table)


def curve(values: Sequence[float], *, width: int = 60) -> str:
    """A line of block characters, lowest to highest, both ends in figures; means where values outnumber `width`."""
    if not values:
        return "(no values)"
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return f"{means[0]:+.2f} {''.join(BLOCKS[round((m - low) * scale)] for m in means)} {means[-1]:+.2f}"
