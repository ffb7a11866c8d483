"""Publishes weights: one Hugging Face folder per version, for engines that load from a path.

`root` is a path that all servers see: a shared file system, a mounted bucket, or a tmpfs on one machine. A version
becomes visible by its manifest, published.json, which is written last; no directory has to be renamed. The last two
versions stay, since a server that comes back may still be reading the previous one. Each process writes its share of
the files with several threads, while the next tensors come from the devices.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import functools
import json
import math
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from open_agentrl_jax.algorithms.logprobs import token_logprobs
from open_agentrl_jax.models import export, hf, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.params import TABLE
from open_agentrl_jax.models.tensor_files import header
from open_agentrl_jax.parallel import processes, sharding
from open_agentrl_jax.parallel.mesh import current_mesh
from open_agentrl_jax.storage import read_text
from open_agentrl_jax.train import spare
from open_agentrl_jax.types import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FILE_BYTES = 2**30
_AHEAD = 3  # tensors on their way from the devices
_WRITERS = min(8, os.cpu_count() or 1)
_PIECE = 2**23  # bytes that a writer rounds, transposes and writes at once, in memory that it reuses
_STRIP = 16  # rows transposed at once: half a cache line of the result
_memory = threading.local()
_DTYPE = "bfloat16"
MANIFEST = "published.json"


def version_path(root: str | os.PathLike[str], version: int) -> pathlib.Path:
    """Where `publish_weights` writes a version."""
    return pathlib.Path(root) / f"v{version:08d}"


def is_published(folder: pathlib.Path) -> bool:
    """Whether a version is complete: the manifest is there and every file has its size."""
    try:
        files = json.loads(read_text(folder / MANIFEST))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def publish_weights(
    params: qwen.Params,
    model_config: ModelConfig,
    root: str | os.PathLike[str],
    version: int,
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
    keep: int = 2,
    shared: bool = True,
) -> pathlib.Path:
    """Writes the parameters as bfloat16 to `version_path(root, version)`. With several processes all must call it.

    Args:
        params: see models/qwen.py, sharded or not.
        model_config: the config of the parameters.
        root: a folder for versions only.
        version: an existing version of this number is replaced.
        tokenizer_from: a folder whose tokenizer and generation_config.json are copied.
        keep: number of versions to keep, including this one.
        shared: all processes see `root` and write their share; otherwise the first process writes everything.

    Returns:
        The folder.

    Raises:
        UserError: the disk is full, or `root` cannot be written. Earlier versions stay as they are.
    """
    target = version_path(root, version)
    me, count = _process()
    writers = count if shared else 1
    files = _plan(params)
    with _reported(target):
        if me == 0:
            spare.drop(target)
            spare.reuse(target, files.keys())
            source = None if tokenizer_from is None else hf.resolve(tokenizer_from, weights=False)
            export.write_configs(target, model_config, _DTYPE, list(files.values()), tokenizer_from=source)
    with _reported(target), ThreadPoolExecutor(_WRITERS) as threads:
        failures: list[OSError] = []
        for number, (name, tensors) in enumerate(files.items()):
            mine = number % writers == me
            arrays = _gathered(params, tensors, to_host=mine)
            try:
                if mine and not failures:
                    _write(target / name, tensors, arrays, threads)
            except OSError as error:
                failures.append(error)
            for _ in arrays:
                pass  # this process takes part in gathering even if its own disk is full
        if failures:
            raise failures[0]
    with _reported(target):
        if me == 0:
            sizes = {file.name: file.stat().st_size for file in target.iterdir()}
            (target / MANIFEST).write_text(json.dumps({"version": version, "files": sizes}))
            _evict(target, keep)
    return target


def _evict(newest: pathlib.Path, keep: int) -> None:
    """Removes old versions, and what a killed run left unfinished."""
    versions = sorted(path for path in newest.parent.glob("v*") if re.fullmatch(r"v\d{8}", path.name))
    complete = [path for path in versions if path <= newest and is_published(path)]
    for path in versions:
        if path <= newest and path not in complete[-keep:]:
            spare.retire(path)


def start_replay(params: qwen.Params, model_config: ModelConfig, ids: Sequence[int]) -> Callable[[], np.ndarray]:
    """Starts to compute the log-probs of a published version, to check that a server has these weights.

    The parameters are rounded to bfloat16 as the files are. With several processes all must call it.

    Returns:
        A function that waits for the result, in any thread: [t] log-probs (nats, temperature 1) of ids[i] given
        ids[:i]; the first is 0.
    """
    leaf = jax.tree.leaves(params)[0]
    mesh: Any = leaf.sharding.mesh if isinstance(leaf.sharding, jax.sharding.NamedSharding) else None
    # As many rows, and parts per row, as the mesh cuts a batch into; the padding comes last, so no token attends to it.
    rows, parts = (1, 1) if mesh is None else (sharding.ways(axes, mesh) for axes in sharding.HIDDEN[:2])
    tokens = np.repeat(np.pad(np.asarray(ids, np.int32), (0, -len(ids) % parts))[None], rows, 0)
    targets = np.roll(tokens, -1, axis=1)  # in numpy: newer JAX does not roll an axis sharded over seq
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        placed = (tokens, targets) if mesh is None else jax.device_put((tokens, targets), sharding.TOKENS)
        logprobs = _replay(params, model_config, *placed)
    return lambda: np.concatenate([[0.0], np.asarray(logprobs)])[: len(ids)].astype(np.float32)


def replayed_logprobs(params: qwen.Params, model_config: ModelConfig, ids: Sequence[int]) -> np.ndarray:
    """The result of `start_replay`."""
    return start_replay(params, model_config, ids)()


@functools.partial(jax.jit, static_argnames="model_config")
def _replay(params: qwen.Params, model_config: ModelConfig, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    # Rounded where they are used: a second copy of all parameters would take longer than the forward pass.
    hidden = qwen.forward(params, model_config, tokens, positions, jnp.ones_like(tokens), stored=export.rounded)
    logprobs, _ = token_logprobs(hidden, export.rounded(qwen.unembedding(params, model_config)), targets)
    return (logprobs if current_mesh() is None else jax.reshard(logprobs, jax.P()))[0, :-1]


@contextlib.contextmanager
def _reported(target: pathlib.Path) -> Iterator[None]:
    """Turns the failure of one process into an error of all, removes the unfinished version and names the cure."""
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    if not processes.any_of(failure is not None):
        return
    if _process()[0] == 0:
        with contextlib.suppress(OSError):
            spare.drop(target)
    if failure is not None and failure.errno in _FULL:
        free = shutil.disk_usage(target.parent).free / 1e9
        raise UserError(
            f"rollout.weights_dir: {target.parent} is full, {free:.2f} GB are left and {target.name} needs more; "
            "free some, or choose another path (the versions before it are untouched)"
        ) from failure
    raise UserError(f"rollout.weights_dir: cannot write {target}: {failure or 'another process failed'}") from failure


def _process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def _plan(params: qwen.Params) -> dict[str, list[export.Tensor]]:
    """File name -> its tensors; a file holds about a gigabyte."""
    shards = export.plan(params, 2, _FILE_BYTES)
    return {export.shard_name(number, len(shards)): shard for number, shard in enumerate(shards)}


def _gathered(params: qwen.Params, tensors: list[export.Tensor], *, to_host: bool) -> Iterator[jax.Array | np.ndarray]:
    """The tensors in the layout of the files, gathered on the devices a few ahead and, if `to_host`, copied from there.

    One thread gathers them, in the same order in every process: that may be a collective. Parameters in host memory
    are viewed without a copy; the writers round and transpose them piece by piece.
    """
    if _in_memory(params):
        yield from (export.host_view(params, tensor) for tensor in tensors)
        return
    coming: collections.deque[jax.Array] = collections.deque()
    for tensor in tensors:
        coming.append(export.gather_on_device(params, tensor, _DTYPE, transposed=True))
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
    """Writes one file in pieces with all writers at once."""
    head, size = header({tensor.name: tensor.shape for tensor in tensors}, _DTYPE)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file:  # over a spare
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
            concurrent.futures.wait(running)  # they use the open file


def _put(file: int, place: int, array: jax.Array | np.ndarray, rows: slice, transposed: bool) -> None:
    """Writes some rows of a tensor at `place`; a numpy array has the layout of the parameters, not of the file."""
    if isinstance(array, jax.Array):
        block = np.ascontiguousarray(np.asarray(array)[rows])
    else:
        block = _as_filed(array[:, rows] if transposed else array[rows], transposed)
    left = block.reshape(-1).view(np.uint8).data
    while left:  # a call may write less than all of it
        written = os.pwrite(file, left, place)
        left, place = left[written:], place + written


def _as_filed(piece: np.ndarray, transposed: bool) -> np.ndarray:
    """Rounds and transposes in memory that the thread reuses: touching new memory would take longer than both."""
    rounded = _kept("rounded", piece.shape, jnp.bfloat16)
    np.copyto(rounded, piece, casting="unsafe")
    if not transposed:
        return rounded
    bits, turned = rounded.view(np.uint16), _kept("turned", piece.shape[::-1], np.uint16)
    for start in range(0, len(bits), _STRIP):
        turned[:, start : start + _STRIP] = bits[start : start + _STRIP].T
    return turned


def _kept(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised memory that this thread reuses."""
    size = math.prod(shape)
    memory = getattr(_memory, name, None)
    if memory is None or memory.size < size:
        memory = np.empty(max(size, _PIECE // 2), dtype)
        setattr(_memory, name, memory)
    return memory[:size].reshape(shape)
