"""Hugging Face folders in and out: THE table HF name <-> our path, a sharded reader, a streaming writer."""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from open_agentrl_jax.models import qwen
from open_agentrl_jax.models.config import DTYPES, ModelConfig
from open_agentrl_jax.models.tensor_files import TensorFiles, write_tensors
from open_agentrl_jax.parallel.sharding import path_name
from open_agentrl_jax.types import UserError


class Entry(NamedTuple):
    """How one parameter is called and lies in a Hugging Face file; "{}" is the layer's number."""

    name: str
    transposed: bool = False  # theirs is [out in], ours [in out]


TABLE: dict[str, Entry] = {
    "embed": Entry("model.embed_tokens.weight"),
    "norm": Entry("model.norm.weight"),
    "head": Entry("lm_head.weight", transposed=True),
    "layers/attn_norm": Entry("model.layers.{}.input_layernorm.weight"),
    "layers/mlp_norm": Entry("model.layers.{}.post_attention_layernorm.weight"),
    "layers/q": Entry("model.layers.{}.self_attn.q_proj.weight", transposed=True),
    "layers/k": Entry("model.layers.{}.self_attn.k_proj.weight", transposed=True),
    "layers/v": Entry("model.layers.{}.self_attn.v_proj.weight", transposed=True),
    "layers/o": Entry("model.layers.{}.self_attn.o_proj.weight", transposed=True),
    "layers/q_bias": Entry("model.layers.{}.self_attn.q_proj.bias"),
    "layers/k_bias": Entry("model.layers.{}.self_attn.k_proj.bias"),
    "layers/v_bias": Entry("model.layers.{}.self_attn.v_proj.bias"),
    "layers/q_norm": Entry("model.layers.{}.self_attn.q_norm.weight"),
    "layers/k_norm": Entry("model.layers.{}.self_attn.k_norm.weight"),
    "layers/gate": Entry("model.layers.{}.mlp.gate_proj.weight", transposed=True),
    "layers/up": Entry("model.layers.{}.mlp.up_proj.weight", transposed=True),
    "layers/down": Entry("model.layers.{}.mlp.down_proj.weight", transposed=True),
}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def load_pretrained(
    path: str | os.PathLike[str],
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "float32",
    *,
    on_read: Callable[[str], None] | None = None,
) -> tuple[ModelConfig, qwen.Params]:
    """Read a Hugging Face folder straight into the shardings of `mesh`.

    Each shard is read from the files by itself and handed to its device: a host never holds more than the largest shard
    of one stacked parameter beyond what its devices hold.

    Args:
      path: a folder with config.json and safetensors files, or a Hub id "org/name".
      mesh: where the parameters go; None is the default device.
      dtype: of the parameters in memory.
      on_read: called with the name of each tensor read (for progress).

    Returns:
      The model config and the parameters (see models/qwen.py).

    Raises:
      UserError: the folder, its config, or a tensor that is unknown, missing, duplicate or misshaped.
    """
    folder = resolve(path)
    config = ModelConfig.from_hf(folder)
    files = TensorFiles(folder)
    abstract = qwen.abstract_params(config)
    shardings = qwen.param_shardings(config, mesh) if mesh is not None else None
    _check_tensors(files, config, abstract)

    def read(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, where: Any = None) -> jax.Array:
        reader = _reader(files, path_name(path), leaf.shape, jnp.dtype(dtype), on_read)
        if where is None:
            return jax.device_put(reader((slice(None),) * leaf.ndim))
        return _place(leaf.shape, where, reader)

    rest = (abstract,) if shardings is None else (abstract, shardings)
    return config, jax.tree_util.tree_map_with_path(read, *rest)


