"""Converts between Hugging Face folders, Orbax checkpoints and GGUF files, one copy of the parameters in memory.

An Orbax folder holds the tree {"params": ...}, config.json and the tokenizer's files; one step of a run's checkpoints/
is read too, without its optimizer.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from open_agentrl_jax.config import LoRA
from open_agentrl_jax.models import gguf, hf, lora, peft, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.export import copy_tokenizer
from open_agentrl_jax.models.folders import tokenizer_files
from open_agentrl_jax.models.params import Params
from open_agentrl_jax.parallel.mesh import make_mesh
from open_agentrl_jax.parallel.sharding import path_name
from open_agentrl_jax.types import UserError


def convert(
    kind: str, source: str, to: str, target: Path, *, dtype: str = "float32", verify: bool = False
) -> tuple[int, Difference | None]:
    """Read `source`, write `target`.

    Args:
      kind: of the source, a key of READ.
      source: a folder, Hub id or file.
      to: kind of the target, a key of WRITE.
      target: a folder.
      dtype: of the parameters written.
      verify: whether to read the target again and compare its logits with those of the source.

    Returns:
      The number of parameters, and the difference of the logits where verified.

    Raises:
      UserError: a source that cannot be read, or a target that holds something else.
    """
    mesh = make_mesh() if jax.device_count() > 1 else None
    held = {str(jnp.dtype(x.dtype)) for x in jax.tree.leaves(SHAPES[kind](source)[1])} | {dtype}
    with tempfile.TemporaryDirectory() as scratch:
        read = READ[kind](source, mesh, dtype if held == {dtype} else "float32", Path(scratch))
        config, params, tokenizer = read
        exact = kept = _logits(config, params, mesh) if verify else None
        if any(str(x.dtype) != dtype for x in jax.tree.leaves(params)):
            params = jax.tree.map(lambda x: _cast(x, dtype), params)
            kept = _logits(config, params, mesh) if verify else None
        WRITE[to](target, config, params, tokenizer, dtype)
        number = count(params)
        del read, params
        if exact is None or kept is None:
            return number, None
        got = _logits(config, READ[to](str(target), mesh, dtype, Path(scratch))[1], mesh)
    return number, Difference(*(float(np.abs(x).max()) for x in (got - exact, got - kept, exact)))


class Difference(NamedTuple):
    """Largest differences between the logits of source and target."""

    total: float
    beyond_rounding: float  # against the source's parameters in the target's dtype
    largest: float  # logit of the source


def _cast(x: jax.Array, dtype: str) -> jax.Array:
    """Cast and free the original at once."""
    if str(x.dtype) == dtype:
        return x
    made = jax.block_until_ready(x.astype(dtype))
    x.delete()
    return made


def read_hf(source: str, mesh: Any, dtype: str, scratch: Path) -> tuple[ModelConfig, Params, Path | None]:
    """Config, parameters, and the folder of their tokenizer; `scratch` is for files that are needed meanwhile."""
    folder = hf.resolve(source)
    return *hf.load_pretrained(folder, mesh, dtype), folder


def write_hf(target: Path, config: ModelConfig, params: Params, tokenizer: Path | None, dtype: str) -> None:
    """Write a Hugging Face folder, with the tokenizer if there is one."""
    if tokenizer is not None and not tokenizer_files(tokenizer):
        tokenizer = None
    hf.save_pretrained(target, config, params, dtype=dtype, tokenizer_from=tokenizer)


def read_gguf(source: str, mesh: Any, dtype: str, scratch: Path) -> tuple[ModelConfig, Params, Path | None]:
    """As `read_hf`, from a GGUF file."""
    gguf.save_tokenizer(source, scratch)
    return *gguf.load(source, mesh, dtype), scratch


def read_orbax(source: str, mesh: Any, dtype: str, scratch: Path) -> tuple[ModelConfig, Params, Path | None]:
    """As `read_hf`, from a converted folder or one step of a run; optimizer and counters are not read.

    The adapters of a run that trains only those are merged into its base model.
    """
    folder = Path(source).absolute()
    found = _metadata(folder)
    config, base, tokenizer = _model_of(folder)
    wanted = lora.abstract(config)[1]
    _check(folder, found["params"], wanted)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: here, wanted)
    else:
        places = qwen.param_shardings(config, mesh)
        places = places if config.lora is None else lora.split(places)[1]
    kept = dtype if config.lora is None else "float32"
    abstract = jax.tree.map(lambda _: ocp.PLACEHOLDER, found)
    abstract["params"] = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, kept, sharding=s), wanted, places)
    try:
        params = ocp.load(str(folder), abstract)["params"]
    except Exception as error:  # a damaged file raises many types
        raise UserError(f"{folder}: cannot be read ({_line(error)}); restore it from a copy") from None
    if config.lora is not None:
        config = dataclasses.replace(config, compute_dtype=dtype)
        frozen = lora.freeze(hf.load_pretrained(base, mesh, dtype)[1], config)
        params, config = lora.merge(lora.join(frozen, params), config), lora.without(config)
    return config, params, tokenizer


def write_orbax(target: Path, config: ModelConfig, params: Params, tokenizer: Path | None, dtype: str) -> None:
    """Write an Orbax folder with config.json and the tokenizer's files; `target` must not exist."""
    if target.exists():
        raise UserError(f"{target}: exists; choose another path or remove it")
    try:
        ocp.save(str(target), {"params": params})
        if tokenizer is not None:
            copy_tokenizer(tokenizer, target)
        (target / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def describe_orbax(source: str) -> tuple[ModelConfig, Any]:
    """Config, and parameters as shapes and dtypes; reads no values."""
    folder = Path(source).absolute()
    tree, (config, *_) = _metadata(folder)["params"], _model_of(folder)
    _check(folder, tree, lora.abstract(config)[1])
    return config, tree


def progress(source: str) -> dict[str, Any] | None:
    """Phase and step at which a run wrote an Orbax checkpoint."""
    metadata: Any = ocp.metadata(str(Path(source).absolute())).custom_metadata
    return (metadata or {}).get("progress")


SHAPES = {"hf": hf.describe, "orbax": describe_orbax, "gguf": gguf.describe}
READ = {"hf": read_hf, "orbax": read_orbax, "gguf": read_gguf}
WRITE = {"hf": write_hf, "orbax": write_orbax}


def _metadata(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder}: missing; give an Orbax folder, or one step of a run's checkpoints/")
    steps = sorted((child.name for child in folder.iterdir() if child.name.isdigit()), key=int)
    if steps:
        raise UserError(f"{folder}: holds several checkpoints; give one of them, e.g. {folder / steps[-1]}")
    try:
        found: Any = ocp.metadata(str(folder)).metadata
    except Exception as error:  # the reader raises many types
        raise UserError(f"{folder}: no Orbax checkpoint ({_line(error)}); give the folder of one") from None
    if not isinstance(found, dict) or "params" not in found:
        raise UserError(f"{folder}: no tree 'params' in it; give a checkpoint of this project")
    return found


def _model_of(folder: Path) -> tuple[ModelConfig, Path, Path]:
    """The config of the model in an Orbax folder, and the folders of the model it started from and of its tokenizer."""
    if (folder / "config.json").exists():
        return ModelConfig.from_hf(folder), folder, folder
    run = folder.parent.parent
    try:
        model = json.loads((run / "config.json").read_text())["config"]["model"]
        path, tokenizer = model["path"] or run / "init", model["tokenizer"]
        adapters = peft.adapters_of(LoRA(**model.get("lora", {})))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: config.json: missing, and {run} is no run directory; copy the model's config.json into it"
        ) from None
    model_folder = hf.resolve(path)
    tokenizer_folder = hf.resolve(tokenizer, weights=False) if tokenizer else model_folder
    return ModelConfig.from_hf(model_folder, lora=adapters), model_folder, tokenizer_folder


