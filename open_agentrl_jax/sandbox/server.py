"""Serves a sandbox under SandboxFusion's HTTP API: POST /run_code, GET /v1/ping; also /health and /metrics.

A run for which the queue has no room is answered 429 at once. A server that other machines can reach needs a token. One
without a token answers only requests that name this machine as their host and origin, and only JSON bodies, so that a
web page in somebody's browser cannot run code through it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import collections
import dataclasses
import json
import os
import resource
import signal
import socket
import time
from typing import Any

from aiohttp import web

from open_agentrl_jax import guard
from open_agentrl_jax.sandbox.executor import Embedded
from open_agentrl_jax.sandbox.result import FLOOD, KEPT, LEAST_OUTPUT, Result
from open_agentrl_jax.types import UserError

LARGEST_BODY = 128 * 2**20  # bytes
ALL_BODIES = 4 * LARGEST_BODY  # bytes that the requests being read, waiting and running may have sent together
FREE_BODY = 2**20  # bytes of each body that do not count: large bodies that come slowly keep small ones from nothing
READING, IDLE = 60.0, 10.0  # seconds that a client may take to send a body, and to send its next part
HEALTHY = 5.0  # seconds for which /health repeats its last answer
TAKEN = 32  # connections accepted at once: so many are open before they are counted
WAITING = 1024  # connections that the kernel holds meanwhile; one that it refuses comes again a second later
KEPT_FREE = 128, 8  # descriptors that connections leave: in all, and a run at once
OPEN_PATHS = ("/v1/ping", "/health")
DEFAULT_SECONDS, DEFAULT_MB = 10.0, 2048  # SandboxFusion's and ours, where the request says nothing


@dataclasses.dataclass(frozen=True)
class ServerSpec:
    """How to serve.

    max_queue: runs that may wait; further ones are answered 429.
    longest: seconds, the largest run_timeout accepted.
    grace: seconds that running programs have left after SIGTERM.
    max_memory_mb: MiB, the largest memory_limit_MB granted (greater ones are lowered to it); 0: half of the machine's.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token: str = ""
    max_queue: int = 256
    longest: float = 600.0
    grace: float = 30.0
    max_memory_mb: int = 0


class Invalid(Exception):
    """An invalid request: the text names the field, `status` is the HTTP status."""

    def __init__(self, text: str, status: int = 422):
        super().__init__(text)
        self.status = status


