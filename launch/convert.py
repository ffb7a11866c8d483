"""Between Hugging Face folders and Orbax checkpoints.

    python -m launch.convert --from=hf --to=orbax --input=DIR --output=DIR [--dtype=bfloat16] [--verify]
    python -m launch.convert --from=orbax --to=hf --input=runs/quickstart/checkpoints/395 --output=DIR
    python -m launch.convert --from=hf --input=DIR --inspect
    python -m launch.convert --from=hf --input=runs/quickstart/export --push-to-hub=OWNER/NAME

An Orbax folder is what this command writes (the tree {"params": ...}, with config.json and the tokenizer's files beside
it) or one step of a run's checkpoints/, of which the parameters are taken. `--verify` reads the output again and
compares its logits on random tokens with the input's; `--inspect` lists the parameters and converts nothing;
`--push-to-hub` uploads the Hugging Face folder, made or given, with a card of its run. One copy of the parameters is in
memory at a time: in bfloat16 where input and output are, else in float32 (docs/results.md: the memory it took).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from orbax.checkpoint import v1 as ocp

from launch import command
from open_agentrl_jax.models import hf, qwen
from open_agentrl_jax.models.config import DTYPES, ModelConfig
from open_agentrl_jax.models.params import TABLE
from open_agentrl_jax.parallel.mesh import make_mesh
from open_agentrl_jax.parallel.sharding import path_name
from open_agentrl_jax.run import hub
from open_agentrl_jax.types import UserError

KINDS = ("hf", "orbax")
flags.DEFINE_enum("from", None, KINDS, "what --input is")
flags.DEFINE_enum("to", None, KINDS, "what --output becomes")
flags.DEFINE_string("input", "", "the folder to read; for hf also a Hub id")
flags.DEFINE_string("output", "", "the folder to write")
flags.DEFINE_string("push-to-hub", "", "owner/name of the repository to upload the Hugging Face folder to")
DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "of the parameters written")
VERIFY = flags.DEFINE_bool("verify", False, "read the output again and compare its logits with the input's")
INSPECT = flags.DEFINE_bool("inspect", False, "list the parameters of --input, convert nothing")


def main() -> int:
    """Converts, verifies, inspects or uploads, as the flags say; 1 where --verify finds a difference."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates each step
    value = {name: flags.FLAGS[name].value or "" for name in ("from", "to", "input", "output")}
    repo = flags.FLAGS["push-to-hub"].value or ""
    no_output = INSPECT.value or (repo and value["from"] == "hf" and not value["to"])
    for name in ("from", "input") if no_output else value:
        if not value[name]:
            raise UserError(f"--{name} is missing; see python -m launch.convert --help")
    source, target = value["input"], Path(value["output"]).absolute()
    if INSPECT.value:
        return inspect(value["from"], source)
    if no_output:
        print(hub.push(source, repo))
        return 0
    if value["from"] == value["to"]:
        raise UserError(f"--to={value['to']} is what the input is already; give the other one of {', '.join(KINDS)}")
    if repo and value["to"] != "hf":
        raise UserError("--push-to-hub: the Hub takes Hugging Face folders; give --to=hf")
    if value["to"] == "orbax" and target.exists():
        raise UserError(f"--output={target}: exists; choose another path or remove it")
    status = convert(value["from"], source, value["to"], target)
    if repo and not status:
        print(hub.push(target, repo))
    return status


def convert(kind: str, source: str, to: str, target: Path) -> int:
    """Reads, writes and, where asked, verifies; one copy of the parameters is held at a time."""
    mesh = make_mesh() if jax.device_count() > 1 else None
    wanted = DTYPE.value
    held = {str(jnp.dtype(x.dtype)) for x in jax.tree.leaves(shapes(kind, source)[1])} | {wanted}
    config, params, tokenizer = READ[kind](source, mesh, wanted if held == {wanted} else "float32")
    exact = kept = _logits(config, params, mesh) if VERIFY.value else None
    if any(str(x.dtype) != wanted for x in jax.tree.leaves(params)):
        params = jax.tree.map(lambda x: _cast(x, wanted), params)
        kept = _logits(config, params, mesh) if VERIFY.value else None
    WRITE[to](target, config, params, tokenizer)
    print(f"{target}: {_count(params):,} parameters, {wanted}")
    del params
    different = 0
    if exact is not None and kept is not None:
        got = _logits(config, READ[to](str(target), mesh, wanted)[1], mesh)
        wrong = float(np.abs(got - kept).max())
        print(
            f"logits of the output: largest difference from the input's {np.abs(got - exact).max():.3g}, {wrong:.3g} "
            f"of which is not {wanted} rounding (largest logit {np.abs(exact).max():.3g})"
        )
        different = int(wrong > 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak memory of this process: {peak / 2**30:.2f} GiB")
    return different


def _cast(x: jax.Array, dtype: str) -> jax.Array:
    """The array in another dtype; its own memory is given back at once."""
    if str(x.dtype) == dtype:
        return x
    made = jax.block_until_ready(x.astype(dtype))
    x.delete()
    return made


def read_hf(source: str, mesh: Any, dtype: str) -> tuple[ModelConfig, qwen.Params, Path | None]:
    """Config, parameters of `dtype`, and the folder whose tokenizer belongs to them."""
    folder = hf.resolve(source)
    return *hf.load_pretrained(folder, mesh, dtype), folder


def write_hf(target: Path, config: ModelConfig, params: qwen.Params, tokenizer: Path | None) -> None:
    """A Hugging Face folder; a tokenizer is copied where there is one."""
    has_tokenizer = tokenizer is not None and any((tokenizer / name).exists() for name in hf.TOKENIZER_FILES)
    hf.save_pretrained(target, config, params, dtype=DTYPE.value, tokenizer_from=tokenizer if has_tokenizer else None)


def read_orbax(source: str, mesh: Any, dtype: str) -> tuple[ModelConfig, qwen.Params, Path | None]:
    """As `read_hf`, from what this command wrote or from one step of a run; optimizer and counters are not read."""
    folder = Path(source).absolute()
    found = _metadata(folder)
    config, tokenizer = _model_of(folder)
    wanted = qwen.abstract_params(config)
    _check(folder, found["params"], wanted)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: here, wanted)
    else:
        places = qwen.param_shardings(config, mesh)
    abstract = jax.tree.map(lambda _: ocp.PLACEHOLDER, found)
    abstract["params"] = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), wanted, places)
    try:
        return config, ocp.load(str(folder), abstract)["params"], tokenizer
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise UserError(f"{folder}: cannot be read ({_line(error)}); restore it from a copy") from None


