"""Client of one SGLang server: requests, answers, and what is known about the server. Policy is in rollout/fleet.py.

The client is aiohttp: with 1,000 requests in flight (2,000 ids in, 256 tokens with log-probs out) it needs 0.7
CPU-seconds per 1,000 turns, httpx 35. Answers are streamed in pieces of 64 tokens, so that a dying server loses few
tokens; this costs 4 % more than one answer at the end. Servers without --incremental-streaming-output do not stream,
because they repeat all tokens in every piece.

Two dialects are spoken: SGLang's, and that of sglang-jax under third_party/sglang_jax/launch.py. The server's own
/server_info selects one.

Behaviour of sglang 0.5.23 that shapes this file (all observed):
 - An id outside the vocabulary kills the server, so ids are checked before they are sent.
 - finish_reason "abort" comes with HTTP 200 and a partial output; errors have three JSON shapes, also in the stream.
 - weight_versions, the version spans of the output, come with the last piece only.
 - While paused, new requests hang; only closing the connection aborts them. /ready then returns 503 and /ping 200.
 - /update_weights_from_disk flushes the cache (10 ms; /flush_cache takes 0.4 s) and reports success for weights of
   another architecture: only log-probs prove which weights were loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import aiohttp
import numpy as np
import orjson
import tenacity

from open_agentrl_jax.rollout.address import base_url, proxy_for

STREAM_INTERVAL = 64  # tokens per piece
JSON = {"Content-Type": "application/json"}
WAIT_SECONDS = 0.2  # between two looks at whether another process has loaded the weights
READY, PAUSED, UPDATING, DOWN, QUARANTINED = "ready", "paused", "updating", "down", "quarantined"


class ServerError(Exception):
    """The server or the connection failed; another server or a later attempt may succeed."""


class Silent(ServerError):
    """The server did not answer in time."""


class WrongAddress(ServerError):
    """Something answers at the address, but it is no server that this client may use."""


class Refused(Exception):
    """The server rejected the request; a retry does not help."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Differences between server implementations."""

    name: str
    spare_tokens: int = 0  # of the context that a request must leave unused
    scoring_tokens: int = 0  # that a request must generate when only its prompt is scored
    renormalises: bool = True  # returns log-probs of the truncated distribution on request
    scores_while_paused: bool = False
    takes_tensors: bool = False  # has endpoints that replace weights without files
    keeps_cache: bool = False  # can replace weights below running requests


SGLANG = Dialect("sglang", takes_tensors=True, keeps_cache=True)
SGLANG_JAX = Dialect("sglang-jax", spare_tokens=1, scoring_tokens=1, renormalises=False, scores_while_paused=True)


@dataclasses.dataclass
class Piece:
    """Part of an answer. The last piece has `finish` and `spans` (version, start, end)."""

    ids: list[int]
    logprobs: list[float]
    finish: str = ""
    spans: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0


_persistent = tenacity.retry(
    retry=tenacity.retry_if_exception(lambda error: type(error) is ServerError),  # a timeout has already waited
    stop=tenacity.stop_after_attempt(3),
    wait=tenacity.wait_exponential_jitter(0.1, 2.0),
    reraise=True,
)


