"""A persistent Python session of the embedded executor: one isolated child runs many cells and keeps its variables."""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import os
import signal
import socket
from typing import TYPE_CHECKING, Any, Self

from open_agentrl_jax.sandbox import child
from open_agentrl_jax.sandbox.output import Stream
from open_agentrl_jax.sandbox.result import FLOOD, KEPT, LEAST_OUTPUT, Result

if TYPE_CHECKING:
    from open_agentrl_jax.sandbox.executor import Embedded

LIFETIME = 7200.0  # seconds after which the fork server kills a session, and its limit of CPU time
INTERRUPTED = 1.0  # seconds that a cell has to end after it was interrupted
ANSWER = 10.0  # seconds for what only the sandbox's own code does


class Session:
    """Runs cells in one process: `async with sandbox.session() as session: await session.run(code)`.

    The process starts with the first cell. A cell that runs into its time limit is interrupted (KeyboardInterrupt), so
    that variables survive; if it does not end within a second it is killed. Whatever ends the process loses the
    variables: the next cell starts a new one, and `restarts` counts that. Cells of one session run one after another.

    Args:
        sandbox: the executor.
        memory_mb: MiB of address space for the session beyond what a fresh Python has.
    """

    def __init__(self, sandbox: Embedded, *, memory_mb: int = 2048):
        self.sandbox, self.memory_mb = sandbox, memory_mb
        self.restarts = -1
        self._order = asyncio.Lock()
        self._process: _Process | None = None

    @property
    def alive(self) -> bool:
        """Whether a process holds the variables of the last cell."""
        return self._process is not None

    async def run(self, code: str, *, timeout: float = 30.0, max_output: int = KEPT) -> Result:
        """Runs one cell; see `Sandbox.run`.

        Returns:
            Its result. `return_code` is 0, 1 after an exception, the code of `sys.exit`, -SIGINT where the cell was
            interrupted, or the code of the process where that ended.
        """
        if not 0 < timeout <= LIFETIME:
            return Result("refused", None, "", f"timeout: seconds up to {LIFETIME:g}, not {timeout}", 0.0)
        if not LEAST_OUTPUT <= max_output <= FLOOD:
            return Result("refused", None, "", f"max_output: {LEAST_OUTPUT} to {FLOOD} bytes, not {max_output}", 0.0)
        return await self.sandbox.here(self._run(code, timeout, max_output))

    async def close(self) -> None:
        """Kills the process; a second call does nothing."""
        if self._process is not None:
            await self.sandbox.here(self._end())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _end(self) -> None:
        self.sandbox.sessions.discard(self)
        if self._process is not None:
            self._process.end()
            self._process = None
            self.sandbox.open_sessions.release()

    async def _run(self, code: str, timeout: float, max_output: int) -> Result:
        async with self._order:
            if self._process is None:
                await self.sandbox.open_sessions.acquire()
            async with self.sandbox.turns:
                kept = False
                try:
                    if self._process is None:
                        self._process = await self.sandbox.start_session(code, self.memory_mb)
                        self.restarts += 1
                        self.sandbox.sessions.add(self)
                    result, kept = await self._process.cell(code, timeout, max_output)
                except (OSError, TimeoutError) as error:
                    result = Result("infrastructure", None, "", f"{type(error).__name__}: {error}", 0.0)
                finally:  # a cancelled caller ends the process too: nobody knows where its cell stands
                    if not kept:
                        if self._process is None:
                            self.sandbox.open_sessions.release()
                        await self._end()
            self.sandbox.counts["runs"] += 1
            self.sandbox.counts[result.status] += 1
            return result


class _Process:
    """The child of a session."""

    def __init__(self, server: Any, pid: int, channel: socket.socket, pipes: list[int], memory_mb: int):
        self.server, self.pid, self.channel, self.pipes, self.memory_mb = server, pid, channel, pipes, memory_mb
        self.loop = asyncio.get_running_loop()
        self.ended = server.ends[pid]

    async def hello(self) -> None:
        """Waits until the child is isolated.

        Raises:
            OSError: it could not be.
        """
        letter = await asyncio.wait_for(self.loop.sock_recv(self.channel, 4096), ANSWER)
        if letter != b"k":
            raise OSError(f"a child could not be isolated: {letter[1:].decode('utf-8', 'replace') or 'it ended early'}")

    async def cell(self, code: str, timeout: float, max_output: int) -> tuple[Result, bool]:
        """Runs one cell; returns its result and whether the process lives on."""
        flooded = asyncio.Event()

        def flood() -> None:
            if not flooded.is_set():
                flooded.set()
                self.server.send(kill=self.pid)

        streams = [Stream(pipe, flood, limit) for pipe, limit in zip(self.pipes, (max_output, KEPT), strict=True)]
        for stream in streams:
            self.loop.add_reader(stream.descriptor, self._take, stream)
        started = self.loop.time()
        try:
            body = marshal.dumps(code.encode("utf-8", "surrogatepass"))
            with contextlib.suppress(OSError):  # the process may have ended between two cells
                await asyncio.wait_for(self.loop.sock_sendall(self.channel, child.HEAD.pack(len(body)) + body), ANSWER)
            answer, late = await self._answer(timeout)
        finally:
            for stream in streams:
                self.loop.remove_reader(stream.descriptor)
        seconds = self.loop.time() - started
        lives = len(answer) == 2 and answer[:1] in b"emi"
        report = {} if lives else await self._report()
        for stream in streams:
            while stream.size <= 2 * FLOOD and stream.read():
                pass
        code_ = report.get("code", answer[1] if lives else None)
        status = "timeout" if late else "finished"
        if flooded.is_set():
            status = "finished"
        elif answer[:1] == b"m" and lives:
            status = "memory"
        elif not lives and not late and code_ == -signal.SIGKILL:
            status = "memory" if report["memory"] * 1024 > 0.9 * self.memory_mb * 2**20 else "finished"
        if late and lives:
            code_ = -signal.SIGINT
        out, err = (stream.kept().decode("utf-8", "replace") for stream in streams)
        if flooded.is_set():
            err += f"\nStopped: it wrote more than {FLOOD // 2**20} MiB to a standard stream.\n"
        return Result(status, code_, out, err, seconds, truncated=streams[0].size > max_output), lives

    async def _answer(self, timeout: float) -> tuple[bytes, bool]:
        """The child's two bytes, b"" where it ended; and whether the time ran out."""
        for patience, late, order in ((timeout, False, "interrupt"), (INTERRUPTED, True, "kill")):
            try:
                return await asyncio.wait_for(self._receive(), patience), late
            except TimeoutError:
                self.server.send(**{order: self.pid})
        return b"", True

    async def _receive(self) -> bytes:
        try:
            return await self.loop.sock_recv(self.channel, 2)
        except OSError:
            return b""

    async def _report(self) -> dict[str, Any]:
        self.server.send(kill=self.pid)  # one that closed its channel has ended as a session
        return await asyncio.wait_for(asyncio.shield(self.ended), ANSWER)

    def _take(self, stream: Any) -> None:
        if stream.read() == b"":
            self.loop.remove_reader(stream.descriptor)

    def end(self) -> None:
        """Kills the child and closes what leads to it."""
        if self.server.ends.pop(self.pid, None) is not None:
            self.server.send(kill=self.pid)
        for pipe in self.pipes:
            os.close(pipe)
        self.channel.close()
