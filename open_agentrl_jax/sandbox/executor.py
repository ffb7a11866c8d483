"""The embedded executor: keeps fork servers, queues runs in order, sends code and reads output.

It runs in one thread with its own event loop, which any number of loops may call. Its process never forks: fork servers
are started by exec.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import marshal
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from open_agentrl_jax.sandbox import child, fetching, forkserver, isolation
from open_agentrl_jax.sandbox.background import Background
from open_agentrl_jax.sandbox.output import Stream
from open_agentrl_jax.sandbox.result import FLOOD, KEPT, LEAST_OUTPUT, Result
from open_agentrl_jax.sandbox.session import LIFETIME, Session, _Process

FOLDER = str(pathlib.Path(__file__).parent)
STARTING = 120.0  # seconds that a fork server may take to warm
PATIENCE = 120.0  # seconds to wait for a child where the kernel has no room for a process
SLACK = 10.0  # seconds after a time limit until a fork server that reports no end counts as dead
HEAVY = re.compile(r"\b(numpy|sympy|scipy)\b")
LONGEST_SCAN = 65_536  # characters; a longer program may import in the child
SESSIONS = 384  # persistent sessions alive at once; further ones wait. A fork server has isolation.IDS user ids
LONGEST = 1e7  # seconds of a time limit; one that a clock cannot represent would end the fork server
LARGEST_MB = 1 << 20  # MiB; a larger memory limit has no effect


class Died(Exception):
    """A fork server ended during a run."""


def tier_of(code: str) -> str:
    """Returns the smallest tier that has what a program imports, according to its syntax tree."""
    if len(code) > LONGEST_SCAN or not HEAVY.search(code):  # most programs need no parse
        return "bare"
    packages = {name.split(".")[0] for name in child.imported(code)}
    return next((tier for tier in ("scipy", "sympy", "numpy") if tier in packages), "bare")


class ForkServer:
    """One running fork server, as the executor sees it."""

    def __init__(self, process: subprocess.Popen, control: socket.socket, world: dict[str, Any]):
        self.process, self.control, self.world = process, control, world
        self.ready: collections.deque[tuple[int, socket.socket]] = collections.deque()
        self.waiting: collections.deque[asyncio.Future] = collections.deque()
        self.ends: dict[int, asyncio.Future] = {}
        self.dead = False

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts reading its reports."""
        self.loop = loop
        loop.add_reader(self.control, self._hear)

    def _hear(self) -> None:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self.control, forkserver.PACKET, 1)
        except OSError:
            packet, descriptors = b"", []
        if not packet:
            self.end()
            return
        report = json.loads(packet)
        if "ready" in report:
            channel = socket.socket(fileno=descriptors[0])
            channel.setblocking(False)
            while self.waiting:
                if not (future := self.waiting.popleft()).done():
                    future.set_result((report["ready"], channel))
                    return
            self.ready.append((report["ready"], channel))
        elif (future := self.ends.pop(report["exit"], None)) is not None and not future.done():
            future.set_result(report)

    def send(self, **order: Any) -> None:
        """Sends an order, later if the socket is full; a dead server is noticed when it reports nothing."""
        try:
            self.control.send(json.dumps(order).encode())
        except BlockingIOError:
            self.loop.call_later(0.01, lambda: self.send(**order))
        except OSError:
            pass

    async def take(self) -> tuple[int, socket.socket]:
        """Returns a fresh child, and orders the next one ahead of need."""
        if self.dead:
            raise Died
        self.send(fork=1)
        if self.ready:
            return self.ready.popleft()
        future = self.loop.create_future()
        self.waiting.append(future)
        return await future

    def end(self) -> None:
        """Closes the socket, which ends the server and all of its children."""
        if self.dead:
            return
        self.dead = True
        self.loop.remove_reader(self.control)
        self.control.close()
        for future in [*self.waiting, *self.ends.values()]:
            if not future.done():
                future.set_exception(Died())
        while self.ready:
            self.ready.popleft()[1].close()

    def reap(self) -> None:
        """Waits for its process and kills it after 5 seconds."""
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def search_path() -> list[str]:
    """Directories that programs import third-party modules from: site-packages, nothing of the caller's project."""
    return [path for path in sys.path if pathlib.PurePath(path).name in ("site-packages", "dist-packages")]


