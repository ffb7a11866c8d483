"""Serves the runs below a folder while they train: the report's page, and its data in parts.

The standard library serves the page, so that it needs no extra. Each connection carries one request, and its head must
arrive within HEAD_SECONDS. Without a token only requests whose Host and Origin are this machine's are answered.
"""

from __future__ import annotations

import gzip
import http.cookies
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from open_agentrl_jax import guard
from open_agentrl_jax.telemetry import report
from open_agentrl_jax.telemetry.index import Table
from open_agentrl_jax.types import UserError

HEAD_SECONDS = 10.0  # for the request line and all headers
SEND_SECONDS = 120.0  # for the answer, the page's largest part included
COOKIE = "report_token"
_CHUNK = re.compile(r"chunk([0-9]{1,9})")


class Runs:
    """The runs below a folder and the index of each."""

    def __init__(self, root: Path):
        self.root = root
        self._tables: dict[str, Table] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Newest first."""
        found = [self.root] if (self.root / "metrics.jsonl").exists() else []
        found += [path.parent for path in self.root.glob("*/metrics.jsonl")]
        found.sort(key=lambda path: (path / "metrics.jsonl").stat().st_mtime, reverse=True)
        return ["." if path == self.root else path.name for path in found]

    def part(self, name: str, part: str) -> bytes:
        """One part of a run's data: head, index, vocabulary or chunk<number>.

        Raises:
            KeyError: there is no such run or part.
        """
        if name not in self.names():
            raise KeyError(name)
        directory = (self.root / name).absolute()
        if part == "vocabulary":
            return report.encode(report.read_vocabulary(directory))
        with self._lock:
            table = self._tables.setdefault(name, Table(directory / "trajectories.jsonl"))
            table.update()
            bounds = report.chunks(table.sizes())
            if part == "head":
                return report.encode(report.head(directory, table, bounds))
            if part == "index":
                return report.encode(table.columns)
            if (match := _CHUNK.fullmatch(part)) and int(match[1]) < len(bounds):
                return table.read(*bounds[int(match[1])])
        raise KeyError(part)


def make_server(root: Path, host: str, port: int, *, token: str = "") -> ThreadingHTTPServer:
    """Binds a server of all runs below `root`; its `serve_forever` starts it.

    Args:
        root: the folder of the runs, or one run.
        host: the address to listen on.
        port: 0 takes any free one.
        token: clients send it once as /?token=TOKEN, which sets a cookie, or as a bearer token with each request.

    Raises:
        UserError: `host` is no loopback address and there is no token, or the address cannot be used.
    """
    if not token and not guard.loopback(host):
        raise UserError(f"host {host}: other machines can reach it, so a token is needed: set REPORT_TOKEN")
    runs, page = Runs(root), report.page("", served=True).encode()

    class Bound(Handler):
        """The handler with what it serves."""

        def admit(self) -> bool:
            """See Handler."""
            return admitted(self, host, token)

        def find(self, path: list[str]) -> tuple[bytes, str]:
            """See Handler."""
            if path == [""]:
                return page, "text/html; charset=utf-8"
            if path == ["data"]:
                return json.dumps(runs.names()).encode(), "application/json"
            if len(path) == 3 and path[0] == "data":
                return runs.part(path[1], path[2]), "application/json"
            raise KeyError("/".join(path))

    try:
        return ThreadingHTTPServer((host, port), Bound)
    except (OSError, OverflowError) as error:  # OverflowError: no valid port number
        why = getattr(error, "strerror", "") or error
        raise UserError(f"port {port} at {host}: {why}; give another port") from error


class Handler(BaseHTTPRequestHandler):
    """One request: `admit` decides whether it is answered, `find` returns the body and its type or raises KeyError."""

    timeout = SEND_SECONDS  # of one read or write

    def admit(self) -> bool:
        """Answers a request that is refused."""
        raise NotImplementedError

    def find(self, path: list[str]) -> tuple[bytes, str]:
        """The body at a path, and its content type."""
        raise NotImplementedError

    def handle(self) -> None:
        """Closes connections whose request head does not arrive in time."""
        self.deadline = threading.Timer(HEAD_SECONDS, self._abort)
        self.deadline.daemon = True
        self.deadline.start()
        try:
            super().handle()
        except OSError:  # the client is gone
            self.close_connection = True
        finally:
            self.deadline.cancel()

    def _abort(self) -> None:
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.close_connection = True

    def parse_request(self) -> bool:
        """See BaseHTTPRequestHandler; the head is complete once this returns."""
        parsed = super().parse_request()
        self.deadline.cancel()
        return parsed

    def do_GET(self) -> None:
        """Answers with a part, 404, or 500 with the reason."""
        if not self.admit():
            return
        path = [unquote(piece) for piece in urlsplit("http://host/" + self.path.lstrip("/")).path.strip("/").split("/")]
        try:
            status, (body, kind) = 200, self.find(path)
        except KeyError as error:
            status, body, kind = 404, f"not found: {error}".encode("utf-8", "replace"), "text/plain; charset=utf-8"
        except (UserError, OSError, ValueError) as error:
            status, body, kind = 500, str(error).encode("utf-8", "replace"), "text/plain; charset=utf-8"
        self.answer(status, body, kind)

    def answer(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        """Sends one answer, compressed if the client accepts it."""
        packed = "gzip" in self.headers.get("Accept-Encoding", "") and len(body) > 1000
        body = gzip.compress(body, 3) if packed else body
        self.send_response(status)
        fixed = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Content-Type-Options": "nosniff"}
        fixed |= {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        for name, value in (fixed | headers | ({"Content-Encoding": "gzip"} if packed else {})).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


def admitted(request: Handler, host: str, token: str) -> bool:
    """Checks the token, or without one that the request is from this machine; answers a refused request."""
    if not token:
        if header := guard.foreign(request.headers, host):
            detail = f"{header} is not this machine; a server without a token answers only it"
            request.answer(403, detail.encode("utf-8", "replace"), "text/plain; charset=utf-8")
        return not header
    given = parse_qs(urlsplit("http://host/" + request.path.lstrip("/")).query).get("token", [""])[0]
    if given and guard.matches(given, token):  # redirected, so that the token does not stay in the address bar
        cookie = http.cookies.SimpleCookie({COOKIE: token})
        cookie[COOKIE]["httponly"], cookie[COOKIE]["samesite"] = True, "Strict"
        request.answer(303, b"", "text/plain", Location="/", Set_Cookie=cookie[COOKIE].OutputString())
        return False
    try:
        stored = http.cookies.SimpleCookie(request.headers.get("Cookie", "")).get(COOKIE)
    except http.cookies.CookieError:
        stored = None
    known = guard.matches(stored.value if stored else request.headers.get("Authorization", ""), token)
    if not known:
        text = "a token is needed: open /?token=TOKEN with the server's REPORT_TOKEN"
        request.answer(401, text.encode(), "text/plain; charset=utf-8")
    return known
