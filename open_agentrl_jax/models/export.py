"""The writer of Hugging Face folders: export and publishing share one plan of files and one set of configs."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from open_agentrl_jax.models import lora
from open_agentrl_jax.models.config import DTYPES, ModelConfig
from open_agentrl_jax.models.folders import check_target, copy_tokenizer, replacing, resolve
from open_agentrl_jax.models.params import TABLE, Params, abstract_params
from open_agentrl_jax.models.tensor_files import write_tensors
from open_agentrl_jax.parallel.sharding import path_name
from open_agentrl_jax.storage import read_text
from open_agentrl_jax.types import UserError


class Tensor(NamedTuple):
    """One tensor of a Hugging Face file and the parameter, or the part of a stacked parameter, that it stores."""

    name: str  # in the file
    shape: tuple[int, ...]  # in the file
    path: str  # of the parameter
    index: tuple[int, ...]  # of the tensor in it: (), (layer,) or (layer, expert)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensors_of(path: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield the Hugging Face tensors that make up the parameter of `shape` at `path`."""
    row = TABLE[path]
    stacked = row.name.count("{}")
    one = shape[stacked:][::-1] if row.transposed else shape[stacked:]
    for index in np.ndindex(shape[:stacked]):
        yield Tensor(row.name.format(*index), one, path, index)