class Server:
    """A base URL, its state, and the requests it understands."""

    def __init__(self, http: aiohttp.ClientSession, url: str, patience: float = 10.0):
        """Sends nothing yet; a server is down until it answers. `patience` (seconds) bounds small requests."""
        self._http, self.url, self._patience = http, base_url(url), patience
        self._proxy = proxy_for(self.url)
        self.state, self.reason = DOWN, "no answer yet"
        self.answered = self.wrong_address = False  # has answered as a server at least once; as something else now
        self.version: int | None = None  # weights that were loaded and proven
        self.epoch = 0  # incremented whenever its weights are touched
        self.requests: dict[str, asyncio.Timeout] = {}  # rid -> deadline
        self.sessions = 0
        self.failures = self.streak = 0  # since the last answer; times it went down since then
        self.retry_at = self.heard_at = 0.0
        self.joined = self.streams = False
        self.dialect = SGLANG
        self.context_length = 0  # tokens that a request may use; 0 if unknown
        self.ranks, self.group = 1, ""  # tensor parallel processes; their process group with the trainer's sender
        self.lock, self.look = asyncio.Lock(), asyncio.Event()

    def __repr__(self) -> str:
        return f"{self.url}: {self.state}" + (f" ({self.reason})" if self.reason else "")

    async def generate(self, payload: dict[str, Any], *, renormalised: bool = False) -> AsyncIterator[Piece]:
        """Sends `payload` to /generate and yields at least one piece; the last one has `finish`.

        Args:
            payload: the request.
            renormalised: read the log-probs of the truncated distribution, which `return_sampling_mask` requests.

        Raises:
            ServerError: no answer, a malformed one, or an error of the server.
            Refused: this server cannot serve the request.
        """
        if renormalised and not self.dialect.renormalises:
            raise Refused(f"{self.dialect.name} has no log-probs of a truncated distribution; set rollout.top_k to 0")
        key = "output_token_sampling_logprobs" if renormalised else "output_token_logprobs"
        finished = False
        body = {**payload, "stream": self.streams}
        try:
            data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
            post = self._http.post(f"{self.url}/generate", data=data, headers=JSON, proxy=self._proxy)
            async with post as response:
                if response.status != 200:
                    _raise(response.status, await response.text())
                async for data in _events(response) if self.streams else _whole(response):
                    piece = _piece(data, key)
                    self.heard_at = time.monotonic()
                    finished = bool(piece.finish)
                    yield piece
        except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServerError(f"{type(error).__name__}: {error}") from None
        if not finished:
            raise ServerError("the answer ended early")

    async def score(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Log-probs (nats, temperature 1) of ids[start + 1:], each given all ids before it.

        The first `start` ids may come from the server's cache, so that a cache of other weights shows.
        """
        answer = await self.post(
            "generate",
            30,
            input_ids=[int(i) for i in ids],
            sampling_params={"max_new_tokens": self.dialect.scoring_tokens},
            return_logprob=True,
            logprob_start_len=start,
        )
        try:
            entries = answer["meta_info"]["input_token_logprobs"][start + 1 - len(ids) :]
            values = np.array([entry[0] for entry in entries], np.float32)  # null becomes NaN
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"an answer without log-probs: {error}") from None
        if len(values) != len(ids) - start - 1:
            raise ServerError(f"{len(ids)} ids were scored with {len(values)} log-probs")
        if not np.isfinite(values).all():
            raise Refused("the weights give log-probs that are not finite numbers")
        return values

    async def load(
        self,
        replace: Callable[[], Awaitable[None]],
        probe: Sequence[int] = (),
        start: int = 0,
        *,
        keep_cache: bool = False,
    ) -> tuple[np.ndarray, float]:
        """Pauses, replaces the weights and continues. Running requests recompute their prefix afterwards.

        Args:
            replace: replaces the weights and flushes the cache, see `rollout.refit`.
            probe: ids to score under the new weights, see `score`; empty: none.
            start: see `score`.
            keep_cache: running requests continue on their cache.

        Returns:
            The log-probs of the probe, and the seconds that they took.

        Raises:
            ServerError: it failed; which weights the server has is unknown.
            Refused: the server rejects the weights.
        """
        early, late = (probe, ()) if self.dialect.scores_while_paused else ((), probe)
        scored, proof = np.zeros(0, np.float32), 0.0
        await self._control("pause_generation", mode="in_place" if keep_cache else "retract")
        try:
            await replace()
            began = time.monotonic()
            if early:
                scored = await self.score(early, start)
            proof = time.monotonic() - began
        finally:
            await self._control("continue_generation")
        if late:
            began = time.monotonic()
            scored = await self.score(late, start)
            proof = time.monotonic() - began
        return scored, proof

    async def loaded(
        self, version: str, seconds: float, probe: Sequence[int] = (), start: int = 0
    ) -> tuple[np.ndarray, float]:
        """As `load`, where another process loads: waits until the server reports `version`, then scores the probe."""
        began = time.monotonic()
        while (tag := await self.weights()) != version or await self._status("ready") == 503:
            if time.monotonic() > began + seconds:
                raise ServerError(f"it reports weights {tag!r} {seconds:.0f} s after another process loads {version}")
            await asyncio.sleep(WAIT_SECONDS)
        began = time.monotonic()
        scored = await self.score(probe, start) if probe else np.zeros(0, np.float32)
        return scored, time.monotonic() - began

    async def abort(self, rid: str) -> None:
        """Aborts one request; an unknown one is no error."""
        await self._control("abort_request", rid=rid)

    async def look_up(self) -> tuple[str, str]:
        """Returns the condition ("ready" | "paused" | "starting") and the version string of the weights.

        Raises:
            ServerError: no valid answer.
        """
        tag = await self.weights()
        self.answered, self.wrong_address = True, False
        condition = READY
        if await self._status("ready") == 503:  # older servers have no /ready and return 404
            paused = await self._status("ping") == 200
            condition = PAUSED if paused else READY if await self.generates() else "starting"
        return condition, tag

    async def weights(self) -> str:
        """The version string of the weights."""
        return str((await self._get("model_info")).get("weight_version"))

    async def generates(self) -> bool:
        """Whether the server produces tokens: it generates one, or has done so lately. Takes at least a second."""
        return await self._status("health_generate", 30) == 200

    @_persistent
    async def resume(self) -> None:
        """Ends a pause that somebody left behind."""
        await self._control("continue_generation")

    @_persistent
    async def join(self) -> None:
        """Reads the implementation and the limits of the server."""
        info = await self._get("server_info")
        self.dialect = SGLANG_JAX if info.get("implementation") == SGLANG_JAX.name else SGLANG
        pool = _count(info.get("max_total_num_tokens")) or _count(info.get("max_total_tokens"))
        limit = min((n for n in (_count(info.get("context_length")), pool) if n), default=0)
        self.context_length = max(limit - self.dialect.spare_tokens, 0)
        self.streams = info.get("incremental_streaming_output") is True
        self.ranks = _count(info.get("tp_size")) or 1
        self.joined = True

    @_persistent
    async def _control(self, name: str, **body: Any) -> None:
        await self.post(name, self._patience, **body)

    async def post(self, name: str, seconds: float, **body: Any) -> Any:
        """Sends one request and returns its answer: an object if it is JSON, else the text.

        Raises:
            ServerError: no answer in time, or an error of the server.
            Refused: the server rejects the request.
        """
        async with self._call("POST", name, seconds, json=body) as response:
            text = await response.text()
            if response.status != 200:
                _raise(response.status, f"{name}: {text}")
            return json.loads(text) if text.startswith("{") else text

    async def _get(self, name: str) -> dict[str, Any]:
        async with self._call("GET", name, self._patience) as response:
            status = response.status
            if status in (401, 403):
                raise WrongAddress(f"{name}: HTTP {status}: the server wants an API key; see rollout.api_key_env")
            if status == 404:
                raise WrongAddress(f"{name}: HTTP 404: no SGLang server at this address (docs/sglang.md)")
            if status != 200:
                raise ServerError(f"{name}: HTTP {status}")
            try:
                content = json.loads(await response.read())
            except ValueError:
                content = None
        if not isinstance(content, dict):
            raise WrongAddress(f"{name}: the answer is not a JSON object, so this is no SGLang server")
        return content

    async def _status(self, name: str, seconds: float = 0.0) -> int:
        async with self._call("GET", name, seconds or self._patience) as response:
            return response.status

    @contextlib.asynccontextmanager
    async def _call(self, method: str, name: str, seconds: float, **more: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        more |= {"timeout": aiohttp.ClientTimeout(total=seconds), "proxy": self._proxy}
        try:
            async with self._http.request(method, f"{self.url}/{name}", **more) as response:
                yield response
        except TimeoutError:
            raise Silent(f"{name}: no answer within {seconds:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ServerError(f"{name}: {type(error).__name__} {error}") from None


def _raise(status: int, body: str) -> None:
    message = f"HTTP {status}: {_message(body)}"
    raise (ServerError if status >= 500 or status in (408, 429) else Refused)(message)


def _message(body: str) -> str:
    """The reason in an error body, which has one of three shapes, or none of them."""
    try:
        content = json.loads(body[body.index("{") :])
        error = content.get("error", content)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return body[:200]


async def _whole(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    yield _parsed(await response.read())


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    """The objects of a server-sent event stream. (Reading by lines would bound their length.)"""
    buffer = b""
    async for data in response.content.iter_any():
        buffer += data
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                yield _parsed(event[6:])


def _parsed(data: bytes) -> Any:
    """Answers with thousands of tokens; orjson refuses NaN and very large numbers, which are reported by name."""
    try:
        return orjson.loads(data)
    except ValueError:
        return json.loads(data)


def _piece(data: Any, key: str) -> Piece:
    if not isinstance(data, dict):
        raise ServerError("an answer that is not a JSON object")
    if "error" in data:
        error = data["error"] if isinstance(data["error"], dict) else {}
        _raise(_count(error.get("code")) or 500, json.dumps(data))
    meta = data["meta_info"]
    finish = meta["finish_reason"] or {}
    if isinstance(finish, str):
        finish = {"type": finish}
    if finish.get("type") == "abort" and finish.get("status_code"):
        _raise(_count(finish["status_code"]) or 500, json.dumps({"message": finish.get("message")}))
    ids = data["output_ids"]
    if set(map(type, ids)) - {int}:
        raise ServerError("token ids that are not whole numbers")
    logprobs = _finite([entry[0] if isinstance(entry, list) else entry for entry in meta[key]]) if ids else []
    if len(logprobs) != len(ids):
        raise ServerError(f"{len(ids)} tokens came with {len(logprobs)} log-probs")
    spans = [(str(s["version"]), int(s["start"]), int(s["end"])) for s in meta.get("weight_versions") or ()]
    counts = _count(meta.get("prompt_tokens")), _count(meta.get("cached_tokens"))
    return Piece(ids, logprobs, str(finish.get("type", "")), spans, *counts)


def _finite(values: list[Any]) -> list[float]:
    """Log-probs as a server sends them; null, NaN and infinities would silently spoil an update."""
    if set(map(type, values)) - {int, float} or not np.isfinite(values).all():
        wrong = next(v for v in values if type(v) not in (int, float) or not math.isfinite(v))
        raise ServerError(f"a log-prob that is not a finite number: {wrong!r}")
    return values


def _count(value: Any) -> int:
    """A whole number as a server sends it; 0 for anything else ("auto", null)."""
    try:
        return max(int(value), 0)
    except (TypeError, ValueError, OverflowError):
        return 0
