"""Shared by both training loops: the parts of a run, stop requests, profiling and step times."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax

from open_agentrl_jax.parallel import processes
from open_agentrl_jax.telemetry.writer import Writer
from open_agentrl_jax.train.checkpoint import Checkpoints, Progress
from open_agentrl_jax.train.state import TrainState


class Interrupted(Exception):
    """A stop was requested: save and exit."""


class Stopper:
    """Turns SIGTERM and the first Ctrl-C into a flag that the loops read between steps and while they wait."""

    def __init__(self, agree: Callable[[bool], bool] = bool):
        """Installs nothing yet.

        Args:
            agree: returns whether the flag is set in any process.
        """
        self._agree, self._signalled = agree, False
        self.asked = False  # whether any process got the signal, as of the last `agree`

    def install(self) -> None:
        """Installs the signal handlers (main thread only)."""
        signal.signal(signal.SIGTERM, self._signal)
        signal.signal(signal.SIGINT, self._signal)

    def check(self) -> None:
        """Raises Interrupted if this process got the signal."""
        if self._signalled:
            raise Interrupted

    def agree(self) -> None:
        """Sets `asked`; all processes call this at the same point."""
        self.asked = self._agree(self._signalled)

    def _signal(self, number: int, _: Any) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nsaving after this step; press Ctrl-C again to stop at once\n")


class Bar(Protocol):
    """Updates a progress bar."""

    def __call__(self, done: int, total: int, text: str) -> None:
        """Shows `done` of `total` steps and a text."""
        ...


@dataclasses.dataclass
class Run:
    """The open parts of one run directory."""

    writer: Writer
    checkpoints: Checkpoints
    stopper: Stopper
    every: int  # steps between checkpoints
    bar: Bar
    mark: Callable[[], None]  # called before every step and after the last

    def save(self, state: TrainState, progress: Progress, *, accuracy: float | None = None) -> None:
        """Saves the state and the progress, with the current lengths of the run's files."""
        offsets: dict[str, int] = {}
        for part in processes.all_values(self.writer.offsets()):  # each process writes files of its own
            offsets |= part
        progress = dataclasses.replace(progress, offsets=offsets)
        self.checkpoints.save(state, progress, accuracy=accuracy)


class Profiler:
    """A `Run.mark` that traces two steps of a phase with jax.profiler, after the first four, which compile."""

    def __init__(self, directory: Path, *, steps: int):
        """Starts nothing yet.

        Args:
            directory: where the trace is written.
            steps: remaining steps of the phase; if there are fewer than six, the last two are traced.
        """
        self._directory, self._marks = directory, 0
        self._first = max(0, min(4, steps - 2))
        self._end = min(self._first + 2, steps)

    def __call__(self) -> None:
        """Starts or stops the trace if this is its step."""
        if self._marks == self._first:
            jax.profiler.start_trace(self._directory)
        if self._marks == self._end:
            jax.profiler.stop_trace()
        self._marks += 1


class Clock:
    """Adds up the wall time of named parts of a step; `time/other` is the remainder."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a block and names it in profiler traces."""
        started = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Returns time/<name> and time/step in seconds, and resets the clock."""
        now = time.perf_counter()
        total = now - self._started
        spent = {f"time/{name}": seconds for name, seconds in self._spent.items()}
        spent |= {"time/other": max(0.0, total - sum(self._spent.values())), "time/step": total}
        self._started, self._spent = now, {}
        return spent


Publish = Callable[[Any, int], None]
