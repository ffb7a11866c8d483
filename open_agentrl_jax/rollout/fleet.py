"""Keeps a set of SGLang servers on the trainer's weights: watches them, loads new weights, verifies what was loaded.

A server is `ready`, `updating`, `paused` (by somebody else), `down`, or `quarantined` (it has wrong weights and waits
for the next update). One that comes back gets no work before it has loaded and proven the current weights.

Proof: after every load the server scores the probe, a fixed sequence of ids, and the trainer's own forward (`replay`)
provides the expected log-probs. A load that "succeeds" proves nothing: SGLang accepts weights of another architecture.
The first half of the probe may come from the server's cache, so the proof also detects a cache that was not flushed
(unless the cache is to stay: then the whole probe is computed).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import resource
import ssl
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import aiohttp
import numpy as np

from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.rollout.refit import Refit
from open_agentrl_jax.rollout.remote import (
    DOWN,
    PAUSED,
    QUARANTINED,
    READY,
    UPDATING,
    Refused,
    Server,
    ServerError,
    WrongAddress,
)

FAILURES = 3  # consecutive failed requests after which a server that still answers counts as down
PROGRESS_SECONDS = 10.0  # between two progress lines while no server is usable
WRONG_ADDRESS_SECONDS = 5.0  # to wait while every address belongs to something else

log = logging.getLogger(__name__)


class Fleet:
    """The servers, and one watching task per server. All coroutines belong to one event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        replay: Callable[[Sequence[int]], np.ndarray] | None,
        probe: Sequence[int],
        tolerance: float,
        deadline: float,
        outage: float,
        startup_seconds: float,
        load_seconds: float,
        straggler_seconds: float,
        interval: float,
        stall_seconds: float,
        api_key: str,
        refit: Refit,
        loads: bool,
    ):
        """Sends nothing yet; the arguments are those of `SGLangPool`."""
        self._urls, self._replay, self.probe, self._tolerance = list(urls), replay, list(probe), tolerance
        self._deadline, self._outage, self._load_seconds = deadline, outage, load_seconds
        self._startup, self._api_key, self._loads = startup_seconds, api_key, loads
        self._straggler, self._interval, self._stall = straggler_seconds, interval, stall_seconds
        self._refit = refit
        self.servers: list[Server] = []
        self.version: int | None = None  # None: the weights that the servers were started with
        self.path = ""
        self._expected: asyncio.Task[np.ndarray] | None = None  # log-probs of the probe under the trainer
        self.updating = False
        self.counts: collections.Counter[str] = collections.Counter()
        self.gauges: dict[str, float] = {}
        self._tasks: set[asyncio.Task] = set()
        self._changed = asyncio.Event()

    def open(self) -> None:
        """Starts watching; a second call does nothing."""
        if self.servers:
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # one socket per request in flight
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
        self._http = aiohttp.ClientSession(
            # Servers close connections after 5 idle seconds; a request sent at that moment is lost.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2, ssl=ssl.create_default_context()),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else None,
        )
        self.servers = [Server(self._http, url, 5 * self._interval) for url in self._urls]
        for server in self.servers:
            self.spawn(self._watch(server))

    async def close(self) -> None:
        """Stops watching and closes the connections, which aborts running requests."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._refit.close()
        if self.servers:
            await self._http.close()
        self.servers = []

    def ready(self) -> list[Server]:
        """The servers that may receive requests now; during an update those that have the new weights."""
        ready = [server for server in self.servers if server.state == READY]
        return [server for server in ready if server.version == self.version] if self.updating else ready

    async def until_ready(self, waits: Callable[[], bool] = lambda: True) -> list[Server]:
        """Waits for a usable server; returns none once `waits()` is false. Logs a line per ten seconds of waiting.

        Raises:
            EngineError: no server became usable in time, or none can become usable by waiting.
        """
        began, lines = time.monotonic(), 1
        while waits():
            if ready := self.ready():
                return ready
            waited, patience = time.monotonic() - began, self._patience()
            if not self.updating and all(s.state == QUARANTINED for s in self.servers):
                raise EngineError(f"no usable SGLang server: {self._reasons()}")
            if waited >= patience:
                raise EngineError(f"no usable SGLang server for {patience:.0f} s: {self._reasons()}")
            if waited >= lines * PROGRESS_SECONDS:
                log.warning("waiting for SGLang servers, %.0f of %.0f s: %s", waited, patience, self._reasons())
                lines += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, patience - waited, lines * PROGRESS_SECONDS - waited)):
                    await self.changed()
        return []

    def _patience(self) -> float:
        """Seconds to wait for a usable server: servers that never answered are given up earlier than lost ones."""
        if self.updating or any(server.answered for server in self.servers):
            return self._outage
        if all(server.wrong_address for server in self.servers):
            return min(WRONG_ADDRESS_SECONDS, self._startup)
        return self._startup

    async def update(self, path: str, version: int) -> None:
        """Pauses, loads, flushes, continues and verifies all servers at once; servers that are down follow later.

        The trainer computes its side of the proof meanwhile.
        """
        self.open()
        self.updating, began = True, time.monotonic()
        try:
            self.version, self.path = version, path
            self._expected = None if self._replay is None else self.spawn(asyncio.to_thread(self._replay, self.probe))
            waiting = {self.spawn(self._sync(s)) for s in self.servers if s.state != DOWN or not s.joined}
            if self._expected is not None:
                await self._expected
            while waiting:
                some = any(server.state == READY and server.version == version for server in self.servers)
                done, waiting = await asyncio.wait(
                    waiting, timeout=self._straggler if some else None, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    slow = ", ".join(server.url for server in self.servers if server.state == UPDATING)
                    log.warning("weights %d: continuing without %s, still loading", version, slow)
                    break
        finally:
            self.updating = False
            self._wake()
        await self.until_ready()
        self.counts["updates"] += 1
        self.gauges["load_seconds"] = time.monotonic() - began

    def failed(self, server: Server, error: ServerError) -> None:
        """Counts a failed request: the server is checked at once, and gets no work after several in a row."""
        server.failures += 1
        if server.state == READY and server.failures >= FAILURES:
            server.streak += 1
            server.retry_at = time.monotonic() + min(60.0, self._interval * 2**server.streak)
            self._down(server, f"{server.failures} failures in a row, the last: {error}")
        server.look.set()

    async def changed(self) -> None:
        """Waits until the state of a server changes."""
        await self._changed.wait()

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task:
        """Starts a task that ends with the fleet."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _watch(self, server: Server) -> None:
        misses = 0
        while True:
            try:
                if server.state != UPDATING and time.monotonic() >= server.retry_at:
                    condition, tag = await server.look_up()
                    misses = 0
                    await self._judge(server, condition, tag)
            except Exception as error:  # whatever a server sends, the task that watches it goes on
                if not isinstance(error, ServerError):
                    log.exception("%s: unexpected error", server.url)
                misses += 1
                server.wrong_address = isinstance(error, WrongAddress)
                if server.state == DOWN:
                    server.reason = str(error)
                elif server.state != UPDATING and (misses > 1 or "ClientConnector" in str(error)):
                    self._down(server, str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await server.look.wait()
            server.look.clear()

    async def _judge(self, server: Server, condition: str, tag: str) -> None:
        if condition == "starting":
            server.reason = "starting"
        elif server.state == DOWN or (server.state == PAUSED and condition == READY):
            self.counts["servers_returned"] += server.joined
            await self._sync(server)
        elif server.state == READY and server.version is not None and tag != str(server.version):
            self._down(
                server, f"has weights {tag!r}, not {server.version}: it was restarted, or somebody replaced them"
            )
        elif server.state == READY and condition == PAUSED:
            server.state, server.reason = PAUSED, "paused by somebody else"
            log.warning("%r", server)
        elif server.state == READY and server.requests and time.monotonic() > server.heard_at + self._stall:
            if await server.generates():
                server.heard_at = time.monotonic()
            elif server.state == READY:
                self._down(server, "answers, but generates nothing")

    async def _sync(self, server: Server) -> None:
        """Brings a server to the newest weights and verifies them; its running requests wait."""
        async with server.lock:
            if server.state == READY and server.version == self.version:
                return
            server.state, server.reason = UPDATING, ""
            self._set_clocks(server, None)
            try:
                await server.join()
                await self._load(server)
                while server.version != self.version:  # newer weights arrived meanwhile
                    await self._load(server)
                server.state, server.failures = READY, 0
            except ServerError as error:
                self._down(server, f"loading the weights: {error}")
            except Refused as error:
                server.state, server.reason = QUARANTINED, f"{self.path}: {error}"
                self.counts["quarantines"] += 1
                log.error("%r", server)
            except Exception as error:
                log.exception("%s: unexpected error", server.url)
                self._down(server, f"loading the weights: {type(error).__name__}: {error}")
            self._set_clocks(server, self._deadline if server.state == READY else 0)
            self._wake()

    async def _load(self, server: Server) -> None:
        version, expected, keep_cache = self.version, self._expected, self._refit.keeps_cache(server)
        if version is None:
            if self._loads:
                await server.resume()
            return
        start = 0 if keep_cache else len(self.probe) // 2
        probe = self.probe if expected is not None else ()
        if self._loads:
            replace = await self._refit.prepare(server, self.path, version, self._load_seconds)
            server.epoch += 1
            began = time.monotonic()
            scored, proof_seconds = await server.load(replace, probe, start, keep_cache=keep_cache)
        else:
            server.epoch += 1
            began = time.monotonic()
            scored, proof_seconds = await server.loaded(str(version), self._load_seconds, probe, start)
        self.gauges["server_load_seconds"] = time.monotonic() - began - proof_seconds
        tag = await server.weights()
        if tag != str(version):
            raise Refused(f"it loaded weights {version} and reports {tag!r}")
        if expected is not None:
            try:
                wanted = (await asyncio.shield(expected))[start + 1 :]
            except Exception as error:  # `update` raises it too
                raise Refused(f"the trainer's own log-probs are unknown: {error}") from None
            difference = float(np.mean(np.abs(scored - wanted)))
            self.gauges |= {"probe_difference": difference, "proof_seconds": proof_seconds}
            if not difference <= self._tolerance:
                raise Refused(
                    f"the log-probs of weights {version} differ from the trainer's by {difference:.3f} nats per token "
                    f"(tolerance {self._tolerance}): the folder is not what the trainer published"
                )
        server.version = version

    def _down(self, server: Server, reason: str) -> None:
        server.state, server.reason, server.group = DOWN, reason, ""
        self.counts["servers_lost"] += server.joined
        log.warning("%r; %d requests move to other servers", server, len(server.requests))
        self._set_clocks(server, 0)
        self._wake()

    def _set_clocks(self, server: Server, seconds: float | None) -> None:
        when = None if seconds is None else asyncio.get_running_loop().time() + seconds
        for clock in server.requests.values():
            with contextlib.suppress(RuntimeError):  # the deadline has just passed
                clock.reschedule(when)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _reasons(self) -> str:
        return "; ".join(map(repr, self.servers))
