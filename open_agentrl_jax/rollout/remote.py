"""One SGLang server: its HTTP interface and what is known of it. What to do about it is decided in rollout/fleet.py.

HTTP is aiohttp's: with 1,000 requests in flight (2,000 ids in, 256 tokens with log-probs out) it takes 0.7 CPU-seconds
for 1,000 turns on this client and httpx 35, whose connection pool walks all connections for each request. Answers are
streamed, 64 tokens a piece, so that what a dying server has sent is not lost; that costs 4 % more than one answer at
the end. Servers started without --incremental-streaming-output are not asked to: they repeat all tokens in every piece.

Facts of sglang 0.5.23 that shape this file (each was seen):
 - An id outside the vocabulary kills the server: ids are checked before they are sent.
 - finish_reason "abort" comes with HTTP 200 and a partial output; errors have three shapes of JSON, also in the stream.
 - weight_versions, the spans of versions that sampled the output, come with the last piece only.
 - While paused, new requests hang and are not aborted by their rid, only by closing the connection; then /ready says
   503 and /ping 200.
 - /update_weights_from_disk flushes the cache itself (in 10 ms, where /flush_cache takes 0.4 s) and accepts weights of
   another architecture with success: only log-probs prove what was loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import numpy as np
import tenacity

STREAM_INTERVAL = 64  # tokens a piece
READY, PAUSED, UPDATING, DOWN, QUARANTINED = "ready", "paused", "updating", "down", "quarantined"


class ServerError(Exception):
    """The server, or the way to it, failed: another one, or a later try, may do better."""


class Silent(ServerError):
    """The server did not answer in time."""


class Refused(Exception):
    """The server understood and said no: repeating does not help."""


@dataclasses.dataclass
class Piece:
    """Part of an answer. `finish` and `spans` (version, start, end) come with the last one."""

    ids: list[int]
    logprobs: list[float]
    finish: str = ""
    spans: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0


_persistent = tenacity.retry(
    retry=tenacity.retry_if_exception(lambda error: type(error) is ServerError),  # who is silent has had its time
    stop=tenacity.stop_after_attempt(3),
    wait=tenacity.wait_exponential_jitter(0.1, 2.0),
    reraise=True,
)


class Server:
    """A base URL, its state, and the calls that are made to it."""

    def __init__(self, http: aiohttp.ClientSession, url: str, patience: float = 10.0):
        """Nothing is sent yet: a server is down until it was seen working. `patience` (seconds) bounds small calls."""
        self._http, self.url, self._patience = http, url.rstrip("/"), patience
        self.state, self.reason = DOWN, "not seen yet"
        self.version: int | None = None  # weights that were loaded and proven
        self.epoch = 0  # counts the times that its weights were touched
        self.requests: dict[str, asyncio.Timeout] = {}  # rid -> the clock that ends waiting for it
        self.sessions = 0
        self.failures = self.streak = 0  # since the last answer; times it went down since then
        self.retry_at = self.heard_at = 0.0
        self.joined = self.streams = False
        self.context_length = 0
        self.lock, self.look = asyncio.Lock(), asyncio.Event()

    def __repr__(self) -> str:
        return f"{self.url}: {self.state}" + (f" ({self.reason})" if self.reason else "")

    async def generate(self, payload: dict[str, Any], *, renormalised: bool = False) -> AsyncIterator[Piece]:
        """Sends a request to /generate and yields what comes, at least one piece; the last one has `finish`.

        Args:
            payload: the request.
            renormalised: take the log-probs of the truncated distribution, which `return_sampling_mask` asks for.

        Raises:
            ServerError: no answer, a broken one, or an error of the server's.
            Refused: the request cannot be served by this server at all.
        """
        key = "output_token_sampling_logprobs" if renormalised else "output_token_logprobs"
        finished = False
        try:
            async with self._http.post(f"{self.url}/generate", json={**payload, "stream": self.streams}) as response:
                if response.status != 200:
                    _raise(response.status, await response.text())
                async for data in _events(response) if self.streams else _whole(response):
                    piece = _piece(data, key)
                    self.heard_at = time.monotonic()
                    finished = bool(piece.finish)
                    yield piece
        except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{type(error).__name__}: {error}") from None
        if not finished:
            raise ServerError("the answer ended early")

    async def score(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Log-probs (nats, at temperature 1) of ids[start + 1:], each given all before it.

        The first `start` ids may come from the server's cache, so that a cache of other weights is seen.
        """
        answer = await self._post(
            "generate",
            30,
            input_ids=[int(i) for i in ids],
            sampling_params={"max_new_tokens": 0},
            return_logprob=True,
            logprob_start_len=start,
        )
        try:
            return np.array([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"an answer without log-probs: {error}") from None

    async def load(self, path: str, version: str, seconds: float) -> None:
        """Pause, load, flush, continue. Requests in flight are retracted: the new weights compute their prefix anew.

        Raises:
            ServerError: it failed, and what it samples from is unknown.
            Refused: it cannot load `path`; it goes on with the old weights.
        """
        await self._control("pause_generation", mode="retract")
        try:
            await self._post(
                "update_weights_from_disk", seconds, model_path=path, weight_version=version, flush_cache=True
            )
        finally:
            await self._control("continue_generation")

    async def abort(self, rid: str) -> None:
        """Ends one request; an unknown one is no error."""
        await self._control("abort_request", rid=rid)

    async def look_up(self) -> tuple[str, str]:
        """Its condition ("ready" | "paused" | "starting") and the version string of its weights.

        Raises:
            ServerError: it does not answer.
        """
        tag = await self.weights()
        condition = READY
        if await self._status("ready") == 503:  # 404: an older server, which cannot tell
            paused = await self._status("ping") == 200
            condition = PAUSED if paused else READY if await self.generates() else "starting"
        return condition, tag

    async def weights(self) -> str:
        """The version string of its weights."""
        return str((await self._get("model_info")).get("weight_version"))

    async def generates(self) -> bool:
        """Whether tokens come out of it: it makes one itself, or has made some lately. Takes a second at least."""
        return await self._status("health_generate", 30) == 200

    @_persistent
    async def resume(self) -> None:
        """Ends a pause that somebody left."""
        await self._control("continue_generation")

    @_persistent
    async def join(self) -> None:
        """Learns the limits of the server."""
        info = await self._get("server_info")
        context, pool = info.get("context_length"), info.get("max_total_num_tokens") or info.get("max_total_tokens")
        self.context_length = min(int(n) for n in (context, pool) if n) if context or pool else 0
        self.streams = bool(info.get("incremental_streaming_output"))
        self.joined = True

    @_persistent
    async def _control(self, name: str, **body: Any) -> None:
        await self._post(name, self._patience, **body)

    async def _post(self, name: str, seconds: float, **body: Any) -> Any:
        async with self._call("POST", name, seconds, json=body) as response:
            text = await response.text()
            if response.status != 200:
                _raise(response.status, f"{name}: {text}")
            return json.loads(text) if text.startswith("{") else text

    async def _get(self, name: str) -> dict[str, Any]:
        async with self._call("GET", name, self._patience) as response:
            if response.status != 200:
                raise ServerError(f"{name}: HTTP {response.status}")
            return await response.json(content_type=None)

    async def _status(self, name: str, seconds: float = 0.0) -> int:
        async with self._call("GET", name, seconds or self._patience) as response:
            return response.status

    @contextlib.asynccontextmanager
    async def _call(self, method: str, name: str, seconds: float, **more: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._http.request(method, f"{self.url}/{name}", timeout=timeout, **more) as response:
                yield response
        except TimeoutError:
            raise Silent(f"{name}: no answer within {seconds:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ServerError(f"{name}: {type(error).__name__} {error}") from None


def _raise(status: int, body: str) -> None:
    message = f"HTTP {status}: {_message(body)}"
    raise (ServerError if status >= 500 or status in (408, 429) else Refused)(message)


def _message(body: str) -> str:
    """The reason in an error's body, which has one of three shapes, or none of them."""
    try:
        content = json.loads(body[body.index("{") :])
        error = content.get("error", content)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return body[:200]


async def _whole(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    yield json.loads(await response.read())


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    """The objects of a server-sent event stream. (Reading by lines would bound the length of one.)"""
    buffer = b""
    async for data in response.content.iter_any():
        buffer += data
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                yield json.loads(event[6:])


def _piece(data: dict[str, Any], key: str) -> Piece:
    if "error" in data:
        error = data["error"] if isinstance(data["error"], dict) else {}
        _raise(int(error.get("code") or 500), json.dumps(data))
    meta = data["meta_info"]
    finish = meta["finish_reason"] or {}
    if finish.get("type") == "abort" and finish.get("status_code"):
        _raise(int(finish["status_code"]), json.dumps({"message": finish.get("message")}))
    ids = data["output_ids"]
    logprobs = [entry[0] if isinstance(entry, list) else entry for entry in meta[key]] if ids else []
    if len(logprobs) != len(ids):
        raise ServerError(f"{len(ids)} tokens came with {len(logprobs)} log-probs")
    spans = [(str(s["version"]), int(s["start"]), int(s["end"])) for s in meta.get("weight_versions") or ()]
    return Piece(
        ids, logprobs, finish.get("type", ""), spans, meta.get("prompt_tokens") or 0, meta.get("cached_tokens") or 0
    )
