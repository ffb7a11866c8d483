"""Weights out: a Hugging Face folder a version, whole or not at all, for engines that load from a path.

`root` is a path that all servers see: a shared file system, or a tmpfs on one machine. A version is written beside its
name and renamed; the last two stay, as a server that comes back may still be reading the one before. Each process
writes its own share of the files, with several threads, while the next tensors come from the devices.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import functools
import math
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from open_agentrl_jax.algorithms.logprobs import token_logprobs
from open_agentrl_jax.models import export, hf, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.params import TABLE
from open_agentrl_jax.models.tensor_files import header
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.parallel.mesh import current_mesh
from open_agentrl_jax.train import spare
from open_agentrl_jax.types import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FILE_BYTES = 2**30
_AHEAD = 3  # tensors on their way from the devices
_WRITERS = min(8, os.cpu_count() or 1)
_PIECE = 2**23  # bytes that a writer rounds, turns and writes at once, in memory that it keeps
_STRIP = 16  # rows turned at once: half a cache line of the result
_memory = threading.local()
_DTYPE = "bfloat16"


def version_path(root: str | os.PathLike[str], version: int) -> pathlib.Path:
    """Where `publish_weights` puts a version."""
    return pathlib.Path(root) / f"v{version:08d}"


def publish_weights(
    params: qwen.Params,
    model_config: ModelConfig,
    root: str | os.PathLike[str],
    version: int,
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
    frozen: Collection[str] = (),
    unchanged_from: str | os.PathLike[str] | None = None,
    keep: int = 2,
) -> pathlib.Path:
    """Writes the parameters as bfloat16 in `version_path(root, version)`. With several processes all must call it.

    Args:
        params: see models/qwen.py, sharded or not.
        model_config: what the parameters are.
        root: a folder for versions only.
        version: a version that is there already is replaced.
        tokenizer_from: a folder whose tokenizer and generation_config.json go along.
        frozen: our paths ("embed", "layers/q", ...) of parameters that are not trained; they get files of their own.
        unchanged_from: what an earlier call of this run with the same `frozen` returned; the files of the frozen
            parameters are linked from there, not written.
        keep: versions that stay, this one included.

    Returns:
        The folder.

    Raises:
        UserError: the disk is full, or `root` cannot be written. Earlier versions stay as they are.
    """
    target = version_path(root, version)
    temporary = target.with_name(f".{target.name}.tmp")
    me, processes = _process()
    files = _plan(params, frozen)
    linked = {
        name for name, tensors in files.items() if unchanged_from and all(tensor.path in frozen for tensor in tensors)
    }
    with _reported(target):
        if me == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            spare.reuse(temporary, files.keys() - linked)
            source = None if tokenizer_from is None else hf.resolve(tokenizer_from, weights=False)
            export.write_configs(temporary, model_config, _DTYPE, list(files.values()), tokenizer_from=source)
    with _reported(target, temporary), ThreadPoolExecutor(_WRITERS) as writers:
        failures: list[OSError] = []
        for number, (name, tensors) in enumerate(files.items()):
            if unchanged_from is not None and name in linked:
                if me == 0:
                    os.link(pathlib.Path(unchanged_from) / name, temporary / name)
                continue
            arrays = _taken(params, tensors, to_host=number % processes == me)
            try:
                if number % processes == me and not failures:
                    _write(temporary / name, tensors, arrays, writers)
            except OSError as error:
                failures.append(error)
            for _ in arrays:
                pass  # this process takes part in gathering, also where its own disk is full
        if failures:
            raise failures[0]
    with _reported(target, temporary):
        if me == 0:
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            kept = sorted(path for path in target.parent.glob("v*") if re.fullmatch(r"v\d{8}", path.name))
            for old in [path for path in kept if path <= target][:-keep]:
                spare.retire(old)
    return target


def start_replay(params: qwen.Params, model_config: ModelConfig, ids: Sequence[int]) -> Callable[[], np.ndarray]:
    """What `publish_weights` writes, replayed by this trainer: the proof that a server has these weights.

    The parameters are rounded to bfloat16 as the files are. With several processes all must call it.

    Returns:
        What waits for it, in any thread: [t] log-probs (nats, temperature 1) of ids[i] given ids[:i]; the first is 0.
    """
    leaf = jax.tree.leaves(params)[0]
    mesh: Any = leaf.sharding.mesh if isinstance(leaf.sharding, jax.sharding.NamedSharding) else None
    # As many rows, and as many parts of one, as the mesh cuts a batch into; what fills the last part is seen by none.
    rows, parts = (1, 1) if mesh is None else (sharding.ways(axes, mesh) for axes in sharding.HIDDEN[:2])
    tokens = np.repeat(np.pad(np.asarray(ids, np.int32), (0, -len(ids) % parts))[None], rows, 0)
    targets = np.roll(tokens, -1, axis=1)  # here: what lies in parts over seq is not rolled by newer releases of jax
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        placed = (tokens, targets) if mesh is None else jax.device_put((tokens, targets), sharding.TOKENS)
        logprobs = _replay(params, model_config, *placed)
    return lambda: np.concatenate([[0.0], np.asarray(logprobs)])[: len(ids)].astype(np.float32)


def replayed_logprobs(params: qwen.Params, model_config: ModelConfig, ids: Sequence[int]) -> np.ndarray:
    """`start_replay`, waited for."""
    return start_replay(params, model_config, ids)()


@functools.partial(jax.jit, static_argnames="model_config")
def _replay(params: qwen.Params, model_config: ModelConfig, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    # Rounded where it is used: no second copy of all parameters, which would take longer than the forward.
    hidden = qwen.forward(params, model_config, tokens, positions, jnp.ones_like(tokens), stored=export.rounded)
    logprobs, _ = token_logprobs(hidden, export.rounded(qwen.unembedding(params, model_config)), targets)
    return (logprobs if current_mesh() is None else jax.reshard(logprobs, jax.P()))[0, :-1]


@contextlib.contextmanager
def _reported(target: pathlib.Path, temporary: pathlib.Path | None = None) -> Iterator[None]:
    """Makes a process's failure the failure of all, so that none waits for it, and says what to do about it."""
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    if not _any_process(failure is not None):
        return
    if temporary is not None and _process()[0] == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    if failure is not None and failure.errno in _FULL:
        free = shutil.disk_usage(target.parent).free / 1e9
        raise UserError(
            f"rollout.weights_dir: {target.parent} is full, {free:.2f} GB are left and {target.name} needs more; "
            "free some, or choose another path (the versions before it are untouched)"
        ) from failure
    raise UserError(f"rollout.weights_dir: cannot write {target}: {failure or 'another process failed'}") from failure


