"""The embedded engine: continuous batching over cache slots. One thread drives the device; callers use asyncio.

The result of a request depends, bit for bit, on the weights, the calls of its own session and its seed, never on other
requests:
 - rows of one dispatch do not mix (models/decode.py), and sampling keys are folded from the seed and the position;
 - new tokens are computed in chunks that depend on their number alone;
 - the prompt of a group is computed once and copied, only from an equal prompt that was computed from position 0;
 - a session keeps its cache until `release`. When slots run out, the session idle longest is moved to host memory and
   returns unchanged. It is never recomputed, because a decode step and a prefill may differ in the last bit.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from open_agentrl_jax.models import decode, hf, int8, kv, qwen
from open_agentrl_jax.models.config import RUN_TIME, ModelConfig
from open_agentrl_jax.parallel.mesh import launching
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.rollout.slots import Prefill, Request, Slots
from open_agentrl_jax.rollout.weights import apart, cast, copies_layers
from open_agentrl_jax.types import Completion, Sampling, UserError

# On CPUs time grows with the rows, so small batches are decoded with this many rows if a check finds the results
# bit-equal (below 64 rows they are not). On accelerators reading the weights dominates, whatever the number of rows.
_COMPACT = (64,)
_PREFILL_TOKENS = {"cpu": 128}  # target size of a prefill dispatch: short chunks of several requests share one
_GATHER_SECONDS = 0.001  # an idle engine waits this long for more requests of a burst

_compilations: collections.Counter[int | None] = collections.Counter()  # by thread


def _count(event: str, duration_secs: float, **_: Any) -> None:
    if event.endswith("backend_compile_duration"):
        _compilations[threading.get_ident()] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


class LocalEngine:
    """Generates on one device of this process or on a mesh; implements `rollout.engine.Engine`.

    One thread owns the cache. Methods may be called from any thread, coroutines from any event loop.
    """

    def __init__(
        self,
        params: qwen.Params,
        model_config: ModelConfig,
        *,
        slots: int,
        max_length: int,
        dtype: str | None = None,
        decode_chunk: int = 8,
        prefill_chunks: Sequence[int] = (16, 64, 256, 1024),
        version: int = 0,
        mesh: jax.sharding.Mesh | None = None,
        weights: str = "same",
    ):
        """Allocates the cache and starts the thread; `warmup` compiles.

        Args:
          params: parameters of models.qwen; see `set_params`.
          model_config: the model.
          slots: requests decoded together; on a mesh rounded up to a multiple of data x fsdp x seq.
          max_length: tokens per sequence, prompt included.
          dtype: of computation and cache; None: the model's compute dtype.
          decode_chunk: tokens decoded per dispatch, before other requests can join.
          prefill_chunks: lengths that prefill is compiled for; lengths above half of max_length are left out.
          version: of `params`.
          mesh: devices of this process, laid out as the trainer's; None: one device.
          weights: "same", or "int8": samples from (and takes log-probs of) a copy with 8-bit matrices (models/int8.py).

        Raises:
          UserError: an invalid size, or a mesh that does not divide the model.
        """
        for name, value in {"slots": slots, "max_length": max_length - 1, "decode_chunk": decode_chunk}.items():
            if value < 1:
                raise UserError(f"engine: {name}={value} is too small; raise it")
        if max_length > model_config.max_position_embeddings:
            raise UserError(
                f"engine: max_length={max_length} exceeds the model's max_position_embeddings="
                f"{model_config.max_position_embeddings}; lower it"
            )
        self.config = dataclasses.replace(model_config, compute_dtype=dtype or model_config.compute_dtype, remat="none")
        self._weights = weights
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        parts = 1 if self._mesh is None else kv.groups(self._mesh)
        slots = -(-slots // parts) * parts
        self.slots, self.max_length, self.decode_chunk = slots, max_length, decode_chunk
        chunks = sorted(prefill_chunks)
        self._chunks = [chunks[0], *(c for c in chunks[1:] if 2 * c <= max_length)]
        self._sizes = [slots]  # of decode batches
        self._expected = qwen.abstract_params(self.config)
        self._apart = self._mesh is None and copies_layers(params, self.config, slots)
        self._counters: collections.Counter[str] = collections.Counter()
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        self._device, self._shardings = here, jax.tree.map(lambda _: here, self._expected)
        if self._mesh is not None:
            self._device, self._shardings = self._mesh, qwen.param_shardings(self.config, self._mesh)
        # Dispatches of several threads must reach all devices of a mesh in the same order (parallel/mesh.py).
        self._turn = launching if self._mesh is not None else contextlib.nullcontext()
        self._compiled = 0
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._outbox: list[tuple[Request, Completion | EngineError]] = []
        self._generating: set[str] = set()
        self._closed = False
        self._forget()
        self._thread = threading.Thread(target=self._run, name="local-engine", daemon=True)
        self._thread.start()
        atexit.register(_close, weakref.ref(self))
        self._call(self._reset)  # in the thread, where only the engine's mesh is set
        self.set_params(params, version)
        self._compiled = _compilations[self._thread.ident]

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, session: str = "") -> Completion:
        """See `Engine.generate`. A session runs one request at a time; a cancelled request frees its slot immediately.

        Temperature 0 is greedy, with log-probs at temperature 1. Without a session no cache is kept.
        """
        request = Request(self._check(ids, sampling), sampling, session, asyncio.get_running_loop().create_future())
        if session in self._generating:
            raise ValueError(f"session {session!r} already generates")
        self._generating |= {session} - {""}
        try:
            self._post(lambda: self._waiting.append(request))
            return await request.future
        except asyncio.CancelledError:
            with contextlib.suppress(EngineError):
                self._post(lambda: self._drop(request))
            raise
        finally:
            self._generating.discard(session)

    async def release(self, session: str) -> None:
        """See `Engine.release`; a running request returns its tokens with finish_reason "abort"."""
        self._post(lambda: self._release(session))

    async def update_weights(self, path: str, version: int) -> None:
        """See `Engine.update_weights`.

        Raises:
          UserError: the folder at `path` cannot be read or holds another model.
        """
        config, params = await asyncio.to_thread(hf.load_pretrained, path, self._mesh, self.config.compute_dtype)
        run_time = {name: getattr(self.config, name) for name in RUN_TIME}
        if dataclasses.replace(config, **run_time) != self.config:
            raise UserError(
                f"{path}: config.json is of another model than the engine's; use an export of the same model"
            )
        await asyncio.to_thread(self.set_params, params, version)

    def set_params(self, params: qwen.Params, version: int) -> None:
        """Samples from `params` from the next dispatch on; the previous ones are unused when it returns.

        Arrays with the engine's dtype and sharding are shared, not copied: do not donate them while anything generates.
        The layers are copied where rollout/weights.py says so. Requests in flight and later turns of sessions keep
        their cache; each token carries its version.

        Raises:
          ValueError: not the parameters of this model.
        """
        if _shapes(params) != _shapes(self._expected):
            raise ValueError("params do not have the names and shapes of this model")
        self._call(lambda: self._set_params(params, version))

    def warmup(self) -> None:
        """Compiles all shapes; later compilations count as `recompilations`."""
        self._call(self._compile)

    def stats(self) -> dict[str, int]:
        """Counts since the start.

        prefill_tokens were computed; cached_tokens came from a session's or an equal prompt's cache. decode_steps made
        generated_tokens with decode_rows rows in total; dispatches counts device calls, parked the slots moved to host
        memory, recompilations the compilations after `warmup`.
        """
        names = "prefill_tokens cached_tokens generated_tokens decode_steps decode_rows dispatches parked"
        counts = {name: self._counters[name] for name in names.split()}
        return counts | {"recompilations": _compilations[self._thread.ident] - self._compiled}

    def close(self) -> None:
        """Ends the thread and frees the cache; pending requests fail with EngineError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _check(self, ids: Sequence[int], sampling: Sampling) -> np.ndarray:
        array = np.asarray(ids)
        if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
            raise ValueError("ids must be a non-empty sequence of whole numbers")
        if len(bad := array[(array < 0) | (array >= self.config.vocab_size)]):
            raise ValueError(f"id {bad[0]} is outside the vocabulary of {self.config.vocab_size}")
        if array.size >= self.max_length:
            raise ValueError(f"{array.size} ids leave no room in a context of {self.max_length} tokens")
        if sampling.max_tokens < 1:
            raise ValueError(f"max_tokens {sampling.max_tokens} must be at least 1")
        if len(sampling.stop_ids) > decode.STOPS:
            raise ValueError(f"{len(sampling.stop_ids)} stop ids are more than {decode.STOPS}")
        if not (sampling.temperature >= 0 and 0 < sampling.top_p <= 1 and sampling.top_k >= 0):
            raise ValueError("temperature must be at least 0, top_p above 0 and at most 1, top_k at least 0")
        return array.astype(np.int32)

    def _post(self, action: Callable[[], None]) -> None:
        """Hands `action` to the thread."""
        with self._wake:
            if self._closed:
                raise EngineError("the engine is closed")
            self._inbox.append(action)
            self._wake.notify()

    def _call(self, function: Callable[[], None]) -> None:
        """Runs `function` in the thread, waits for it, and raises its exception."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def action() -> None:
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

        self._post(action)
        done.result()

    # Everything below runs in the engine's thread.

    def _run(self) -> None:
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            self._loop()

    def _loop(self) -> None:
        _compilations[threading.get_ident()] = 0  # thread ids are reused
        while True:
            with self._wake:
                while not (self._closed or self._inbox or self._waiting or self._books.running.any()):
                    self._wake.wait()
                seen = -1
                while not self._books.running.any() and seen != len(self._inbox):
                    seen = len(self._inbox)
                    self._wake.wait(_GATHER_SECONDS)
                inbox, self._inbox, closed = self._inbox, [], self._closed
            try:
                for action in inbox:
                    action()
                if closed:
                    raise EngineError("the engine was closed")
                self._admit()
                self._decode()
            except Exception as error:
                self._fail(error)
            self._deliver()
            if closed:
                break

    def _reset(self) -> None:
        """Empties cache and bookkeeping."""
        # Committed to its device as later caches are: a program compiled for uncommitted arrays would not be reused.
        self._cache = kv.init_cache(self.config, self.slots, self.max_length, self._device)
        self._forget()

    def _forget(self) -> None:
        self._books = Slots(self.slots, self.max_length, self._chunks)
        self._waiting: collections.deque[Request] = collections.deque()

    def _fail(self, error: Exception) -> None:
        """Fails every request and continues with an empty cache, since a failed dispatch has consumed the old one."""
        for request in [*self._books.requests, *self._waiting]:
            if request is not None:
                failure = EngineError(
                    str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
                )
                failure.__cause__ = error
                self._outbox.append((request, failure))
        self._reset()

    def _deliver(self) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Request, Completion | EngineError]]] = {}
        for request, result in self._outbox:
            by_loop.setdefault(request.future.get_loop(), []).append((request, result))
        self._outbox = []
        for loop, results in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(_resolve, results)

    def _drop(self, request: Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        elif request.slot >= 0 and self._books.requests[request.slot] is request:
            self._books.stop(request.slot)

    def _release(self, session: str) -> None:
        for request in [r for r in self._waiting if r.session == session]:
            self._waiting.remove(request)
            none = np.zeros(0, np.int32)
            self._outbox.append((request, Completion(none, np.zeros(0, np.float32), "abort", none)))
        if (slot := self._books.owned_by(session)) >= 0 and self._books.running[slot]:
            self._outbox.append(self._books.finish(slot, "abort"))
        self._books.release(session)

    def _set_params(self, params: qwen.Params, version: int) -> None:
        dtype = np.dtype(self.config.compute_dtype)
        # device_put shares arrays that already have the sharding, whatever mesh they come from.
        with self._turn:
            placed = jax.tree.map(jax.device_put, params, self._shardings)
            if self._weights == "int8":
                placed = int8.quantize(placed)
            self._params = (apart if self._apart else cast)(placed, dtype)
        self._version = version
        self._books.forget_prompts()

    def _admit(self) -> None:
        plan = self._books.admit(self._waiting, self._park)
        self._copy(plan.ready)
        for slot, content in plan.restored:
            self._cache = self._dispatch(kv.write_slot, self._cache, np.int32(slot), content)
        self._prefill(plan.prefills)
        self._copy(plan.late)
        self._counters["cached_tokens"] += plan.cached

    def _park(self, slot: int) -> kv.Cache:
        self._counters["parked"] += 1
        return jax.device_get(self._dispatch(kv.read_slot, self._cache, np.int32(slot)))

    def _dispatch(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._turn:
            return function(*arguments)

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            slots = np.zeros((2, self.slots), np.int32)
            slots[:, : len(pairs)] = np.array(pairs).T
            self._cache = self._dispatch(kv.copy_slots, self._cache, *slots, np.int32(len(pairs)))

    def _prefill(self, jobs: list[Prefill]) -> None:
        while jobs:
            size = max(job.chunks[0] for job in jobs)
            tokens, slots, starts, counts = batch = self._empty_prefill(size)
            for i, job in enumerate([job for job in jobs if job.chunks[0] == size][: len(slots)]):
                counts[i] = n = min(job.chunks.pop(0), len(job.tokens))
                tokens[i, :n], slots[i], starts[i] = job.tokens[:n], job.slot, job.start
                job.tokens, job.start = job.tokens[n:], job.start + n
            self._cache = self._dispatch(decode.prefill, self._params, self.config, self._cache, *batch)
            self._counters.update(prefill_tokens=int(counts.sum()), dispatches=1)
            jobs = [job for job in jobs if job.chunks]

    def _empty_prefill(self, size: int) -> tuple[np.ndarray, ...]:
        p = max(1, min(self.slots, _PREFILL_TOKENS.get(jax.default_backend(), 1024) // size))
        nowhere = np.full(p, self.slots, np.int32)
        return np.zeros((p, size), np.int32), nowhere, np.zeros(p, np.int32), np.zeros(p, np.int32)

    def _decode(self) -> None:
        slots = np.flatnonzero(self._books.running)
        if not len(slots):
            return
        if self._mesh is None:
            size = next(size for size in self._sizes if size >= len(slots))
            rows, of = self._books.batch(slots, size), slice(len(slots))
        else:  # each row must stay on the device of its slot
            size, rows, of = self.slots, self._books.batch(np.arange(self.slots), self.slots), slots
        self._cache, out = self._dispatch(
            decode.decode, self._params, self.config, self._cache, rows, self.decode_chunk
        )
        out = jax.device_get(out)
        tokens, logprobs, count, left = (x[..., of] for x in out[:4])
        if not np.isfinite(logprobs).all():  # NaNs in the cache would spoil the next request of the slot
            raise EngineError(f"weights of version {self._version} give log-probs that are not finite")
        self._books.record(slots, tokens, logprobs, count, self._version)
        self._books.rows.left[slots] = left
        for slot in slots[left == 0].tolist():
            self._outbox.append(self._books.finish(slot, "stop" if self._books.stopped(slot) else "length"))
        steps = int(out.steps)
        self._counters.update(
            generated_tokens=int(count.sum()), decode_steps=steps, decode_rows=steps * size, dispatches=1
        )

    def _compile(self) -> None:
        if jax.default_backend() == "cpu" and self._mesh is None and len(self._sizes) == 1:
            self._sizes = [size for size in _COMPACT if size < self.slots and self._agrees(size)] + self._sizes
        for size in self._chunks:
            empty = self._empty_prefill(size)
            self._cache = self._dispatch(decode.prefill, self._params, self.config, self._cache, *empty)
        content = jax.device_get(self._dispatch(kv.read_slot, self._cache, np.int32(0)))
        self._cache = self._dispatch(kv.write_slot, self._cache, np.int32(0), content)
        self._copy([(0, 0)])
        for size in self._sizes:
            nobody = self._books.batch(np.zeros(0, np.int64), size)
            args = self._params, self.config, self._cache, nobody, self.decode_chunk
            self._cache, _ = self._dispatch(decode.decode, *args)
        self._compiled = _compilations[self._thread.ident]

    def _agrees(self, size: int) -> bool:
        """Whether decoding `size` rows is bit-equal to decoding all slots, on a random cache."""
        random = np.random.default_rng(0)
        content = [random.standard_normal(x.shape, np.float32) for x in self._cache]
        rows = self._books.batch(np.arange(self.slots), self.slots)._replace(
            token=random.integers(0, self.config.vocab_size, self.slots, np.int32),
            position=random.integers(0, max(1, self.max_length - self.decode_chunk), self.slots, np.int32),
            left=np.full(self.slots, self.decode_chunk, np.int32),
            temperature=np.ones(self.slots, np.float32),
        )

        def run(rows: decode.Rows) -> decode.Sampled:
            cache = jax.device_put(kv.Cache(*(x.astype(self.config.compute_dtype) for x in content)), self._device)
            return jax.device_get(decode.decode(self._params, self.config, cache, rows, self.decode_chunk)[1])

        some = random.permutation(self.slots)[:size]
        few, every = run(decode.Rows(*(x[some] for x in rows))), run(rows)
        same = (few.tokens == every.tokens[:, some]) & (few.logprobs == every.logprobs[:, some])
        return bool(same.all())


def _resolve(results: list[tuple[Request, Completion | EngineError]]) -> None:
    for request, result in results:
        if request.future.done():
            continue  # cancelled
        if isinstance(result, EngineError):
            request.future.set_exception(result)
        else:
            request.future.set_result(result)


def _close(engine: weakref.ref[LocalEngine]) -> None:
    if (alive := engine()) is not None:
        alive.close()


def _shapes(tree: Any) -> Any:
    return jax.tree.map(np.shape, tree)
