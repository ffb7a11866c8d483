"""A client of SandboxFusion servers, this package's or others: several URLs, retries, deadlines.

Faults between client and program (no answer, 429, 5xx, SandboxError) are retried, on another server if there is one,
and end as status "infrastructure": they are never the program's fault.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import dataclasses
import json
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx

from open_agentrl_jax.sandbox.background import Background
from open_agentrl_jax.sandbox.result import FLOOD, KEPT, LEAST_OUTPUT, Result, Session, head_and_tail, out_of_memory
from open_agentrl_jax.types import UserError

IN_FLIGHT = 128
ATTEMPTS = 8
WAITING = 30.0  # seconds that a server may let a run wait beyond its own time limit
COOLING = 5.0  # seconds without runs for a server that failed; then a ping comes first
LARGEST = 256 * 2**20  # bytes of an answer that are read, files included; more is a fault of the server
LARGEST_TEXT = 32 * 2**20  # the same where no files and no long output were requested
PAUSE, LONGEST_PAUSE = 0.2, 8.0  # seconds before the second attempt, doubled for each further one up to the longest


class Fault(Exception):
    """A fault between client and program."""


@dataclasses.dataclass
class Server:
    """One URL, its number of runs, and when it may be tried again."""

    url: str
    running: int = 0
    again_at: float = 0.0
    down: bool = False


def server_url(text: str) -> str:
    """Returns the base of a server's URL; accepts `.../run_code` too.

    Raises:
        UserError: it is not an HTTP URL.
    """
    url = text.strip().rstrip("/").removesuffix("/run_code")
    try:
        usable = url.startswith(("http://", "https://")) and bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        usable = False
    if not usable:
        raise UserError(f"sandbox.urls: {text!r} is not a server's URL; write it as http://host:port")
    return url


class Remote(Background):
    """Runs programs on servers.

    Args:
        urls: the servers.
        max_active: runs in flight; 0: 128.
        token: bearer token; "": none.
    """

    def __init__(self, urls: Sequence[str], *, max_active: int = 0, token: str = ""):
        self.servers = [Server(server_url(url)) for url in urls]
        super().__init__()
        self.max_active = max_active or IN_FLIGHT
        self.counts: collections.Counter[str] = collections.Counter()
        self._turns = asyncio.Semaphore(self.max_active)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.max_active),
            trust_env=False,  # the environment's proxy is not meant for the cluster's own machines
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """URLs and counts, for the run's records."""
        urls = [server.url for server in self.servers]
        return {"kind": "remote", "urls": urls, "max_active": self.max_active, **self.counts}

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
        """Runs one program; see `Sandbox.run`. Output of servers that ignore `max_output` is cut here."""
        if not LEAST_OUTPUT <= max_output <= FLOOD:
            detail = f"max_output: {LEAST_OUTPUT} to {FLOOD} bytes, not {max_output}"
            return Result("refused", None, "", detail, 0.0)
        body = {
            "code": code,
            "language": "python",
            "stdin": stdin,
            "compile_timeout": timeout,
            "run_timeout": timeout,
            "memory_limit_MB": memory_mb,
            "max_output": max_output,
            "files": {name: base64.b64encode(content).decode() for name, content in (files or {}).items()},
            "fetch_files": list(fetch),
        }
        try:
            packed = json.dumps(body, allow_nan=False).encode()  # ASCII: half a surrogate pair goes through too
        except ValueError:
            return Result("refused", None, "", f"timeout and memory_mb must be finite: {timeout}, {memory_mb}", 0.0)
        return _cut(await self.here(self._run(packed, timeout, tuple(fetch), max_output)), max_output)

    def session(self, *, memory_mb: int = 2048) -> Session:
        """Raises UserError: SandboxFusion's API keeps no state between runs."""
        raise UserError(
            "sandbox.urls: these servers keep no state between calls, which agent.python.persistent needs; leave "
            "sandbox.urls empty, or set agent.python.persistent=false"
        )

    async def ping(self) -> list[bool]:
        """Whether each server answers."""
        return await self.here(self._ping_all())

    async def _ping_all(self) -> list[bool]:
        return list(await asyncio.gather(*(self._alive(server) for server in self.servers)))

    async def _release(self) -> None:
        await self._client.aclose()

    async def _run(self, body: bytes, timeout: float, fetch: tuple[str, ...], max_output: int) -> Result:
        self.counts["runs"] += 1
        async with self._turns:
            started = time.monotonic()
            deadline = started + 2 * (timeout + WAITING)
            reason = ""
            largest = LARGEST if fetch else min(LARGEST, LARGEST_TEXT + 6 * max_output)  # JSON: up to 6 bytes per byte
            for attempt in range(ATTEMPTS):
                if attempt:
                    self.counts["retries"] += 1
                    await asyncio.sleep(min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.5))
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                try:
                    result = await self._once(body, min(left, timeout + WAITING), fetch, largest)
                except Fault as fault:
                    reason = str(fault)
                    continue
                self.counts[result.status] += 1
                return result
            self.counts["infrastructure"] += 1
            return Result("infrastructure", None, "", reason or "no time left", time.monotonic() - started)

    async def _choose(self) -> Server:
        """Returns the least busy server; one that failed must answer a ping first, at once if no other is left."""
        now = time.monotonic()
        busy = sorted(self.servers, key=lambda server: (server.again_at > now, server.running))
        for server in busy:
            if not server.down or (server.again_at <= now and await self._alive(server)):
                return server
        for server in busy:
            if await self._alive(server):
                return server
        raise Fault(f"no sandbox server answers: {', '.join(server.url for server in self.servers)}")

    async def _alive(self, server: Server) -> bool:
        try:
            answer = await self._client.get(f"{server.url}/v1/ping", timeout=COOLING)
            server.down = answer.status_code != 200
        except httpx.HTTPError:
            server.down = True
        server.again_at = time.monotonic() + COOLING if server.down else 0.0
        return not server.down

    async def _once(self, body: bytes, patience: float, fetch: tuple[str, ...], largest: int) -> Result:
        server = await self._choose()
        server.running += 1
        try:
            async with asyncio.timeout(patience):
                status, answer = await self._post(f"{server.url}/run_code", body, patience, largest)
        except (httpx.HTTPError, TimeoutError) as error:
            server.down, server.again_at = True, time.monotonic() + COOLING
            raise Fault(f"{server.url}: {type(error).__name__}: {error}") from error
        finally:
            server.running -= 1
        if status in (400, 413, 422):
            return Result("refused", None, "", answer[:2000].decode("utf-8", "replace"), 0.0)
        if status != 200:
            server.again_at = time.monotonic() + PAUSE
            raise Fault(f"{server.url}: HTTP {status}: {answer[:500].decode('utf-8', 'replace')}")
        try:
            return read_answer(json.loads(answer), fetch)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Fault(f"{server.url}: an answer that cannot be read: {error}") from error

    async def _post(self, url: str, body: bytes, patience: float, largest: int) -> tuple[int, bytes]:
        """Returns status and content of an answer, which may be endless.

        Raises:
            Fault: it is larger than `largest` bytes.
        """
        headers = {"Content-Type": "application/json"}
        async with self._client.stream("POST", url, content=body, headers=headers, timeout=patience) as answer:
            content = bytearray()
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > largest:
                    raise Fault(f"{url}: an answer of more than {largest} bytes")
            return answer.status_code, bytes(content)