def half_of_memory() -> int:
    """MiB of half of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**21


def read_request(body: Any, longest: float, largest_mb: int) -> dict[str, Any]:
    """Returns the arguments of `Sandbox.run` from a request's JSON.

    Raises:
        Invalid: a field is missing or wrong.
    """
    if not isinstance(body, dict) or not isinstance(body.get("code"), str):
        raise Invalid("code: a string is required")
    if body.get("language", "python") != "python":
        raise Invalid(f"language: {body['language']!r} is not served, only 'python'")
    timeout = body.get("run_timeout", DEFAULT_SECONDS)
    if not isinstance(timeout, int | float) or not 0 < timeout <= longest:
        raise Invalid(f"run_timeout: seconds between 0 and {longest:g}")
    memory = body.get("memory_limit_MB") or -1
    if not isinstance(memory, int | float):
        raise Invalid("memory_limit_MB: a number")
    output = body.get("max_output", KEPT)
    if not isinstance(output, int) or not LEAST_OUTPUT <= output <= FLOOD:
        raise Invalid(f"max_output: an integer from {LEAST_OUTPUT} to {FLOOD}")
    stdin, files, fetch = body.get("stdin") or "", body.get("files") or {}, body.get("fetch_files") or []
    if not isinstance(stdin, str):
        raise Invalid("stdin: a string")
    if not isinstance(fetch, list) or not all(isinstance(name, str) for name in fetch):
        raise Invalid("fetch_files: a list of paths")
    try:
        decoded = {name: base64.b64decode(text, validate=True) for name, text in files.items() if text is not None}
    except (binascii.Error, ValueError, TypeError, AttributeError):
        raise Invalid("files: an object of paths and base64 contents") from None
    return {
        "code": body["code"],
        "stdin": stdin,
        "timeout": float(timeout),
        "memory_mb": max(int(min(memory, largest_mb)), 1) if memory > 0 else min(DEFAULT_MB, largest_mb),
        "max_output": output,
        "files": decoded,
        "fetch": tuple(fetch),
    }


def answer(result: Result) -> dict[str, Any]:
    """Formats a result as SandboxFusion does; `message` is "memory" where that ran out."""
    failed = result.status == "infrastructure"
    late = result.status == "timeout"
    good = result.status == "finished" and result.return_code == 0
    ran = {
        "status": "TimeLimitExceeded" if late else "Finished",
        "execution_time": result.seconds,
        "return_code": None if late else result.return_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "truncated": result.truncated,
    }
    return {
        "status": "SandboxError" if failed else "Success" if good else "Failed",
        "message": result.stderr if failed else "memory" if result.status == "memory" else "",
        "compile_result": None,
        "run_result": None if failed else ran,
        "executor_pod_name": None,
        "files": {name: base64.b64encode(content).decode() for name, content in result.files.items()},
    }


class Api:
    """The handlers, around one executor."""

    def __init__(self, sandbox: Embedded, spec: ServerSpec):
        self.sandbox, self.spec = sandbox, spec
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0
        self.pending = 0
        self.held = 0  # bytes of bodies beyond FREE_BODY each
        self.largest_mb = spec.max_memory_mb or half_of_memory()
        self._health: tuple[float, dict[str, Any]] = (-HEALTHY, {})
        self._checking = asyncio.Lock()

    def application(self) -> web.Application:
        """The routes."""

        @web.middleware
        async def admit(request: web.Request, handler: Any) -> web.StreamResponse:
            return await self.admit(request, handler)

        application = web.Application(client_max_size=LARGEST_BODY, middlewares=[admit])
        application.add_routes(
            [
                web.post("/run_code", self.run_code),
                web.get("/v1/ping", self.ping),
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
            ]
        )
        return application

    async def admit(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Checks the token, or without one that the request was meant for this machine."""
        wanted = "" if request.path in OPEN_PATHS else self.spec.token
        if wanted and not guard.matches(request.headers.get("Authorization", ""), wanted):
            return web.json_response({"detail": "a bearer token is needed"}, status=401)
        if not self.spec.token and (header := guard.foreign(request.headers, self.spec.host)):
            detail = f"{header} is not this machine; a server without a token serves only it"
            return web.json_response({"detail": detail}, status=403)
        return await handler(request)

    async def ping(self, _: web.Request) -> web.Response:
        """Answers as SandboxFusion does."""
        return web.json_response("pong")

    async def health(self, _: web.Request) -> web.Response:
        """Reports whether programs run: runs one, at most every HEALTHY seconds, however often it is called."""
        async with self._checking:
            if time.monotonic() - self._health[0] >= HEALTHY:
                result = await self.sandbox.run("print('well')", timeout=10)
                state = {"well": result.stdout == "well\n", **self.sandbox.metadata}
                self._health = (time.monotonic(), state)
        return web.json_response(self._health[1], status=200 if self._health[1]["well"] else 503)

    async def metrics(self, _: web.Request) -> web.Response:
        """Counters and gauges in Prometheus' text format."""
        lines = ["# TYPE sandbox_requests_total counter"]
        lines += [f'sandbox_requests_total{{status="{name}"}} {count}' for name, count in sorted(self.counts.items())]
        figures = {
            "run_seconds_total": ("counter", self.seconds),
            "fork_servers_restarted_total": ("counter", self.sandbox.counts["fork_servers_restarted"]),
            "retries_total": ("counter", self.sandbox.counts["retries"]),
            "active": ("gauge", min(self.pending, self.sandbox.max_active)),
            "waiting": ("gauge", max(self.pending - self.sandbox.max_active, 0)),
        }
        for name, (kind, value) in figures.items():
            lines += [f"# TYPE sandbox_{name} {kind}", f"sandbox_{name} {value}"]
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")

    async def run_code(self, request: web.Request) -> web.Response:
        """Runs one program, if there is room for its body and in the queue."""
        counted: list[int] = []
        try:
            return await self._run(await self._arguments(request, counted))
        except Invalid as error:
            return self._refuse(error.status, str(error), {"Retry-After": "1"} if error.status == 429 else None)
        finally:
            self.held -= sum(counted)

    async def _arguments(self, request: web.Request, counted: list[int]) -> dict[str, Any]:
        """Reads the body and returns the arguments in it; `counted` receives what it adds to `held`."""
        if request.content_type != "application/json":
            raise Invalid("Content-Type must be application/json", 415)
        if (request.content_length or 0) > LARGEST_BODY:
            raise Invalid(f"the body is larger than {LARGEST_BODY} bytes", 413)
        body = bytearray()
        try:
            async with asyncio.timeout(READING):
                while part := await asyncio.wait_for(request.content.readany(), IDLE):
                    body += part
                    more = max(len(body) - FREE_BODY, 0) - sum(counted)
                    if len(body) > LARGEST_BODY:
                        raise Invalid(f"the body is larger than {LARGEST_BODY} bytes", 413)
                    if self.held + more > ALL_BODIES:
                        raise Invalid("too much is being sent or waits already", 429)
                    self.held += more
                    counted[:] = [sum(counted) + more]
            return read_request(json.loads(body.decode(request.charset or "utf-8")), self.spec.longest, self.largest_mb)
        except TimeoutError:
            raise Invalid(f"the body took more than {READING:g} seconds, or paused for {IDLE:g}", 408) from None
        except (ValueError, LookupError, RecursionError):  # another encoding, or nested too deeply
            raise Invalid("the body is not JSON") from None

    async def _run(self, arguments: dict[str, Any]) -> web.Response:
        waiting = self.pending - self.sandbox.max_active
        if waiting >= self.spec.max_queue:
            return self._refuse(429, f"{waiting} runs wait already", {"Retry-After": "1"})
        self.pending += 1
        try:
            result = await self.sandbox.run(**arguments)
        finally:
            self.pending -= 1
        if result.status == "refused":
            return self._refuse(422, result.stderr)
        self.counts[result.status] += 1
        self.seconds += result.seconds
        return web.json_response(answer(result))

    def _refuse(self, status: int, detail: str, headers: dict[str, str] | None = None) -> web.Response:
        self.counts[str(status)] += 1
        return web.json_response({"detail": detail}, status=status, headers=headers)