def _check(folder: Path, found: Any, wanted: Params) -> None:
    there, here = ({path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(t)} for t in (found, wanted))
    for name in sorted(there.keys() ^ here.keys()):
        state = "unknown to" if name in there else "missing for"
        raise UserError(f"{folder}: params/{name}: {state} the model of its config.json; give that checkpoint's own")
    for name, leaf in here.items():
        if tuple(there[name].shape) != leaf.shape:
            raise UserError(
                f"{folder}: params/{name}: shape {tuple(there[name].shape)}, the model's config.json makes it "
                f"{leaf.shape}; give that checkpoint's own"
            )


def _logits(config: ModelConfig, params: Params, mesh: Any) -> np.ndarray:
    """Logits of random tokens, computed in float32.

    Not compiled on one device: compiled for a CPU, the program would begin with a float32 copy of all layers.
    """
    config = dataclasses.replace(config, compute_dtype="float32")
    rows = mesh.size if mesh is not None else 1
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (rows, 64)), jnp.int32)
    positions = jnp.tile(jnp.arange(64), (rows, 1))

    def run(params: Params) -> jax.Array:
        return qwen.logits(params, config, qwen.forward(params, config, tokens, positions, jnp.ones_like(positions)))

    if mesh is None:
        with jax.disable_jit():
            return np.asarray(run(params))
    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(run)(params))


def count(tree: Any) -> int:
    """Number of elements."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