def read_answer(answer: dict[str, Any], fetch: Sequence[str] = ()) -> Result:
    """Reads a server's answer, which may be anything; files that were not requested are dropped.

    Raises:
        Fault: the server failed, not the program.
    """
    ran = answer.get("run_result") or answer.get("compile_result")
    if answer["status"] not in ("Success", "Failed") or ran is None or ran["status"] == "Error":
        raise Fault(f"SandboxError: {answer.get('message') or ran}")
    code, stdout, stderr = ran.get("return_code"), ran.get("stdout") or "", ran.get("stderr") or ""
    if not isinstance(code, int | None) or not isinstance(stdout, str) or not isinstance(stderr, str):
        raise TypeError("return_code is no number, or stdout and stderr are no text")
    status = "timeout" if ran["status"] == "TimeLimitExceeded" else "finished"
    if status == "finished" and (answer.get("message") == "memory" or (code != 0 and out_of_memory(stderr))):
        status = "memory"
    files = {name: base64.b64decode(content) for name, content in (answer.get("files") or {}).items() if name in fetch}
    seconds, truncated = float(ran.get("execution_time") or 0.0), ran.get("truncated") is True
    if not 0 <= seconds < math.inf:
        raise ValueError(f"execution_time is {seconds}")
    return Result(status, code, stdout, stderr, seconds, files, truncated)


def _cut(result: Result, max_output: int) -> Result:
    """Returns the result with no more text than requested."""
    out, err = (text.encode("utf-8", "replace") for text in (result.stdout, result.stderr))
    if len(out) <= max_output and len(err) <= 2 * KEPT:
        return result
    return dataclasses.replace(
        result,
        stdout=head_and_tail(out, max_output).decode("utf-8", "replace"),
        stderr=head_and_tail(err, KEPT).decode("utf-8", "replace"),
        truncated=result.truncated or len(out) > max_output,
    )
