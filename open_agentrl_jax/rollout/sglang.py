"""A pool of SGLang servers behind the `Engine` protocol. No JAX: trainers, evaluations and tests share it.

All turns of an episode go to one server, whose cache holds the prefix; a new episode goes to the least loaded server.
A request that a server aborts, or that is lost with its server, continues on another one from the tokens received so
far (all but the last 64 or so). Tokens sampled from weights that could not be proven are sampled again.

The log-probs of a completion are behaviour log-probs. SGLang does not renormalise them for top-p and top-k unless the
request asks for the sampling mask, which needs a top-k. So top-k, and top-p with top-k, are supported; top-p alone is
rejected.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import random
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from open_agentrl_jax.rollout.address import base_url
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.rollout.fleet import Fleet
from open_agentrl_jax.rollout.refit import Refit
from open_agentrl_jax.rollout.remote import DOWN, READY, STREAM_INTERVAL, UPDATING, Piece, Refused, Server, ServerError
from open_agentrl_jax.types import Completion, Sampling, UserError

ATTEMPTS = 8  # consecutive attempts without a single token, after which a request fails
PROBE_LENGTH = 32


class _Request:
    """Progress of one call of `generate`."""

    def __init__(self, session: str):
        self.session, self.rid, self.released = session, "", False
        self.server: Server | None = None
        self.avoid: Server | None = None
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []


class SGLangPool:
    """Several servers as one engine; implements `rollout.engine.Engine`. All coroutines belong to one event loop.

    It opens on first use; `await close()` it, or use `async with SGLangPool(...) as pool`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        vocab_size: int,
        context_length: int = 0,
        replay: Callable[[Sequence[int]], np.ndarray] | None = None,
        probe: Sequence[int] = (),
        tolerance: float = 0.1,
        deadline: float = 600.0,
        outage: float = 600.0,
        startup_seconds: float = 30.0,
        load_seconds: float = 600.0,
        straggler_seconds: float = 60.0,
        interval: float = 2.0,
        stall_seconds: float = 30.0,
        api_key: str = "",
        refit: Refit | None = None,
        loads: bool = True,
    ):
        """Sends nothing yet.

        Args:
            urls: base URLs of the servers (http or https, with a path prefix if there is one).
            vocab_size: ids are checked against it before they are sent: a bad one kills a server.
            context_length: tokens; 0: the limits of the servers.
            replay: the trainer's forward, ids [t] -> log-probs [t] (nats, temperature 1; entry i is of ids[i] given
                ids[:i], entry 0 is ignored). Called in a thread once per version, in `update_weights`, with `probe`.
                None: the version string is the only proof of the weights.
            probe: ids that prove weights; empty: 32 fixed pseudo-random ones. Real text suits a trained model better.
            tolerance: mean absolute difference (nats) of the probe's log-probs above which weights are wrong.
            deadline: seconds per attempt at a request, weight loads excluded; tokens received until then are kept.
            outage: seconds that a request waits for a usable server before `EngineError`.
            startup_seconds: the same while no server has ever answered.
            load_seconds: per weight load of one server.
            straggler_seconds: that `update_weights` waits for slower servers once one is ready.
            interval: seconds between two checks of a server; it is down after two timeouts of five intervals each.
            stall_seconds: without a token from a busy server, after which it must prove that it generates.
            api_key: sent as a bearer token; empty: none.
            refit: how weights reach the servers; None: they read files.
            loads: False: another process of the run loads the weights of these servers; this pool waits for them.

        Raises:
            UserError: no URL, a malformed one, or one that appears twice.
        """
        bases = [base_url(url) for url in urls]
        if not bases or len(set(bases)) != len(bases):
            raise UserError(f"rollout.servers: {list(urls)}: give at least one URL, and each once")
        self.vocab_size, self._context_length, self._deadline = vocab_size, context_length, deadline
        self.probe = list(probe) or np.random.default_rng(0).integers(0, vocab_size, PROBE_LENGTH).tolist()
        self._refit = refit or Refit()
        self.fleet = Fleet(
            bases,
            replay=replay,
            probe=self.probe,
            tolerance=tolerance,
            deadline=deadline,
            outage=outage,
            startup_seconds=startup_seconds,
            load_seconds=load_seconds,
            straggler_seconds=straggler_seconds,
            interval=interval,
            stall_seconds=stall_seconds,
            api_key=api_key,
            refit=self._refit,
            loads=loads,
        )
        self._counts = self.fleet.counts
        self._homes: dict[str, Server] = {}
        self._cached: dict[str, int] = {}  # session -> version that computed the start of its cache
        self._running: dict[str, set[_Request]] = collections.defaultdict(set)
        # Of equal length: servers abort every request whose id starts with the given one.
        self._rids = (f"{uuid.uuid4().hex[:12]}-{n:012d}" for n in itertools.count())

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, session: str = "") -> Completion:
        """See `Engine.generate`; UserError for a truncation whose log-probs are unknown."""
        return await self._generate(ids, sampling, session, _truncation(sampling))

    async def update_weights(self, path: str, version: int) -> None:
        """See `Engine.update_weights`; servers that are down or too slow follow later.

        Raises:
            EngineError: no server has the weights; the message has the reason of every server.
        """
        await self.fleet.update(str(path), version)

    async def release(self, session: str) -> None:
        """See `Engine.release`; running requests return their tokens with the finish reason "abort"."""
        self._cached.pop(session, None)
        if server := self._homes.pop(session, None):
            server.sessions -= 1
        for request in self._running.get(session, ()):
            request.released = True
            if request.server is not None:
                self._abort(request.server, request.rid)

    def for_evaluation(self) -> _Evaluation:
        """The same servers as an engine that accepts any top-p; unknown log-probs are NaN."""
        return _Evaluation(self)

    def metrics(self) -> dict[str, float]:
        """Counts since the start and current gauges, named `rollout/...`."""
        states = collections.Counter(f"servers_{server.state}" for server in self.fleet.servers)
        values = {"servers_ready": 0, **self._counts, **self.fleet.gauges, **states}
        values["refit_fallbacks"] = self._refit.fallbacks
        return {f"rollout/{name}": float(value) for name, value in values.items()}

    async def open(self) -> None:
        """Connects and starts watching; returns when one server is usable.

        Raises:
            EngineError: no server became usable in time.
        """
        self.fleet.open()
        await self.fleet.until_ready()

    async def close(self) -> None:
        """Stops watching and closes the connections, which aborts running requests."""
        await self.fleet.close()

    async def __aenter__(self) -> SGLangPool:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _generate(
        self, ids: Sequence[int], sampling: Sampling, session: str, extra: dict[str, Any], known: bool = True
    ) -> Completion:
        prompt = self._check(ids, sampling)
        self.fleet.open()
        request = _Request(session)
        self._running[session].add(request)
        self._counts["requests"] += 1
        try:
            finish = await self._until_finished(request, prompt, sampling, extra)
        finally:
            self._running[session].discard(request)
            if not self._running[session]:
                del self._running[session]
        self._counts["tokens"] += len(request.ids)
        logprobs = np.array(request.logprobs, np.float32)
        return Completion(
            np.array(request.ids, np.int32),
            logprobs if known else np.full_like(logprobs, np.nan),
            finish,
            np.array(request.versions, np.int32),
        )

    async def _until_finished(
        self, request: _Request, prompt: np.ndarray, sampling: Sampling, extra: dict[str, Any]
    ) -> str:
        failures = 0
        while server := await self._place(request):
            room = min(n for n in (self._context_length, server.context_length, 2**31) if n) - len(prompt)
            if room < 1:
                raise ValueError(f"{len(prompt)} ids leave no room in a context of {room + len(prompt)} tokens")
            had = len(request.ids)
            left = min(sampling.max_tokens, room) - had
            if left < 1:
                return "length"
            try:
                finish = await self._attempt(request, server, prompt, sampling, left, extra)
            except Refused as error:
                raise ValueError(f"{server.url} rejects the request: {error}") from None
            except ServerError as error:
                if request.released:
                    break
                reason, request.avoid = f"{server.url}: {error}", server
                self.fleet.failed(server, error)
                self._counts["retries"] += 1
            else:
                server.failures = server.streak = 0
                if finish != "abort":
                    return finish
                if request.released:
                    break
                reason = f"{server.url} aborted it"
                self._counts["aborted_by_server"] += 1
            failures = 0 if len(request.ids) > had else failures + 1
            if failures >= ATTEMPTS:
                raise EngineError(f"{failures} attempts in a row failed, the last one: {reason}")
            if request.ids:
                self._counts["resumed"] += 1
                self._counts["tokens_kept"] += len(request.ids) - had
            await asyncio.sleep(min(8.0, 0.1 * 2**failures) * random.uniform(0.5, 1.5))
        return "abort"

    async def _place(self, request: _Request) -> Server | None:
        """The server for the next attempt; None if the session was released."""
        usable = await self.fleet.until_ready(lambda: not request.released)
        home = self._homes.get(request.session)
        while home is not None and home.state == UPDATING and self.fleet.updating and not request.released:
            await self.fleet.changed()  # an update takes less time than a prefix on another server
            usable = await self.fleet.until_ready(lambda: not request.released)
        if not usable or request.released:
            return None
        others = [server for server in usable if server is not request.avoid] or usable
        server = (
            home if home is not None and home in others else min(others, key=lambda s: (s.sessions, len(s.requests)))
        )
        if request.session and server is not home:
            if home is not None:
                home.sessions -= 1
                self._counts["sessions_moved"] += 1
            server.sessions += 1
            self._homes[request.session] = server
            self._cached.pop(request.session, None)
        request.server = server
        return server

    async def _attempt(
        self,
        request: _Request,
        server: Server,
        prompt: np.ndarray,
        sampling: Sampling,
        left: int,
        extra: dict[str, Any],
    ) -> str:
        """Sends one request to one server; `request` keeps the tokens, however it ends."""
        rid = request.rid = next(self._rids)
        params = {
            "max_new_tokens": left,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": list(sampling.stop_ids),
            "sampling_seed": sampling.seed % 2**63,  # used only under --enable-deterministic-inference
            "stream_interval": STREAM_INTERVAL,
        }
        ids = np.concatenate([prompt, np.array(request.ids, np.int32)])  # [t] int32, sent without Python integers
        payload = {"rid": rid, "input_ids": ids, "sampling_params": params, "return_logprob": True, **extra}
        pieces: list[Piece] = []
        version, epoch, known = server.version or 0, server.epoch, 0  # pieces received before new weights
        try:
            async with asyncio.timeout(self._deadline) as clock:
                if not server.requests:
                    server.heard_at = time.monotonic()
                server.requests[rid] = clock
                async for piece in server.generate(payload, renormalised="return_sampling_mask" in extra):
                    left -= len(piece.ids)
                    if left < 0 or (piece.ids and not 0 <= min(piece.ids) <= max(piece.ids) < self.vocab_size):
                        raise ServerError("the answer has too many tokens, or ids outside the vocabulary")
                    pieces.append(piece)
                    known += server.epoch == epoch
        except BaseException as error:
            # Of an unfinished answer only the pieces whose weights are certain are kept.
            self._abort(server, rid)
            for piece in pieces[:known]:
                self._keep(request, piece, [version] * len(piece.ids), version)
            self._counts["tokens_lost"] += sum(len(piece.ids) for piece in pieces[known:])
            if isinstance(error, TimeoutError):
                self._counts["timeouts"] += server.state == READY
                raise ServerError(server.reason or f"not finished within {self._deadline:.0f} s") from None
            raise
        finally:
            server.requests.pop(rid, None)
        return await self._finish(request, server, pieces)

    async def _finish(self, request: _Request, server: Server, pieces: list[Piece]) -> str:
        """Keeps the tokens of a complete answer, except those sampled from weights that the server could not prove."""
        versions = self._versions(pieces)
        newest = max(versions, default=0)
        while server.state == UPDATING and newest > (server.version or 0):
            await self.fleet.changed()
        proven = newest if self.fleet.version is None else server.version or 0
        if versions and self._refit.keeps_cache(server):
            oldest = self._cached.setdefault(request.session, versions[0]) if request.session else versions[0]
            self._counts["tokens_on_stale_cache"] += sum(version > oldest for version in versions)
        for piece in pieces:
            self._keep(request, piece, versions[: len(piece.ids)], proven)
            del versions[: len(piece.ids)]
        if newest > proven:
            raise ServerError(f"it sampled from weights that it could not prove: {server.reason}")
        self._counts["prompt_tokens"] += pieces[-1].prompt_tokens
        self._counts["cached_tokens"] += pieces[-1].cached_tokens
        return pieces[-1].finish

    def _versions(self, pieces: list[Piece]) -> list[int]:
        count = sum(len(piece.ids) for piece in pieces)
        if self.fleet.version is None:
            return [0] * count
        versions: list[int] = []
        for tag, start, end in pieces[-1].spans:
            if not tag.isdecimal() or start != len(versions):
                raise ServerError(f"it sampled from weights {tag!r}, which this run did not load")
            versions += [int(tag)] * (end - start)
        if len(versions) != count:
            raise ServerError(f"{count} tokens came with {len(versions)} weight versions")
        return versions

    def _keep(self, request: _Request, piece: Piece, versions: list[int], proven: int) -> None:
        count = sum(version <= proven for version in versions)  # versions never decrease within an answer
        self._counts["tokens_lost"] += len(versions) - count
        request.ids += piece.ids[:count]
        request.logprobs += piece.logprobs[:count]
        request.versions += versions[:count]

    def _check(self, ids: Sequence[int], sampling: Sampling) -> np.ndarray:
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise ValueError("ids must be a non-empty sequence of whole numbers")
        for bad in (array.min(), array.max()):
            if not 0 <= bad < self.vocab_size:
                raise ValueError(f"id {bad} is outside the vocabulary of {self.vocab_size}")
        if sampling.max_tokens < 1:
            raise ValueError(f"max_tokens {sampling.max_tokens} must be at least 1")
        return array.astype(np.int32)

    def _abort(self, server: Server, rid: str) -> None:
        async def abort() -> None:
            with contextlib.suppress(ServerError, Refused):
                await server.abort(rid)

        if server.state != DOWN:
            self._counts["aborts"] += 1
            self.fleet.spawn(abort())


class _Evaluation:
    """`SGLangPool.for_evaluation`."""

    def __init__(self, pool: SGLangPool):
        self._pool = pool
        self.update_weights, self.release = pool.update_weights, pool.release

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, session: str = "") -> Completion:
        """See `Engine.generate`."""
        try:
            extra, known = _truncation(sampling), True
        except UserError:
            extra, known = {}, False
        return await self._pool._generate(ids, sampling, session, extra, known)


def _truncation(sampling: Sampling) -> dict[str, Any]:
    """Request fields that make the server return the log-probs of the distribution it samples from."""
    if sampling.temperature == 0 or (sampling.top_p == 1 and sampling.top_k == 0):
        return {}
    if sampling.top_k:
        return {"return_sampling_mask": True}
    raise UserError(
        f"rollout.top_p: {sampling.top_p} without rollout.top_k: SGLang does not renormalise log-probs for it; "
        "set rollout.top_p to 1, or rollout.top_k (up to 4096) beside it"
    )
