"""Runs math-verify in separate processes that can be killed.

math-verify's own timeouts need the main thread and cannot interrupt a long C call; one answer can take minutes or all
memory. Each comparison therefore runs in a worker with a memory limit, which the parent kills after `deadline` seconds.

Why not pebble: its pools start workers through multiprocessing. `fork` copies a process that has JAX's threads and
locks, and `spawn` imports the caller's main module again, and JAX with it (seconds and a GPU per worker). A worker here
is a fresh interpreter that imports this module and nothing of the caller. pebble also has no memory limit, and counts
the import of sympy against the first timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEADLINE = 5.0  # seconds for one comparison
STARTUP = 60.0  # seconds for a worker to import sympy on a busy machine
MEMORY = 2 << 30  # bytes of address space a worker may use
JOBS = 5000  # comparisons before a worker is replaced: sympy's caches only grow
_ROOT = Path(__file__).resolve().parents[2]


class WorkerFailed(Exception):
    """The worker reached no verdict: it ran out of time or memory, or it died. This says nothing about the answer."""


class Undecided(WorkerFailed):
    """The comparison raised an exception; the worker can go on."""


class _Worker:
    def __init__(self, entry: str):
        module, _, function = entry.partition(":")
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import {module}, {__name__} as pool; pool.serve({module}.{function})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C in the terminal is handled by the parent
        )
        self.buffer = b""
        self.jobs = 0
        self.read(STARTUP)

    def read(self, seconds: float) -> Any:
        assert self.process.stdout
        fd, end = self.process.stdout.fileno(), time.monotonic() + seconds
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while b"\n" not in self.buffer:
            left = end - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                raise WorkerFailed(f"no verdict after {seconds:.1f} s")
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                raise WorkerFailed("the worker died")
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def ask(self, job: list[str], deadline: float) -> bool:
        assert self.process.stdin
        self.jobs += 1
        try:
            self.process.stdin.write(json.dumps([deadline, *job]).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as e:
            raise WorkerFailed("the worker died") from e
        answer = self.read(deadline)
        if isinstance(answer, str):
            raise WorkerFailed(answer) if answer.startswith(("MemoryError", "RecursionError")) else Undecided(answer)
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if stream:
                    stream.close()


class Pool:
    """Up to `workers` processes, each started when first needed. Safe to use from many threads.

    Args:
        workers: most processes; None for one per core, at most 4.
        deadline: seconds per comparison, without the wait for a free worker and its start.
        entry: "module:function" that the workers call with strings; it returns a truth value.
    """

    def __init__(self, workers: int | None = None, deadline: float = DEADLINE, entry: str = f"{__name__}:math_verify"):
        self.size = workers or min(4, os.cpu_count() or 1)
        self.deadline, self.entry = deadline, entry
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.size):
            self._free.put(None)

    def ask(self, *job: str) -> bool:
        """Runs one comparison. Raises WorkerFailed where it reached no verdict within the deadline."""
        worker = self._free.get()
        try:
            if worker is None:
                worker = _Worker(self.entry)
            answer = worker.ask(list(job), self.deadline)
            if worker.jobs >= JOBS:
                worker.kill()
                worker = None
            return answer
        except BaseException as e:
            # after an exception inside sympy the worker can go on; after anything else it cannot be trusted
            if worker is not None and not isinstance(e, Undecided):
                worker.kill()
                worker = None
            if isinstance(e, OSError | json.JSONDecodeError):
                raise WorkerFailed(f"the worker could not be used ({e})") from e
            raise
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """Kills the free workers; the pool can be used again."""
        for _ in range(self.size):
            try:
                worker = self._free.get_nowait()
            except queue.Empty:
                return
            if worker is not None:
                worker.kill()
            self._free.queue.insert(0, None)


_shared: tuple[int, Pool] | None = None
_lock = threading.Lock()


def shared() -> Pool:
    """The pool of this process; created at the first call, and again after a fork."""
    global _shared
    with _lock:
        if _shared is None or _shared[0] != os.getpid():
            _shared = (os.getpid(), Pool())
            atexit.register(_shared[1].close)
        return _shared[1]


def serve(answer: Callable[..., bool]) -> None:
    """The worker's loop: reads one JSON list per line, writes one verdict per line (text where there is none)."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # what a library prints is not mistaken for a verdict
    with contextlib.suppress(Exception):
        answer("1", "2")  # imports and first use happen before the clock starts
    out.write(b"true\n")
    for line in sys.stdin.buffer:
        deadline, *job = json.loads(line)
        # If the parent is gone or too busy, the default action of SIGALRM ends even a loop inside C.
        signal.setitimer(signal.ITIMER_REAL, deadline + 1)
        try:
            verdict: bool | str = bool(answer(*job))
        except BaseException as e:
            verdict = f"{type(e).__name__}: {e}"[:200]
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(json.dumps(verdict).encode() + b"\n")


def math_verify(prediction: str, truth: str) -> bool:
    """Whether math-verify finds two LaTeX answers equal, and exact numbers are not merely close. Runs in the worker."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    want = parse(f"\\boxed{{{truth}}}", config, parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]
    try:
        got = parse(f"\\boxed{{{prediction}}}", config, parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]
    except (ArithmeticError, TypeError, ValueError, AttributeError):
        return False  # an answer that means nothing, such as a division by zero
    equal = verify(want, got, timeout_seconds=None, allow_set_relation_comp=True, raise_on_error=True)
    return equal and not (want and got and _apart(got[0], want[0]))


def _apart(got: Any, want: Any) -> bool:
    """Whether two sympy objects are numbers, or hold numbers, that differ by more than the tolerance.

    math-verify rounds to six decimals, for which 2^-98 equals 2^-99. Exact numbers must be equal; a decimal may be off
    by 1e-6, relative and at most absolute, as in `answers`.
    """
    import sympy

    if isinstance(got, sympy.FiniteSet) and isinstance(want, sympy.FiniteSet):
        return any(all(_apart(a, b) for b in want.args) for a in got.args)
    if isinstance(got, sympy.Tuple | sympy.Interval) and type(got) is type(want) and len(got.args) == len(want.args):
        return any(_apart(a, b) for a, b in zip(got.args, want.args, strict=True))
    if not all(isinstance(x, sympy.Expr) and x.is_number for x in (got, want)):
        return False
    size, expected, difference = (abs(sympy.N(x, 30)) for x in (got, want, got - want))
    if not all(x.is_Float or x.is_Integer for x in (size, expected, difference)):
        return False
    if got.has(sympy.Float) or want.has(sympy.Float):
        return bool(difference > 1.000001e-6 * min(1, expected))
    return bool(difference > 1e-25 * max(size, expected))
