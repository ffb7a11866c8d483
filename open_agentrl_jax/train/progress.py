"""What both loops share: the parts of a run, and when to stop."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax

from open_agentrl_jax.telemetry.writer import Writer
from open_agentrl_jax.train.checkpoint import Checkpoints, Progress
from open_agentrl_jax.train.state import TrainState


class Interrupted(Exception):
    """SIGTERM came: save and leave."""


class Stopper:
    """Turns SIGTERM into a question that the loops ask between two steps and while they wait."""

    def __init__(self, agree: Callable[[bool], bool] = bool):
        """Does nothing yet.

        Args:
            agree: of several processes, makes the signal to one the signal to all.
        """
        self._agree, self._signalled = agree, False
        self.asked = False  # as agreed

    def install(self) -> None:
        """Takes the signal over (main thread only)."""
        signal.signal(signal.SIGTERM, self._signal)

    def check(self) -> None:
        """Raises Interrupted once the signal has come to this process."""
        if self._signalled:
            raise Interrupted

    def agree(self) -> None:
        """Sets `asked`; all processes call it at the same point."""
        self.asked = self._agree(self._signalled)

    def _signal(self, *_: Any) -> None:
        self._signalled = True


class Bar(Protocol):
    """A progress bar's line."""

    def __call__(self, done: int, total: int, text: str) -> None:
        """`done` of `total` steps."""
        ...


@dataclasses.dataclass
class Run:
    """The running parts of one run directory, as both loops see them."""

    writer: Writer
    checkpoints: Checkpoints
    stopper: Stopper
    every: int  # steps between checkpoints
    bar: Bar
    mark: Callable[[], None]  # called before every step, and after the last
    first_number: int = 0  # of the phase's checkpoints: those of the phases before come first

    def save(self, state: TrainState, progress: Progress, *, accuracy: float | None = None) -> None:
        """Checkpoints the state with the progress and the present lengths of the run's files."""
        progress = dataclasses.replace(progress, offsets=self.writer.offsets())
        self.checkpoints.save(self.first_number + progress.step, state, progress, accuracy=accuracy)


class Profiler:
    """What `Run.mark` is for a trace of jax.profiler: two steps of a phase, after the four that compile."""

    def __init__(self, directory: Path, *, steps: int):
        """Does nothing yet.

        Args:
            directory: the trace is written below it.
            steps: that are left of the phase; where they are few, the last two are traced.
        """
        self._directory, self._marks = directory, 0
        self._first = max(0, min(4, steps - 2))
        self._end = min(self._first + 2, steps)

    def __call__(self) -> None:
        """Begins or ends the trace where it is time to."""
        if self._marks == self._first:
            jax.profiler.start_trace(self._directory)
        if self._marks == self._end:
            jax.profiler.stop_trace()
        self._marks += 1


class Clock:
    """Adds up named wall times of a step; `idle` is what no name claims."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a block, which has this name in a trace, too."""
        started = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """time/<name> in seconds and time/step, and starts again."""
        now = time.perf_counter()
        total = now - self._started
        spent = {f"time/{name}": seconds for name, seconds in self._spent.items()}
        spent |= {"time/other": max(0.0, total - sum(self._spent.values())), "time/step": total}
        self._started, self._spent = now, {}
        return spent


Publish = Callable[[Any, int], None]