def _process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def _any_process(condition: bool) -> bool:
    """Whether it holds in any process; all wait for each other here."""
    if jax.process_count() == 1:
        return condition
    return bool(np.any(multihost_utils.process_allgather(np.array([condition]))))


def _plan(params: qwen.Params, frozen: Collection[str]) -> dict[str, list[export.Tensor]]:
    """File name -> its tensors. Files hold about a gigabyte, and either frozen or trained parameters."""
    paths = {sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if unknown := set(frozen) - paths:
        raise UserError(f"frozen: {', '.join(sorted(unknown))}: no such parameter; they are called like 'layers/q'")
    shards = export.plan(params, 2, _FILE_BYTES, frozen)
    return {export.shard_name(number, len(shards)): shard for number, shard in enumerate(shards)}


def _taken(params: qwen.Params, tensors: list[export.Tensor], *, to_host: bool) -> Iterator[jax.Array | np.ndarray]:
    """The tensors: as files hold them, on the devices and, `to_host`, on their way from there, a few computed ahead.

    One thread asks for them, in the same order in every process: that may be a collective. What lies in this host's
    memory is only looked at, as it lies there: writers round and turn it without a copy of the whole.
    """
    if _in_memory(params):
        yield from (export.look(params, tensor) for tensor in tensors)
        return
    coming: collections.deque[jax.Array] = collections.deque()
    for tensor in tensors:
        coming.append(export.take(params, tensor, _DTYPE, turned=True))
        if to_host:
            coming[-1].copy_to_host_async()
        if len(coming) > _AHEAD:
            yield coming.popleft().block_until_ready()
    while coming:
        yield coming.popleft().block_until_ready()


def _in_memory(params: qwen.Params) -> bool:
    devices = {device for leaf in jax.tree.leaves(params) for device in leaf.sharding.device_set}
    return len(devices) == 1 and devices.pop().platform == "cpu"


def _write(
    path: pathlib.Path,
    tensors: list[export.Tensor],
    arrays: Iterator[jax.Array | np.ndarray],
    writers: ThreadPoolExecutor,
) -> None:
    """One file, in pieces, by all writers at once."""
    head, size = header({tensor.name: tensor.shape for tensor in tensors}, _DTYPE)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file:  # over a spare one, if any
        file.truncate(len(head) + size)
        file.write(head)
        place = len(head)
        running: collections.deque[Future[None]] = collections.deque()
        try:
            for tensor, array in zip(tensors, arrays, strict=True):
                row = 2 * tensor.size // tensor.shape[0]
                rows = max(1, _PIECE // row)
                for start in range(0, tensor.shape[0], rows):
                    piece = slice(start, start + rows)
                    running.append(
                        writers.submit(
                            _put, file.fileno(), place + start * row, array, piece, TABLE[tensor.path].transposed
                        )
                    )
                    if len(running) > 4 * _WRITERS:
                        running.popleft().result()
                place += 2 * tensor.size
            while running:
                running.popleft().result()
        finally:
            concurrent.futures.wait(running)  # the file stays open for them


def _put(file: int, place: int, array: jax.Array | np.ndarray, rows: slice, transposed: bool) -> None:
    """Writes some rows of a file's tensor at `place`; a numpy array is as parameters are, not as files are."""
    if isinstance(array, jax.Array):
        block = np.ascontiguousarray(np.asarray(array)[rows])
    else:
        block = _as_filed(array[:, rows] if transposed else array[rows], transposed)
    left = block.reshape(-1).view(np.uint8).data
    while left:  # a call may write a part
        written = os.pwrite(file, left, place)
        left, place = left[written:], place + written


def _as_filed(piece: np.ndarray, transposed: bool) -> np.ndarray:
    """Rounded and turned; valid until the thread's next call. Touching new memory would take longer than both."""
    rounded = _kept("rounded", piece.shape, jnp.bfloat16)
    np.copyto(rounded, piece, casting="unsafe")
    if not transposed:
        return rounded
    bits, turned = rounded.view(np.uint16), _kept("turned", piece.shape[::-1], np.uint16)
    for start in range(0, len(bits), _STRIP):
        turned[:, start : start + _STRIP] = bits[start : start + _STRIP].T
    return turned


def _kept(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory of this thread's, with whatever was in it."""
    size = math.prod(shape)
    memory = getattr(_memory, name, None)
    if memory is None or memory.size < size:
        memory = np.empty(max(size, _PIECE // 2), dtype)
        setattr(_memory, name, memory)
    return memory[:size].reshape(shape)
