"""One way to time, repeat, pair, print and save, for every benchmark.

Sides are timed in turn, round by round, so that all of them meet the same machine load; the first round of each only
warms up. A benchmark adds its rows to a Report, which prints them as they come and writes all of them with --out.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.command import Parser

GIB = 2**30


def parser(name: str, description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The command's parser with --rounds and --out."""
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
    made = Parser(prog=f"launch.benchmark {name}", description=description, formatter_class=layout)
    made.add_argument("--rounds", type=int, default=rounds, help="measured rounds; figures are medians over them")
    made.add_argument("--out", default="", help="also write the rows to this JSON file")
    return made


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turn(sides: Mapping[str, Callable[[], float]], rounds: int, *, warmup: int = 1) -> dict[str, list[float]]:
    """Calls every side once per round; returns each side's values without the warm-up rounds."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warmup + rounds):
        for name, side in sides.items():
            values[name].append(side())
    return {name: kept[warmup:] for name, kept in values.items()}


def timed(run: Callable[[], Any], rounds: int, *, warmup: int = 2) -> dict[str, float]:
    """Median, lowest and highest seconds of a call."""
    return spread(in_turn({"": lambda: seconds(run)}, rounds, warmup=warmup)[""])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Seconds as columns: median, lowest, highest."""
    return {"seconds": statistics.median(values), "lowest": min(values), "highest": max(values)}


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each column, of rows that are dictionaries with equal keys."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


class Report:
    """Rows of one benchmark; a header is printed when the columns change."""

    def __init__(self, name: str, arguments: Sequence[str]):
        """Keeps the command for the file; prints nothing yet."""
        self.rows: list[dict[str, Any]] = []
        self.facts = {"command": [name, *arguments], "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
        self._columns: tuple[str, ...] = ()

    def add(self, **row: Any) -> dict[str, Any]:
        """Prints and keeps a row. Keyword names are column names; use `**{...}` for names with spaces."""
        if tuple(row) != self._columns:
            self._columns = tuple(row)
            print("  ".join(f"{name:>{_width(name)}}" for name in row))
        print("  ".join(f"{_cell(value):>{_width(name)}}" for name, value in row.items()), flush=True)
        self.rows.append(row)
        return row

    def save(self, path: str) -> None:
        """Writes rows and facts as JSON; does nothing without a path."""
        if path:
            Path(path).write_text(json.dumps(self.facts | {"rows": self.rows}, indent=1) + "\n")


def _width(name: str) -> int:
    return max(len(name), 10)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def in_process(module: str, arguments: Sequence[str], *, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows that `python -m module --worker ARGUMENTS` prints as its last line; a failed process is a row that says why.

    A side that needs a whole GPU runs in a process of its own. The last argument is the workload and not shown.
    """
    command = [sys.executable, "-m", module, "--worker", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        print("\n".join(lines[-30:]), file=sys.stderr, flush=True)
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)] or lines
        return [{"side": f"{module.rpartition('.')[2]} {' '.join(arguments[:-1])}", "failed": errors[-1][:300]}]
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def workers(commands: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Callable[[], float]]]:
    """Processes that each keep a compiled side (see `serve`), as callables that run it once and return its seconds.

    Raises:
      RuntimeError: a process ended instead of getting ready.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    started = {name: subprocess.Popen(command, **pipes) for name, command in commands.items()}

    def side(process: Any) -> float:
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    try:
        for name, process in started.items():
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{name} did not start; its error is above")
        yield {name: functools.partial(side, process) for name, process in started.items()}
    finally:
        for process in started.values():
            with process:  # closes the pipes, which ends the process, and waits for it
                pass


def serve(run: Callable[[], Any]) -> None:
    """The other end of `workers`: warms up, prints "ready", then runs once per input line and prints the seconds."""
    for _ in range(2):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(seconds(run), flush=True)
