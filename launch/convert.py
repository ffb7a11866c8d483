"""Converts between Hugging Face folders, Orbax checkpoints and GGUF files.

    python -m launch.convert --from=hf --to=orbax --input=DIR --output=DIR [--dtype=bfloat16] [--verify]
    python -m launch.convert --from=orbax --to=hf --input=runs/quickstart/checkpoints/395 --output=DIR
    python -m launch.convert --from=gguf --to=hf --input=FILE.gguf --output=DIR
    python -m launch.convert --from=hf --input=DIR --inspect
    python -m launch.convert --from=hf --input=runs/quickstart/export --push-to-hub=OWNER/NAME

An Orbax input is a folder that this command wrote, or one step of a run's checkpoints/, without its optimizer. A GGUF
input needs the extra [gguf]; its weights are dequantised. `--verify` reads the output again and compares its logits on
random tokens with the input's; `--inspect` lists the parameters and converts nothing; `--push-to-hub` uploads the
Hugging Face folder with a model card. Memory holds one copy of the parameters: in bfloat16 where input and output are,
else in float32 (docs/results.md has figures).
"""

from __future__ import annotations

import logging
import math
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from launch import command
from open_agentrl_jax.models import convert
from open_agentrl_jax.models.config import DTYPES
from open_agentrl_jax.models.folders import check_target
from open_agentrl_jax.models.params import TABLE
from open_agentrl_jax.parallel.sharding import path_name
from open_agentrl_jax.run import hub
from open_agentrl_jax.types import UserError

flags.DEFINE_enum("from", None, list(convert.READ), "kind of --input")
flags.DEFINE_enum("to", None, list(convert.WRITE), "kind of --output")
flags.DEFINE_string("input", "", "folder or file to read; for hf also a Hub id")
flags.DEFINE_string("output", "", "folder to write")
flags.DEFINE_string("push-to-hub", "", "owner/name of the repository to upload the Hugging Face folder to")
DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "dtype of the parameters written")
VERIFY = flags.DEFINE_bool("verify", False, "read the output again and compare its logits with the input's")
INSPECT = flags.DEFINE_bool("inspect", False, "list the parameters of --input, convert nothing")


def main() -> int:
    """Converts, verifies, inspects or uploads; returns 1 where --verify finds a difference beyond rounding."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every step
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
        raise UserError(
            f"--to={value['to']}: the input is that already; give the other one of {', '.join(convert.WRITE)}"
        )
    if repo and value["to"] != "hf":
        raise UserError("--push-to-hub: the Hub takes Hugging Face folders; give --to=hf")
    if value["to"] == "orbax" and target.exists():
        raise UserError(f"--output={target}: exists; choose another path or remove it")
    if value["to"] == "hf":
        check_target(target)
    count, found = convert.convert(value["from"], source, value["to"], target, dtype=DTYPE.value, verify=VERIFY.value)
    print(f"{target}: {count:,} parameters, {DTYPE.value}")
    if found is not None:
        print(
            f"logits of the output: largest difference from the input's {found.total:.3g}, {found.beyond_rounding:.3g} "
            f"of which is not {DTYPE.value} rounding (largest logit {found.largest:.3g})"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak memory of this process: {peak / 2**30:.2f} GiB")
    if found is not None and found.beyond_rounding > 0:
        return 1
    if repo:
        print(hub.push(target, repo))
    return 0


def inspect(kind: str, source: str) -> int:
    """Prints the progress of the run, the model, and path, Hugging Face name, shape and dtype of every parameter."""
    config, tree = convert.SHAPES[kind](source)
    if kind == "orbax" and (progress := convert.progress(source)):
        print(f"after {progress['phase']} step {progress['step']}")
    fields = {name: value for name, value in config.to_hf().items() if isinstance(value, int | float | str)}
    print(", ".join(f"{name} {value}" for name, value in fields.items()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        print(f"{name:18} {TABLE[name].name:48} {leaf.shape!s:24} {leaf.dtype}")
    size = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    print(f"{config.model_type}: {convert.count(tree):,} parameters, {size / 2**20:,.1f} MiB")
    return 0


if __name__ == "__main__":
    command.run(main)
