"""Starts sglang-jax's HTTP server with weight updates: python launch.py <arguments of sgl_jax.launch_server>.

sglang-jax (SGLang for TPUs) cannot replace its weights while it runs. This launcher adds that from outside, without
changing the installed package, and makes the server speak the part of SGLang's HTTP interface that a trainer needs:

    POST /update_weights_from_disk {"model_path", "weight_version", "flush_cache"}
    GET  /model_info, /weight_version, /server_info, /ready (503 while paused)
    POST /generate: streamed answers are increments; meta_info has weight_version and, at the end, weight_versions,
         the spans of output tokens per weight version; log-probs match output_ids one to one

How an update works: generation is paused and running requests are retracted (their prefix is recomputed later), the
cache is flushed, and the scheduler's thread loads the folder between two batches. New arrays are checked against the
old ones (shape, dtype), moved to their shardings and swapped in. On any error the old weights stay. Old and new weights
are on the devices together for a moment.

Written for sglang-jax 0.1.0rc0. Child processes import this file too (as __mp_main__), which patches them as well.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import time
import uuid

import jax
from fastapi import Request
from fastapi.responses import JSONResponse
from flax import nnx
from sgl_jax.srt.entrypoints import http_server
from sgl_jax.srt.managers import tokenizer_manager as managers
from sgl_jax.srt.managers.io_struct import (
    ContinueGenerationReqInput,
    GenerateReqInput,
    PauseGenerationReqInput,
)
from sgl_jax.srt.managers.schedule_batch import ScheduleBatch
from sgl_jax.srt.managers.scheduler import Scheduler
from sgl_jax.srt.server_args import ServerArgs
from sgl_jax.srt.utils import kill_process_tree

IMPLEMENTATION = "sglang-jax"
IDLE_SECONDS = 0.001  # between two polls of an idle scheduler, which otherwise takes a whole core


@dataclasses.dataclass
class LoadWeights:
    """To the scheduler: load this folder."""

    path: str
    flush: bool
    rid: str | None = None


@dataclasses.dataclass
class Isolate:
    """To the scheduler: run nothing but what is sent from now on (`on`), then pause and take the others back."""

    on: bool
    rid: str | None = None


@dataclasses.dataclass
class Isolated:
    """From the scheduler: done."""

    rid: str | None = None


@dataclasses.dataclass
class WeightsLoaded:
    """From the scheduler. `sampled`: request id -> tokens that the old weights sampled for it."""

    success: bool
    message: str
    sampled: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    rid: str | None = None


# Scheduler: runs on the scheduler's thread, between two batches.


def after_init(cls, function):
    """Calls `function(instance)` at the end of every construction of `cls`."""
    init = cls.__init__

    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        function(self)

    cls.__init__ = __init__


def load_weights(scheduler, request):
    """Replaces the weights; the answer to a LoadWeights message."""
    began = time.perf_counter()
    waiting, scheduler.waiting_queue = scheduler.waiting_queue, []  # retracted requests hold no cache
    try:
        idle, reason, _ = scheduler.flush_cache() if request.flush else (*scheduler._can_flush_cache(), 0)
    finally:
        scheduler.waiting_queue = waiting
    if not idle:
        return WeightsLoaded(False, f'requests are running; pause with {{"mode": "retract"}} first ({reason})')
    try:
        swap(scheduler.tp_worker.get_model_runner(), request.path)
    except Exception as error:
        return WeightsLoaded(False, f"{type(error).__name__}: {error}")
    sampled = {str(one.rid): len(one.output_ids) for one in waiting}
    return WeightsLoaded(True, "ok", sampled, time.perf_counter() - began)


def swap(runner, path):
    """Loads the folder `path` into the model of `runner`, or raises and leaves the old weights."""
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise FileNotFoundError(f"{path} has no config.json")
    check_shape_of_model(runner.model_config.hf_config, path)
    before, tree = jax.tree_util.tree_flatten(nnx.split(runner.model)[1])
    old_path, runner.model_config.model_path = runner.model_config.model_path, path
    try:
        with jax.set_mesh(runner.mesh):
            runner.model.load_weights(runner.model_config)
        loaded, loaded_tree = jax.tree_util.tree_flatten(nnx.split(runner.model)[1])
        if loaded_tree != tree:
            raise ValueError("the folder has another set of parameters")
        for old, new in zip(before, loaded, strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                raise ValueError(f"a parameter is {new.dtype}{new.shape} instead of {old.dtype}{old.shape}")
        placed = [jax.device_put(new, old.sharding) for old, new in zip(before, loaded, strict=True)]
        jax.block_until_ready(placed)
    except BaseException:
        runner.model_config.model_path = old_path
        nnx.update(runner.model, jax.tree_util.tree_unflatten(tree, before))
        raise
    runner.model_state_leaves = placed


def check_shape_of_model(config, path):
    """Rejects a folder of another architecture before its tensors are read."""
    with open(os.path.join(path, "config.json")) as file:
        other = json.load(file)
    for field in ("architectures", "hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings"):
        ours, theirs = getattr(config, field, None), other.get(field)
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(f"{field} is {theirs!r}, this server runs {ours!r}")


def isolate(scheduler, request):
    """Sets the waiting requests of a paused scheduler aside, or takes them back and pauses again."""
    if request.on:
        scheduler.set_aside, scheduler.waiting_queue = scheduler.waiting_queue, []
        scheduler._engine_paused = False
    else:
        scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
        scheduler.waiting_queue = scheduler.set_aside + scheduler.waiting_queue
        scheduler.set_aside = []
    return Isolated()


def receive_calmly(receive):
    """`Scheduler.recv_requests` that sleeps a moment if there is nothing to do."""

    def recv_requests(self, *args, **kwargs):
        requests = receive(self, *args, **kwargs)
        if not requests and (self._engine_paused or self.is_fully_idle()):
            time.sleep(IDLE_SECONDS)
        return requests

    return recv_requests


def extend_dispatch(scheduler):
    """Adds our messages."""
    scheduler._request_dispatcher._mapping += [
        (LoadWeights, lambda request: load_weights(scheduler, request)),
        (Isolate, lambda request: isolate(scheduler, request)),
    ]


def own_memory(merge):
    """`ScheduleBatch._merge_cache_loc` that returns an array of its own.

    The release returns a view of one buffer that every step overwrites. On a CPU, a JAX array shares the memory of a
    numpy array that is aligned to 64 bytes, which this buffer is in some processes and not in others: there the next
    step can overwrite the cache locations of the running one. This would explain wrong log-probs that were seen once.
    """

    def _merge_cache_loc(self, *args, **kwargs):
        return merge(self, *args, **kwargs).copy()

    return _merge_cache_loc


after_init(Scheduler, extend_dispatch)
ScheduleBatch._merge_cache_loc = own_memory(ScheduleBatch._merge_cache_loc)
Scheduler.recv_requests = receive_calmly(Scheduler.recv_requests)


# Tokenizer manager: runs in the HTTP server's event loop.


def prepare(manager):
    """State for versions and updates."""
    manager.weight_version = "default"
    manager.version_starts = {}  # request id -> [(number of the first token, version)]
    manager.update_lock = asyncio.Lock()
    manager.isolated = ""  # id of the request that may pass while the server is paused
    manager.load_weights = managers._Communicator(manager.send_to_scheduler, 1)
    manager.isolate = managers._Communicator(manager.send_to_scheduler, 1)
    manager._result_dispatcher._mapping += [
        (WeightsLoaded, manager.load_weights.handle_recv),
        (Isolated, manager.isolate.handle_recv),
    ]


def send_one_request(send):
    """`_send_one_request` that records the first weight version and closes the gate behind an isolated request."""

    def _send_one_request(self, obj, *args, **kwargs):
        self.version_starts[str(obj.rid)] = [(0, self.weight_version)]
        self.is_pause |= obj.rid == self.isolated
        return send(self, obj, *args, **kwargs)

    return _send_one_request


def handle_abort(self, message):
    """Ends a request that the scheduler dropped from its queue; an unknown one is ignored."""
    if (state := self.rid_to_state.pop(message.rid, None)) is None:
        return
    state.finished = True
    reason = {"type": "abort", "message": "aborted while it waited"}
    meta = {"id": message.rid, "finish_reason": reason, "prompt_tokens": 0}
    state.out_list.append({"output_ids": list(state.output_ids), "meta_info": meta})
    self._notify_state_event(state)


def spans(starts, count):
    """[{"version", "start", "end"}] of `count` tokens from [(first token, version)]."""
    ends = [*(min(start, count) for start, _ in starts[1:]), count]
    return [
        {"version": version, "start": start, "end": end}
        for (start, version), end in zip(starts, ends, strict=True)
        if end > start
    ]


@contextlib.asynccontextmanager
async def paused(manager):
    """Pauses generation unless it is paused already; running requests are retracted."""
    if manager.is_pause:
        yield
        return
    await manager.pause_generation(PauseGenerationReqInput(mode="retract"))
    try:
        yield
    finally:
        await manager.continue_generation(ContinueGenerationReqInput())


def generate_request(generate):
    """`generate_request` with weight versions, increments in streams, and one log-prob per token.

    A request for log-probs of its prompt runs alone: beside others this release returns wrong ones. All requests get
    log-probs of their output, since this release mixes them up if only some requests in a batch want them.
    """

    async def whole(self, obj, request):
        sent = 0
        async for out in generate(self, obj, request):
            meta, ids = out["meta_info"], out["output_ids"]
            starts = self.version_starts.get(str(obj.rid), [(0, self.weight_version)])
            meta["weight_version"] = self.weight_version
            if meta["finish_reason"]:
                meta["weight_versions"] = spans(starts, len(ids))
            first, sent = sent if obj.stream else 0, len(ids)
            # The list repeats earlier entries; the last ones belong to the tokens.
            entries = meta.get("output_token_logprobs") or []
            if len(entries) < sent:  # a request that was aborted while it waited
                ids, entries = ids[:first], entries[:first]
            entries = entries[len(entries) - len(ids) :]
            if [entry[1] for entry in entries] != list(ids):
                raise RuntimeError("log-probs of other tokens than the output")
            meta["output_token_logprobs"] = entries[first:]
            yield {**out, "output_ids": ids[first:]}

    async def wrapped(self, obj, request=None):
        if not isinstance(obj, GenerateReqInput) or isinstance(obj.rid, list):
            async for out in generate(self, obj, request):
                yield out
            return
        obj.rid = str(obj.rid or uuid.uuid4().hex)
        alone = obj.return_logprob and obj.logprob_start_len not in (None, -1)
        obj.return_logprob = True
        try:
            if not alone:
                async for out in whole(self, obj, request):
                    yield out
                return
            async with self.update_lock, paused(self):
                await self.isolate(Isolate(True))
                self.isolated, self.is_pause = obj.rid, False
                try:
                    answers = [out async for out in whole(self, obj, request)]
                finally:
                    self.isolated, self.is_pause = "", True
                    await self.isolate(Isolate(False))
            yield answers[-1]
        finally:
            self.version_starts.pop(obj.rid, None)

    return wrapped


after_init(managers.TokenizerManager, prepare)
managers.TokenizerManager._send_one_request = send_one_request(managers.TokenizerManager._send_one_request)
managers.TokenizerManager.generate_request = generate_request(managers.TokenizerManager.generate_request)
managers.TokenizerManager._handle_abort_req = handle_abort


# HTTP.


def manager_of_server():
    """The tokenizer manager, with its receiving task running."""
    manager = http_server._global_state.tokenizer_manager
    manager.auto_create_handle_loop()
    return manager


@http_server.app.post("/update_weights_from_disk")
async def update_weights_from_disk(request: Request):
    """Replaces the weights; pauses and continues by itself unless the server is paused already."""
    body, manager = await request.json(), manager_of_server()
    async with manager.update_lock, paused(manager):
        (loaded,) = await manager.load_weights(LoadWeights(str(body["model_path"]), body.get("flush_cache", True)))
        if loaded.success:
            manager.model_path = manager.server_args.model_path = body["model_path"]
            manager.weight_version = str(body.get("weight_version") or manager.weight_version)
            for rid, count in loaded.sampled.items():
                if rid in manager.version_starts:
                    manager.version_starts[rid].append((count, manager.weight_version))
    content = {"success": loaded.success, "message": loaded.message, "seconds": loaded.seconds}
    return JSONResponse(content, 200 if loaded.success else 400)


@http_server.app.get("/model_info")
@http_server.app.get("/weight_version")
async def model_info():
    """The folder of the weights and their version."""
    manager = manager_of_server()
    return {"model_path": manager.model_path, "weight_version": manager.weight_version}


@http_server.app.get("/server_info")
async def server_info():
    """The implementation and its limits."""
    state = http_server._global_state
    return {
        "implementation": IMPLEMENTATION,
        "version": http_server.__version__,
        "context_length": state.tokenizer_manager.context_len,
        "max_total_num_tokens": state.scheduler_info.get("max_total_num_tokens"),
        "incremental_streaming_output": True,
    }


@http_server.app.get("/ready")
async def ready():
    """503 while generation is paused; the short pauses of updates and scoring do not count."""
    manager = manager_of_server()
    waits = manager.is_pause and not manager.update_lock.locked()
    return JSONResponse({"paused": waits}, 503 if waits else 200)


if __name__ == "__main__":
    try:
        arguments = ServerArgs.from_cli(sys.argv[1:])
        arguments.stream_output = False  # generate_request makes the increments; upstream's may skip tokens
        http_server.launch(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
