"""Compile a config's real train step for a TPU slice or for GPUs on a machine without them; nothing is executed.

    python -m launch.compile --topology=v5p:2x2x1 --config=configs/qwen3_4b_grpo_tcr.py

TPU topologies need jax[tpu] of the version that trains; --topology=h200:1 needs jax[cuda12]. Neither needs the device
or its driver. Prints bytes per device, operations, collectives and a lower bound on the step time. Exits with 1 if the
step does not fit, or if it all-reduces gradients instead of reduce-scattering them.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
from absl import flags

from launch import command
from open_agentrl_jax.config import Config
from open_agentrl_jax.planning import ahead


def main(config: Config, topology: str, layers: int, out: str) -> int:
    """Compiles and prints; returns the exit code."""
    numbers, faults = ahead.compile_for(config, topology, layers=layers)
    if numbers:
        print(ahead.describe(numbers, topology))
    if out:
        Path(out).write_text(json.dumps({"topology": topology, "config": config.name, **numbers, "faults": faults}))
    for fault in faults:
        print(f"FAILS: {fault}")
    if not faults:
        print("fits; gradients are reduce-scattered")
    return 1 if faults else 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    flags.DEFINE_string(
        "topology", "v5p:2x2x1", "v5p:2x2x1, v6e:2x4, 2xv5e:4x4 (two slices) ... or GPUs of one machine: h200:1, h100:8"
    )
    flags.DEFINE_integer("layers", 0, "compile this many layers instead of all; 2 is a quick test")
    flags.DEFINE_string("out", "", "also write the numbers to this JSON file")
    load = command.config_flag()
    command.run(lambda: main(load(), flags.FLAGS.topology, flags.FLAGS.layers, flags.FLAGS.out))