def write_orbax(target: Path, config: ModelConfig, params: qwen.Params, tokenizer: Path | None) -> None:
    """An Orbax folder that is there whole or not at all, with config.json and the tokenizer's files in it."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        ocp.save(str(temporary), {"params": params})
        (temporary / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
        for name in (*hf.TOKENIZER_FILES, "generation_config.json"):
            if tokenizer is not None and (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, temporary / name)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


READ = {"hf": read_hf, "orbax": read_orbax}
WRITE = {"hf": write_hf, "orbax": write_orbax}


def shapes(kind: str, source: str) -> tuple[ModelConfig, Any]:
    """Config and parameters as shapes and dtypes; reads no values."""
    if kind == "hf":
        return hf.describe(source)
    folder = Path(source).absolute()
    tree, (config, _) = _metadata(folder)["params"], _model_of(folder)
    _check(folder, tree, qwen.abstract_params(config))
    return config, tree


def inspect(kind: str, source: str) -> int:
    """Prints where the run stood, the model, and path, Hugging Face name, shape and dtype of every parameter."""
    config, tree = shapes(kind, source)
    metadata: Any = ocp.metadata(str(Path(source).absolute())).custom_metadata if kind == "orbax" else None
    progress = (metadata or {}).get("progress")
    if progress:
        print(f"after {progress['phase']} step {progress['step']}")
    fields = {name: value for name, value in config.to_hf().items() if isinstance(value, int | float | str)}
    print(", ".join(f"{name} {value}" for name, value in fields.items()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        print(f"{name:18} {TABLE[name].name:48} {leaf.shape!s:24} {leaf.dtype}")
    bytes_ = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    print(f"{config.model_type}: {_count(tree):,} parameters, {bytes_ / 2**20:,.1f} MiB")
    return 0


def _metadata(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"--input={folder}: not there; give an Orbax folder, or one step of a run's checkpoints/")
    steps = sorted((child.name for child in folder.iterdir() if child.name.isdigit()), key=int)
    if steps:
        raise UserError(f"--input={folder}: holds several checkpoints; give one of them, e.g. {folder / steps[-1]}")
    try:
        found: Any = ocp.metadata(str(folder)).metadata
    except Exception as error:  # the reader's many ways to say that it is none
        raise UserError(f"--input={folder}: no Orbax checkpoint ({_line(error)}); give the folder of one") from None
    if not isinstance(found, dict) or "params" not in found:
        raise UserError(f"--input={folder}: no tree 'params' in it; give a checkpoint of this project")
    return found


def _model_of(folder: Path) -> tuple[ModelConfig, Path | None]:
    """The config of the model in an Orbax folder, and the folder of its tokenizer."""
    if (folder / "config.json").exists():
        return ModelConfig.from_hf(folder), folder
    run = folder.parent.parent
    try:
        model = json.loads((run / "config.json").read_text())["config"]["model"]
        path, tokenizer = model["path"] or run / "init", model["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: says nothing of its model, and {run} is no run directory; copy the model's config.json into it"
        ) from None
    model_folder = hf.resolve(path)
    return ModelConfig.from_hf(model_folder), hf.resolve(tokenizer, weights=False) if tokenizer else model_folder


def _check(folder: Path, found: Any, wanted: qwen.Params) -> None:
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


def _logits(config: ModelConfig, params: qwen.Params, mesh: Any) -> np.ndarray:
    """Computed in float32.

    On one device the layers run one after the other, uncompiled: compiled for a CPU they would begin by making a
    float32 copy of all of them.
    """
    config = dataclasses.replace(config, compute_dtype="float32")
    rows = mesh.size if mesh is not None else 1
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (rows, 64)), jnp.int32)
    positions = jnp.tile(jnp.arange(64), (rows, 1))

    def run(params: qwen.Params) -> jax.Array:
        return qwen.logits(params, config, qwen.forward(params, config, tokens, positions, jnp.ones_like(positions)))

    if mesh is None:
        with jax.disable_jit():
            return np.asarray(run(params))
    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(run)(params))


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


if __name__ == "__main__":
    command.run(main)