def describe(path: str | os.PathLike[str]) -> tuple[ModelConfig, qwen.Params]:
    """Config and parameters of a folder as ShapeDtypeStructs in the files' own dtypes, checked as when loaded."""
    folder = resolve(path)
    config, files = ModelConfig.from_hf(folder), TensorFiles(folder)
    abstract = qwen.abstract_params(config)
    _check_tensors(files, config, abstract)

    def of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        first = next(tensors_of(path_name(path), leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, files.dtype[first.name])

    return config, jax.tree_util.tree_map_with_path(of, abstract)


def save_pretrained(
    path: str | os.PathLike[str],
    model_config: ModelConfig,
    params: qwen.Params,
    *,
    dtype: str = "float32",
    tokenizer_from: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a Hugging Face folder: sharded safetensors, index, configs, tokenizer and chat template.

    The folder appears whole or not at all: it is written beside `path` and renamed. One matrix of one layer is in host
    memory at a time. With several processes all must call it; the first one writes.

    Args:
      path: the folder to make; an earlier export there is replaced, anything else is not.
      model_config: what the parameters are.
      params: see models/qwen.py, sharded or not.
      dtype: "float32" or "bfloat16", of the file.
      tokenizer_from: folder (or Hub id) whose tokenizer files and generation_config.json are copied.
      max_shard_bytes: size above which a further file is begun.

    Raises:
      UserError: an unknown dtype, a path that is something else, a tokenizer folder without a tokenizer.
    """
    target = pathlib.Path(path)
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if target.exists() and not (target / "config.json").exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is no exported model; choose another path or remove it")
    source = resolve(tokenizer_from) if tokenizer_from is not None else None
    copied = [source / name for name in TOKENIZER_FILES if (source / name).exists()] if source else []
    if source and (source / "generation_config.json").exists():
        copied.append(source / "generation_config.json")
    if source and not any(file.name in ("tokenizer.json", "vocab.json") for file in copied):
        raise UserError(f"{source}: tokenizer.json: not there; give a folder with a tokenizer")

    shards = _plan(model_config, jnp.dtype(dtype).itemsize, max_shard_bytes)
    temporary = target.with_name(f".{target.name}.tmp")
    writer = jax.process_index() == 0
    if writer:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
    try:
        for number, shard in enumerate(shards):
            fetched = (fetch(params, tensor, dtype) for tensor in shard)
            arrays = (x.T if TABLE[t.path].transposed else x for t, x in zip(shard, fetched, strict=True))
            if writer:
                shapes = {tensor.name: tensor.shape for tensor in shard}
                write_tensors(temporary / shard_name(number, len(shards)), shapes, dtype, arrays)
            else:
                for _ in arrays:
                    pass  # the other processes take part in gathering
        if writer:
            write_configs(temporary, model_config, dtype, shards)
            for file in copied:
                shutil.copyfile(file, temporary / file.name)
            _swap(temporary, target)
    except BaseException:
        if writer:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def resolve(path: str | os.PathLike[str], *, weights: bool = True) -> pathlib.Path:
    """The folder of a model: `path` where it is one, else a Hub id fetched into the Hub's cache, weights if wanted."""
    folder = pathlib.Path(path)
    if folder.is_dir():
        return folder
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        import huggingface_hub

        try:
            patterns = ["*.json", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
            return pathlib.Path(huggingface_hub.snapshot_download(str(path), allow_patterns=patterns))
        except Exception as error:  # offline, gated, unknown: the Hub's many ways to say no
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{path}: no such folder here, and the Hub gave none ({type(error).__name__}: {reason}); "
                "give the path of a model folder"
            ) from None
    raise UserError(f"{path}: {'not a folder' if folder.exists() else 'not there'}; give the folder of a model")


def _check_tensors(files: TensorFiles, config: ModelConfig, abstract: qwen.Params) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        for tensor in tensors_of(path_name(path), leaf.shape):
            expected[tensor.name] = tensor.shape
    for name, shape in expected.items():
        if name not in files.shape:
            cure = "set tie_word_embeddings to true or " if name == TABLE["head"].name else ""
            raise UserError(f"{files.folder}: {name}: missing; {cure}give the folder with all of the model's weights")
        if files.shape[name] != shape:
            raise UserError(
                f"{files.file[name]}: {name}: shape {files.shape[name]}, config.json makes it {shape}; "
                "use the config.json of these weights"
            )
    tied = {TABLE["head"].name} if config.tie_word_embeddings else set()
    for name in sorted(files.shape.keys() - expected.keys() - tied):
        if not name.endswith("rotary_emb.inv_freq"):  # a buffer that old exports wrote; it follows from rope_theta
            raise UserError(
                f"{files.file[name]}: {name}: unknown to a {config.model_type} model; "
                "use the config.json of these weights"
            )
    for name in tied & files.shape.keys():
        _check_tied(files, name)


def _check_tied(files: TensorFiles, head: str) -> None:
    embed = TABLE["embed"].name
    same = files.shape[head] == files.shape[embed]
    vocab = files.shape[embed][0]
    for start in range(0, vocab if same else 0, 8192):
        rows = (slice(start, min(start + 8192, vocab)),)
        same = same and np.array_equal(files.read(head, rows), files.read(embed, rows))
    if not same:
        raise UserError(
            f"{files.file[head]}: {head}: differs from {embed}, and config.json ties them; "
            "set tie_word_embeddings to false in config.json"
        )


class Tensor(NamedTuple):
    """One tensor of a Hugging Face file, and the parameter, or layer of a stacked one, that it holds."""

    name: str  # theirs
    shape: tuple[int, ...]  # theirs
    path: str  # ours
    layer: int | None

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def tensors_of(path: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The Hugging Face tensors that make up the parameter of `shape` at `path`."""
    name, transposed = TABLE[path]
    stacked = "{}" in name
    one = shape[1:] if stacked else shape
    one = one[::-1] if transposed else one
    for layer in range(shape[0]) if stacked else (None,):
        yield Tensor(name.format(layer), one, path, layer)


def _reader(files: TensorFiles, path: str, shape: tuple[int, ...], dtype: Any, on_read: Callable[[str], None] | None):
    """A function from an index into the parameter at `path` to its values there."""
    tensors, transposed = list(tensors_of(path, shape)), TABLE[path].transposed

    def read(index: tuple[slice, ...]) -> np.ndarray:
        stacked = tensors[0].layer is not None
        inner = index[1:] if stacked else index
        inner = inner[::-1] if transposed else inner
        values = np.empty([len(range(*i.indices(n))) for i, n in zip(index, shape, strict=True)], dtype)
        for place, tensor in enumerate(tensors[index[0]] if stacked else tensors):
            data = files.read(tensor.name, inner)
            values[place if stacked else ...] = data.T if transposed else data
            if on_read is not None:
                on_read(tensor.name)
        return values

    return read


def _place(shape: tuple[int, ...], where: Any, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    # Not make_array_from_callback: it reads a replicated shard once a device and holds all shards on the host at once.
    devices: dict[Any, list[Any]] = {}
    indices = where.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        devices.setdefault(tuple(i.indices(n) for i, n in zip(index, shape, strict=True)), []).append(device)
    shards = []
    for index, holders in devices.items():
        values = read(tuple(slice(*i) for i in index))
        shards += [jax.device_put(values, device) for device in holders]
    return jax.make_array_from_single_device_arrays(shape, where, shards)


def _plan(config: ModelConfig, item: int, max_shard_bytes: int) -> list[list[Tensor]]:
    leaves = jax.tree_util.tree_leaves_with_path(qwen.abstract_params(config))
    tensors = [tensor for path, leaf in leaves for tensor in tensors_of(path_name(path), leaf.shape)]
    tensors.sort(key=lambda t: (t.layer is not None, t.layer or 0))  # a layer's tensors stay together
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size * item > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size * item
    return shards


def fetch(params: qwen.Params, tensor: Tensor, dtype: str) -> np.ndarray:
    """One tensor on the host, laid out as ours (see `Entry.transposed`). With several processes all must call it."""
    array = np.asarray(take(params, tensor, dtype))
    return array.view(jnp.bfloat16) if dtype == "bfloat16" else array


def take(params: qwen.Params, tensor: Tensor, dtype: str, *, turned: bool = False) -> jax.Array:
    """One tensor on its devices, each has the whole; bfloat16 as its bits, in uint16. Does not wait for it.

    With several processes all must call it, in the same order. `turned`: laid out as theirs (see `Entry.transposed`).
    """
    value, whole = _parameter(params, tensor), None
    if isinstance(value, jax.Array) and isinstance(value.sharding, jax.sharding.NamedSharding):
        whole = jax.sharding.NamedSharding(value.sharding.mesh, jax.P())
    return _taker(dtype, whole, turned and TABLE[tensor.path].transposed)(value, tensor.layer)


def look(params: qwen.Params, tensor: Tensor) -> np.ndarray:
    """One tensor as it lies in this host's memory, in its own dtype and laid out as ours; not to be written to."""
    value = np.asarray(_parameter(params, tensor))
    return value if tensor.layer is None else value[tensor.layer]


def _parameter(params: qwen.Params, tensor: Tensor) -> Any:
    return functools.reduce(lambda tree, key: tree[key], tensor.path.split("/"), params)


@functools.cache
def _taker(dtype: str, whole: jax.sharding.NamedSharding | None, transpose: bool) -> Callable[..., jax.Array]:
    # Cast on the device: half the bytes cross. The layer's number is traced: one compilation a parameter, not a tensor.
    def take(value: jax.Array, layer: jax.Array | None) -> jax.Array:
        value = value if layer is None else jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
        if dtype == "bfloat16":  # by its bits: for a cast XLA's CPU backend takes twelve times as long
            bits = jax.lax.bitcast_convert_type(rounded(value.astype("float32")), jnp.uint32)
            value = (bits >> 16).astype(jnp.uint16)
        else:
            value = value.astype(dtype)
        return value.T if transpose else value

    return jax.jit(take, out_shardings=whole)


def rounded(value: jax.Array) -> jax.Array:
    """The same in its own dtype, rounded to what bfloat16 can hold."""
    precision = jnp.finfo(jnp.bfloat16)
    return jax.lax.reduce_precision(value, precision.nexp, precision.nmant)


def write_configs(folder: pathlib.Path, config: ModelConfig, dtype: str, shards: list[list[Tensor]]) -> None:
    """config.json, generation_config.json and, of several files, the index; `shards` are the files' tensors."""
    hf = config.to_hf()
    ids = {name: hf[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[name] is not None}
    files = {"config.json": {**hf, "dtype": dtype, "torch_dtype": dtype}, "generation_config.json": ids}
    if len(shards) > 1:
        total = sum(tensor.size * jnp.dtype(dtype).itemsize for shard in shards for tensor in shard)
        weight_map = {t.name: shard_name(n, len(shards)) for n, shard in enumerate(shards) for t in shard}
        files["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def shard_name(number: int, count: int) -> str:
    """The name of file `number`, from 0, of `count`."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _swap(temporary: pathlib.Path, target: pathlib.Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
