"""The result of a run, and the protocol of a sandbox."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Protocol, Self

KEPT = 65_536  # bytes of a stream that are returned by default
FLOOD = 16 * 2**20  # bytes of a stream after which a program is stopped
LEAST_OUTPUT = 1024


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a program.

    `status`: "finished" (it ended, with any return code, or was stopped for flooding its output) | "timeout" |
    "memory" | "refused" (an invalid request) | "infrastructure" (a fault of sandbox or network, never of the program).
    `return_code` is negative if a signal ended the program, None if it never ran. `seconds` is wall time. `files` are
    the requested files that exist. `truncated` is True if stdout was longer than `max_output` and lost its middle.
    """

    status: str
    return_code: int | None
    stdout: str
    stderr: str
    seconds: float
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    truncated: bool = False


def head_and_tail(text: bytes, limit: int, size: int | None = None) -> bytes:
    """Cuts the middle out of text so that at most `limit` bytes are left, a note of what is missing included.

    Args:
        text: the text, or its head and tail where the middle is already gone.
        limit: bytes, at least LEAST_OUTPUT.
        size: bytes of the whole text where `text` is not all of it.
    """
    size = len(text) if size is None else size
    if size <= limit:
        return text
    half = limit // 2 - 32
    note = f"\n[... {size - 2 * half} bytes left out ...]\n".encode()
    return text[:half] + note + text[-half:]


def out_of_memory(stderr: str) -> bool:
    """Whether a traceback ends in a MemoryError, including numpy's own."""
    return bool(re.match(r"([\w.]+\.)?_?(Array)?MemoryError\b", stderr.rstrip().rpartition("\n")[2]))


class Session(Protocol):
    """Runs cells in one process that keeps its variables: `async with sandbox.session() as session`."""

    @property
    def alive(self) -> bool:
        """Whether a process holds the variables of the last cell."""
        ...

    async def run(self, code: str, *, timeout: float = 30.0, max_output: int = KEPT) -> Result:
        """Runs one cell; variables of earlier cells are there."""
        ...

    async def close(self) -> None:
        """Kills the process."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...


class Sandbox(Protocol):
    """Runs programs; usable from any event loop, and from several at once."""

    @property
    def metadata(self) -> dict[str, Any]:
        """Level and plan, or servers, and counts of outcomes: for the run's records."""
        ...

    async def run(
        self,
        code: str,
        *,
        stdin: str = "",
        timeout: float = 30.0,
        memory_mb: int = 2048,
        max_output: int = KEPT,
        files: dict[str, bytes] | None = None,
        fetch: tuple[str, ...] = (),
    ) -> Result:
        """Runs one program in a fresh process.

        Args:
            code: the program, run as `python main.py` would.
            stdin: its standard input.
            timeout: seconds of wall time.
            memory_mb: MiB of address space beyond what a fresh Python has.
            max_output: bytes of stdout to return, LEAST_OUTPUT to FLOOD; a longer stdout loses its middle. Of stderr
                KEPT bytes are returned.
            files: files to write to its directory before it starts, by relative path.
            fetch: files to return when it ends, however it ends.
        """
        ...

    def session(self, *, memory_mb: int = 2048) -> Session:
        """Returns a persistent Python session.

        Raises:
            UserError: this sandbox keeps no state between runs.
        """
        ...

    async def close(self) -> None:
        """Ends what is running and frees all resources."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...
