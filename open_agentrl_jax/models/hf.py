"""Reads Hugging Face folders straight into shardings; re-exports the writer of models/export.py."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from open_agentrl_jax.models import qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.export import (
    Tensor,
    rounded,
    save_pretrained,
    shard_name,
    tensors_of,
    write_configs,
)
from open_agentrl_jax.models.folders import TOKENIZER_FILES, check_complete, resolve
from open_agentrl_jax.models.params import TABLE, Params, abstract_params, rows
from open_agentrl_jax.models.tensor_files import TensorFiles
from open_agentrl_jax.parallel.sharding import path_name
from open_agentrl_jax.types import UserError

__all__ = (
    "TOKENIZER_FILES",
    "Tensor",
    "describe",
    "load_pretrained",
    "resolve",
    "rounded",
    "save_pretrained",
    "shard_name",
    "tensors_of",
    "write_configs",
)

_HEAD, _EMBED = TABLE["head"].name, TABLE["embed"].name
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # left by torch.compile and DistributedDataParallel


def load_pretrained(
    path: str | os.PathLike[str],
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "float32",
    *,
    on_read: Callable[[str], None] | None = None,
) -> tuple[ModelConfig, Params]:
    """Read a Hugging Face folder straight into the shardings of `mesh`.

    Each shard is read from the files on its own and put on its device: beyond what its devices hold, a host never holds
    more than the largest shard of one stacked parameter.

    Args:
      path: a folder with config.json and safetensors files, or a Hub id "org/name".
      mesh: placement of the parameters; None is the default device.
      dtype: of the parameters in memory.
      on_read: called with the name of each tensor read (for progress).

    Returns:
      The model config and the parameters (see models/qwen.py).

    Raises:
      UserError: a missing folder, a bad config, or a tensor that is unknown, missing or misshaped.
    """
    folder = resolve(path)
    config = ModelConfig.from_hf(folder)
    files = _open(folder, config)
    abstract = abstract_params(config)
    placed = qwen.param_shardings(config, mesh) if mesh is not None else None

    def read(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, where: Any = None) -> jax.Array:
        reader = _reader(files, path_name(path), leaf.shape, jnp.dtype(dtype), on_read)
        if where is None:
            return jax.device_put(reader((slice(None),) * leaf.ndim))
        return _place(leaf.shape, where, reader)

    rest = (abstract,) if placed is None else (abstract, placed)
    return config, jax.tree_util.tree_map_with_path(read, *rest)


def describe(path: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """Config, and parameters as ShapeDtypeStructs in the dtypes of the files; validates as `load_pretrained` does."""
    folder = resolve(path)
    config = ModelConfig.from_hf(folder)
    files = _open(folder, config)

    def of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        first = next(tensors_of(path_name(path), leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, files.dtype[first.name])

    return config, jax.tree_util.tree_map_with_path(of, abstract_params(config))


def _open(folder: pathlib.Path, config: ModelConfig) -> TensorFiles:
    """The files of a folder with every tensor under its usual name, checked against the config."""
    check_complete(folder)
    files = TensorFiles(folder)
    expected = {
        tensor.name: tensor.shape for path, (_, shape) in rows(config).items() for tensor in tensors_of(path, shape)
    }
    _rename(files, config, expected)
    for name, shape in expected.items():
        if name not in files.shape:
            cure = "set tie_word_embeddings to true or " if name == _HEAD else ""
            raise UserError(f"{folder}: {name}: missing; {cure}give the folder with all of the model's weights")
        if files.shape[name] != shape:
            raise UserError(
                f"{files.file[name]}: {name}: shape {files.shape[name]}, but config.json implies {shape}; "
                "use the config.json of these weights"
            )
    tied = {_HEAD} if config.tie_word_embeddings else set()
    for name in sorted(files.shape.keys() - expected.keys() - tied):
        if not name.endswith("rotary_emb.inv_freq"):  # a buffer that old exports wrote; it follows from rope_theta
            raise UserError(
                f"{files.file[name]}: {name}: unknown to a {config.model_type} model; "
                "use the config.json of these weights"
            )
    for name in tied & files.shape.keys():
        _check_tied(files, name)
    return files


def _rename(files: TensorFiles, config: ModelConfig, expected: dict[str, tuple[int, ...]]) -> None:
    """Undo what wrappers and older exports do to names, as transformers does."""
    for name in list(files.file):
        plain = _WRAPPERS.sub("", name)
        if plain not in expected and f"model.{plain}" in expected:
            plain = f"model.{plain}"
        if plain != name and plain not in files.file:
            files.rename(name, plain)
    if config.tie_word_embeddings and _EMBED not in files.file and _HEAD in files.file:
        files.rename(_HEAD, _EMBED)


def _check_tied(files: TensorFiles, head: str) -> None:
    same = files.shape[head] == files.shape[_EMBED]
    vocab = files.shape[_EMBED][0]
    for start in range(0, vocab if same else 0, 8192):
        part = (slice(start, min(start + 8192, vocab)),)
        # Compared as they are computed with: padding rows may be NaN.
        a, b = (files.read(name, part).astype(np.float32) for name in (head, _EMBED))
        same = same and np.array_equal(a, b, equal_nan=True)
    if not same:
        raise UserError(
            f"{files.file[head]}: {head}: differs from {_EMBED}, but config.json ties them; "
            "set tie_word_embeddings to false in config.json"
        )


def _reader(files: TensorFiles, path: str, shape: tuple[int, ...], dtype: Any, on_read: Callable[[str], None] | None):
    """A function from an index into the parameter at `path` to its values there."""
    names, transposed = {tensor.index: tensor.name for tensor in tensors_of(path, shape)}, TABLE[path].transposed
    depth = len(next(iter(names)))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        inner = index[depth:][::-1] if transposed else index[depth:]
        ranges = [range(*i.indices(n)) for i, n in zip(index, shape, strict=True)]
        values = np.empty([len(numbers) for numbers in ranges], dtype)
        for place in np.ndindex(values.shape[:depth]):
            name = names[tuple(numbers[i] for numbers, i in zip(ranges, place, strict=False))]
            data = files.read(name, inner)
            values[place] = data.T if transposed else data
            if on_read is not None:
                on_read(name)
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