class Full(asyncio.Protocol):
    """A connection beyond the limit."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Closes it."""
        if isinstance(transport, asyncio.Transport):
            transport.abort()


def most_connections(runs: int) -> int:
    """Returns how many connections may be open at once, so that enough descriptors are left for the runs."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(limit - KEPT_FREE[0] - KEPT_FREE[1] * runs, limit // 4)


async def serve(sandbox: Embedded, spec: ServerSpec, *, started: asyncio.Future[int] | None = None) -> None:
    """Serves until SIGTERM, SIGINT or cancellation; running programs may finish.

    Args:
        sandbox: the executor; the caller closes it.
        spec: address and limits.
        started: receives the port once the server listens.

    Raises:
        UserError: other machines can reach the address and there is no token, or the address cannot be used.
    """
    if not spec.token and not guard.loopback(spec.host):
        raise UserError(f"host {spec.host}: other machines can reach it, so a token is needed: set SANDBOX_TOKEN")
    api = Api(sandbox, spec)
    runner = web.AppRunner(
        api.application(), access_log=None, shutdown_timeout=spec.grace, handler_cancellation=True,
        auto_decompress=False,  # two megabytes can hold two gigabytes
    )  # fmt: skip
    await runner.setup()
    most = most_connections(sandbox.max_active)
    stop = asyncio.Event()
    listening = None

    def connection() -> asyncio.Protocol:
        assert runner.server is not None
        return runner.server() if len(runner.server.connections) < most else Full()

    try:
        try:
            listening = await asyncio.get_running_loop().create_server(connection, spec.host, spec.port, backlog=TAKEN)
            for each in listening.sockets:
                with socket.socket(fileno=os.dup(each.fileno())) as same:
                    same.listen(WAITING)
        except (OSError, OverflowError) as error:  # OverflowError: no valid port number
            raise UserError(f"port {spec.port}: {getattr(error, 'strerror', '') or error}; choose another") from error
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                loop.add_signal_handler(number, stop.set)
            except (RuntimeError, ValueError):  # not the main thread: the caller cancels
                break
        if started is not None:
            started.set_result(listening.sockets[0].getsockname()[1])
        await stop.wait()
    finally:
        if listening is not None:
            listening.close()
        await runner.cleanup()