def start(plan: isolation.Plan, tier: str) -> ForkServer:
    """Starts a fork server and waits until it is warm.

    Raises:
        OSError: it could not start under this plan.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-S", "-s", "-P", "-B", "-c", forkserver.BOOT, FOLDER, str(there.fileno())]
    with there:
        process = subprocess.Popen(
            command,
            env=forkserver.ENVIRONMENT,
            cwd="/",
            pass_fds=[there.fileno()],
            start_new_session=True,  # Ctrl-C in the trainer must not reach it
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        here.settimeout(STARTING)
        here.send(json.dumps({"plan": dataclasses.asdict(plan), "tier": tier, "search": search_path()}).encode())
        answer = here.recv(forkserver.PACKET)
        told: dict[str, Any] = json.loads(answer) if answer else {"failed": "the fork server ended while it started"}
        if "failed" in told:
            raise OSError(told["failed"])
    except BaseException:
        here.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()
        raise
    here.setblocking(False)
    return ForkServer(process, here, told["world"])


@dataclasses.dataclass(frozen=True)
class Request:
    """One program and its limits."""

    code: str
    stdin: str
    timeout: float
    memory_mb: int
    max_output: int
    files: dict[str, bytes]
    fetch: tuple[str, ...]
    session: bool = False  # the child waits for cells instead of running `code`

    def fault(self) -> str:
        """The reason to refuse it; "" if it is valid."""
        if not self.timeout <= LONGEST:  # NaN is neither less nor more
            return f"timeout: seconds up to {LONGEST:g}, not {self.timeout}"
        if not self.memory_mb >= 1:
            return f"memory_mb: 1 MiB at least, not {self.memory_mb}"
        if not LEAST_OUTPUT <= self.max_output <= FLOOD:
            return f"max_output: {LEAST_OUTPUT} to {FLOOD} bytes, not {self.max_output}"
        if len(self.fetch) > isolation.INODES:
            return f"fetch: {isolation.INODES} files at most, not {len(self.fetch)}"
        if any(name.count("/") > fetching.DEEPEST for name in self.fetch):
            return f"fetch: a path at most {fetching.DEEPEST} directories deep"
        return ""

    def packed(self) -> bytes:
        """Serialises it for `child.receive`."""
        body = marshal.dumps(
            {
                "code": self.code.encode("utf-8", "surrogatepass"),
                "stdin": self.stdin.encode("utf-8", "surrogatepass"),
                "timeout": float(self.timeout),
                "memory_mb": int(min(self.memory_mb, LARGEST_MB)),
                "files": {name: bytes(content) for name, content in self.files.items()},
                "fetch": bool(self.fetch),
                "session": self.session,
            }
        )
        return child.HEAD.pack(len(body)) + body


class Embedded(Background):
    """The embedded executor under one plan of isolation.

    Args:
        plan: how to isolate; `probes.survey` finds the strongest one that holds.
        max_active: runs at once; 0: twice the cores.
    """

    def __init__(self, plan: isolation.Plan, *, max_active: int = 0):
        super().__init__()
        self.plan = plan
        self.max_active = max_active or 2 * len(os.sched_getaffinity(0))
        self.counts: collections.Counter[str] = collections.Counter()
        self.metadata_extra: dict[str, Any] = {}
        self._servers: dict[str, asyncio.Task[ForkServer]] = {}
        self.turns = asyncio.Semaphore(self.max_active)
        self.sessions: set[Session] = set()  # those that have a process
        self.open_sessions = asyncio.Semaphore(SESSIONS)

    @property
    def metadata(self) -> dict[str, Any]:
        """Level, plan and counts, for the run's records."""
        return {
            "kind": "embedded",
            "level": self.plan.level,
            "plan": self.plan.name,
            "unsafe_no_isolation": self.plan.level == "C",
            "max_active": self.max_active,
            **self.metadata_extra,
            **self.counts,
        }

    async def run(
        self,
        code: str,
        *,
        stdin: str = "",
        timeout: float = 30.0,
        memory_mb: int = 2048,
        max_output: int = KEPT,
        files: dict[str, bytes] | None = None,
        fetch: Sequence[str] = (),
    ) -> Result:
        """Runs one program; see `Sandbox.run`."""
        request = Request(code, stdin, timeout, memory_mb, max_output, files or {}, tuple(fetch))
        if fault := request.fault():
            return Result("refused", None, "", fault, 0.0)
        return await self.here(self._run(request))

    def session(self, *, memory_mb: int = 2048) -> Session:
        """Returns a persistent session, to be closed: `async with sandbox.session() as session`."""
        return Session(self, memory_mb=memory_mb)

    async def start_session(self, code: str, memory_mb: int) -> _Process:
        """Starts the child of a session whose first cell is `code`; called by `Session` in this loop.

        Raises:
            OSError, TimeoutError: no child could be isolated.
        """
        tier = "scipy" if self.plan.chroot else tier_of(code)  # in an empty root nothing can be imported later
        request = Request(code if self.plan.chroot else "", "", LIFETIME, memory_mb, KEPT, {}, (), session=True)
        try:
            server = await self._server(tier)
            pid, channel = await asyncio.wait_for(server.take(), PATIENCE)
        except Died as error:
            raise OSError("the fork server ended") from error
        server.ends[pid] = self.loop.create_future()
        server.ends[pid].add_done_callback(lambda future: future.cancelled() or future.exception())
        pipes = [os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) for _ in range(2)]
        process = _Process(server, pid, channel, [read for read, _ in pipes], memory_mb)
        try:
            server.send(start=pid, timeout=LIFETIME)
            await self._hand_over(channel, request.packed(), [write for _, write in pipes])
            await process.hello()
        except BaseException:
            process.end()
            raise
        return process

    async def _release(self) -> None:
        for session in list(self.sessions):
            await session._end()
        servers = [task.result() for task in self._servers.values() if _alive(task)]
        for server in servers:
            server.end()
        self._servers.clear()
        await asyncio.gather(*(asyncio.to_thread(server.reap) for server in servers))

    async def _run(self, request: Request) -> Result:
        self.counts["runs"] += 1
        async with self.turns:
            tier = tier_of(request.code)
            reason = ""
            for attempt in range(2):
                self.counts["retries"] += attempt
                try:
                    return await self._once(tier, request)
                except (Died, OSError, TimeoutError) as error:
                    reason = f"{type(error).__name__}: {error}"
            self.counts["infrastructure"] += 1
            return Result("infrastructure", None, "", reason, 0.0)

    async def _server(self, tier: str) -> ForkServer:
        """Returns the fork server of a tier; starts or restarts it if needed."""
        task = self._servers.get(tier)
        if task is None or (task.done() and not _alive(task)):
            if task is not None:
                self.counts["fork_servers_restarted"] += 1
            task = self._servers[tier] = self.loop.create_task(self._start(tier, task))
        return await asyncio.shield(task)

    async def _start(self, tier: str, before: asyncio.Task[ForkServer] | None) -> ForkServer:
        if before is not None and not before.cancelled() and before.exception() is None:
            await asyncio.to_thread(before.result().reap)
        server = await asyncio.to_thread(start, self.plan, tier)
        server.listen(self.loop)
        server.send(fork=1)
        self.metadata_extra |= server.world
        return server

    async def _once(self, tier: str, request: Request) -> Result:
        data = request.packed()
        server = await self._server(tier)
        pid, channel = await asyncio.wait_for(server.take(), PATIENCE)
        end = server.ends[pid] = self.loop.create_future()
        pipes = [os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) for _ in range(2)]
        flooded = asyncio.Event()

        def flood() -> None:
            if not flooded.is_set():  # once: repeated orders would fill the socket
                flooded.set()
                server.send(kill=pid)

        streams = [
            Stream(read, flood, limit) for (read, _), limit in zip(pipes, (request.max_output, KEPT), strict=True)
        ]
        for stream in streams:
            self.loop.add_reader(stream.descriptor, self._take, stream)
        try:
            server.send(start=pid, timeout=request.timeout)
            await self._hand_over(channel, data, [write for _, write in pipes])
            try:
                report = await asyncio.wait_for(end, max(request.timeout, 0) * forkserver.STRETCH + SLACK)
            except TimeoutError:
                server.end()
                raise Died from None
            for stream in streams:
                while stream.size <= 2 * FLOOD and stream.read():
                    pass
            said, directories = _hear(channel)
            try:
                files = {}
                if directories:  # in a thread: many or deep names take a while
                    files = await asyncio.to_thread(fetching.collect, directories[0], request.fetch)
            finally:
                for directory in directories:
                    os.close(directory)
            return self._result(request, report, said, streams, flooded.is_set(), files)
        finally:
            if server.ends.pop(pid, None) is not None:
                server.send(kill=pid)
            for stream in streams:
                self.loop.remove_reader(stream.descriptor)
                os.close(stream.descriptor)
            channel.close()

    def _take(self, stream: Stream) -> None:
        if stream.read() == b"":
            self.loop.remove_reader(stream.descriptor)

    async def _hand_over(self, channel: socket.socket, data: bytes, descriptors: list[int]) -> None:
        """Sends the request and the writing ends of the pipes; if the child is gone, its end is reported."""
        try:
            for descriptor in descriptors:
                os.set_blocking(descriptor, True)
            sent = socket.send_fds(channel, [data[: 2**16]], descriptors)
        except OSError:
            sent = len(data)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        with contextlib.suppress(OSError):
            await self.loop.sock_sendall(channel, memoryview(data)[sent:])

    def _result(
        self,
        request: Request,
        report: dict[str, Any],
        said: bytes,
        streams: list[Stream],
        flooded: bool,
        files: dict[str, bytes],
    ) -> Result:
        said = said.removeprefix(b"d")
        if report["starved"]:
            raise OSError("the program was starved: other load on this machine left it too little CPU time")
        if said == b"m":
            self.counts["memory"] += 1
            return Result("memory", 1, "", "MemoryError: the source does not fit\n", report["seconds"])
        if said.startswith(b"r"):
            return Result("refused", None, "", said[1:].decode("utf-8", "replace"), report["seconds"])
        if (
            said != b"k" and not report["late"]
        ):  # a very short time limit may pass before the child reports its isolation
            raise OSError(f"a child could not be isolated: {said[1:].decode('utf-8', 'replace') or 'it ended early'}")
        out, err = (stream.kept() for stream in streams)
        code = report["code"]
        full = code == -signal.SIGKILL and report["memory"] * 1024 > 0.9 * request.memory_mb * 2**20
        status = "timeout" if report["late"] else "finished"
        if flooded:
            status = "finished"
            err += f"\nStopped: it wrote more than {FLOOD // 2**20} MiB to a standard stream.\n".encode()
        elif code == -child.OUT_OF_MEMORY:
            status, code = "memory", 1
        elif status == "finished" and full:
            status = "memory"
        self.counts[status] += 1
        text = out.decode("utf-8", "replace"), err.decode("utf-8", "replace")
        return Result(status, code, *text, report["seconds"], files, truncated=streams[0].size > request.max_output)


def _alive(task: asyncio.Task[ForkServer]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None and not task.result().dead


def _hear(channel: socket.socket) -> tuple[bytes, list[int]]:
    """Reads what a child sent before its program started."""
    said, descriptors = b"", []
    with contextlib.suppress(OSError):
        while True:
            data, more, _, _ = socket.recv_fds(channel, 4096, 1)
            said, descriptors = said + data, descriptors + list(more)
            if not data:
                break
    return said, descriptors