def save_pretrained(
    path: str | os.PathLike[str],
    model_config: ModelConfig,
    params: Params,
    *,
    dtype: str = "float32",
    tokenizer_from: str | os.PathLike[str] | None = None,
    stop_ids: Sequence[int] = (),
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a Hugging Face folder: sharded safetensors, index, configs, tokenizer and chat templates.

    A failed export leaves an earlier one as it was. Readers refuse a folder whose export was killed halfway. One matrix
    of one layer is in host memory at a time. All processes must call it; the first one writes.

    Args:
      path: the folder; it may be absent, empty, or an earlier export.
      model_config: the model.
      params: see models/qwen.py, sharded or not; adapters are merged, one matrix at a time.
      dtype: of the file, "float32" or "bfloat16".
      tokenizer_from: folder or Hub id; its tokenizer files and generation_config.json are copied.
      stop_ids: tokens that end a turn; added to eos_token_id in config.json and generation_config.json.
      max_shard_bytes: size above which a new file is started.

    Raises:
      UserError: an unknown dtype, a path that holds other files, a tokenizer folder without a tokenizer.
    """
    target = pathlib.Path(path)
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    check_target(target)
    source = None
    if tokenizer_from is not None:
        source = resolve(tokenizer_from, weights=False)
        if not any((source / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise UserError(f"{source}: tokenizer.json: missing; give a folder with a tokenizer")
    shards = plan(abstract_params(lora.without(model_config)), jnp.dtype(dtype).itemsize, max_shard_bytes)
    writer = jax.process_index() == 0
    with replacing(target) if writer else contextlib.nullcontext(target) as folder:
        for number, shard in enumerate(shards):
            fetched = (gather_to_host(*_merged(params, model_config, tensor), dtype) for tensor in shard)
            arrays = (x.T if TABLE[t.path].transposed else x for t, x in zip(shard, fetched, strict=True))
            if writer:
                shapes = {tensor.name: tensor.shape for tensor in shard}
                write_tensors(folder / shard_name(number, len(shards)), shapes, dtype, arrays)
            else:
                for _ in arrays:
                    pass  # the other processes take part in gathering
        if writer:
            write_configs(folder, model_config, dtype, shards, tokenizer_from=source, stop_ids=stop_ids)


def _merged(params: Params, model_config: ModelConfig, tensor: Tensor) -> tuple[Params, Tensor]:
    """Where the values of a tensor are: in the parameters, or in a matrix of their own if an adapter changes it."""
    name = tensor.path.removeprefix("layers/")
    if model_config.lora is None or not tensor.index or not lora.is_merged(params, name):
        return params, tensor
    matrix = lora.merged_matrix(params, model_config, name, *tensor.index)
    return {"layers": {name: matrix}}, tensor._replace(index=())


def plan(params: Params, itemsize: int, max_bytes: int) -> list[list[Tensor]]:
    """The tensors of each file, layer by layer; a file holds about `max_bytes`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    tensors = [tensor for path, leaf in leaves for tensor in tensors_of(path_name(path), leaf.shape)]
    shards: list[list[Tensor]] = []
    size = math.inf
    for tensor in sorted(tensors, key=lambda t: t.index[:1]):
        if size + tensor.size * itemsize > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size * itemsize
    return shards


def shard_name(number: int, count: int) -> str:
    """The name of file `number`, from 0, of `count`."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_configs(
    folder: pathlib.Path,
    config: ModelConfig,
    dtype: str,
    shards: list[list[Tensor]],
    *,
    tokenizer_from: pathlib.Path | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Write config.json, generation_config.json, the index of several files, and the tokenizer's files."""
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, folder)
    hf = config.to_hf()
    hf["eos_token_id"] = _with_stops(hf["eos_token_id"], stop_ids)
    generation: dict[str, Any] = {}
    if (folder / "generation_config.json").exists():
        with contextlib.suppress(ValueError):
            generation = json.loads(read_text(folder / "generation_config.json"))
        if stop_ids:
            generation["eos_token_id"] = _with_stops(generation.get("eos_token_id"), stop_ids)
    else:
        ids = {name: hf[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {name: value for name, value in ids.items() if value is not None}
    files = {"generation_config.json": generation, "config.json": {**hf, "dtype": dtype, "torch_dtype": dtype}}
    if len(shards) > 1:
        total = sum(tensor.size * jnp.dtype(dtype).itemsize for shard in shards for tensor in shard)
        weight_map = {t.name: shard_name(n, len(shards)) for n, shard in enumerate(shards) for t in shard}
        files["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _with_stops(eos: int | list[int] | None, stop_ids: Sequence[int]) -> int | list[int] | None:
    ids = list(eos) if isinstance(eos, list) else [] if eos is None else [eos]
    ids += [token for token in stop_ids if token not in ids]
    return ids[0] if len(ids) == 1 else ids or None


def gather_to_host(params: Params, tensor: Tensor, dtype: str) -> np.ndarray:
    """One tensor on the host, in the layout of the parameter. All processes must call it."""
    array = np.asarray(gather_on_device(params, tensor, dtype))
    return array.view(jnp.bfloat16) if dtype == "bfloat16" else array


def gather_on_device(params: Params, tensor: Tensor, dtype: str, *, transposed: bool = False) -> jax.Array:
    """One tensor, replicated on its devices; bfloat16 as its bits in uint16. Returns before it is computed.

    All processes must call it, in the same order. `transposed`: in the layout of the file (see `Row.transposed`).
    """
    value, whole = _parameter(params, tensor), None
    if isinstance(value, jax.Array) and isinstance(value.sharding, jax.sharding.NamedSharding):
        whole = jax.sharding.NamedSharding(value.sharding.mesh, jax.P())
    return _taker(dtype, whole, transposed and TABLE[tensor.path].transposed)(value, tensor.index)


def host_view(params: Params, tensor: Tensor) -> np.ndarray:
    """A view of one tensor in this host's memory, in its own dtype and the layout of the parameter; do not write."""
    return np.asarray(_parameter(params, tensor))[tensor.index]


def _parameter(params: Params, tensor: Tensor) -> Any:
    return functools.reduce(lambda tree, key: tree[key], tensor.path.split("/"), params)


@functools.cache
def _taker(dtype: str, whole: jax.sharding.NamedSharding | None, transpose: bool) -> Callable[..., jax.Array]:
    # Cast on the device: half the bytes cross. The index is traced: one compilation per parameter.
    def take(value: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        for number in index:
            value = jax.lax.dynamic_index_in_dim(value, number, keepdims=False)
        if dtype == "bfloat16":  # by its bits: XLA's CPU backend takes twelve times as long for a cast
            bits = jax.lax.bitcast_convert_type(rounded(value.astype("float32")), jnp.uint32)
            value = (bits >> 16).astype(jnp.uint16)
        else:
            value = value.astype(dtype)
        return value.T if transpose else value

    return jax.jit(take, out_shardings=whole)


def rounded(value: jax.Array) -> jax.Array:
    """`value` in its own dtype, rounded to the nearest bfloat16 number."""
    precision = jnp.finfo(jnp.bfloat16)
    return jax.lax.reduce_precision(value, precision.nexp, precision.nmant)
