"""Compile a config's real train step for a TPU pod or for GPUs, on a machine that has none; nothing is executed.

    python -m launch.compile --topology=v5p:2x2x1 --config=configs/qwen3_4b_grpo_tcr.py

needs jax[tpu] of the version that trains, no TPU; --topology=h200:1 needs jax[cuda12], neither a GPU nor its driver. It
tells the bytes of each device, whether they fit, floating-point operations, what travels between devices, and a bound
on the time of a step. It fails (exit code 1) where the program does not fit or where gradients are all-reduced instead
of reduce-scattered.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from launch import command
from open_agentrl_jax.behaviour import BEHAVIOURS
from open_agentrl_jax.config import Config
from open_agentrl_jax.models import qwen, splash, triton
from open_agentrl_jax.models.attention import pick, row_parts
from open_agentrl_jax.models.blocks import Where
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.parallel.mesh import make_mesh
from open_agentrl_jax.planning import chips, flops, gpu_topology, hlo, workload
from open_agentrl_jax.run.policy import choose_packing
from open_agentrl_jax.train import state as states
from open_agentrl_jax.train.packing import most_micro_batches
from open_agentrl_jax.train.step import likelihood, make_step, policy_gradient
from open_agentrl_jax.types import UserError

# Shapes of the models that the configs train, for machines where the model itself is not: as in their config.json.
_QWEN = {"head_dim": 128, "rms_norm_eps": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_4b": _QWEN
    | {"model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_layers": 36, "num_heads": 32}
    | {"num_kv_heads": 8, "vocab_size": 151936, "rope_theta": 5e6, "tie_word_embeddings": True},
    "qwen2_5_7b": _QWEN
    | {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_layers": 28, "num_heads": 28}
    | {"num_kv_heads": 4, "vocab_size": 152064, "rope_theta": 1e6, "tie_word_embeddings": False},
}
GIB = 2**30


@dataclasses.dataclass
class Plan:
    """The step to compile, and what it is called with: shapes and shardings."""

    model: ModelConfig
    mesh: jax.sharding.Mesh
    step: Any
    arguments: tuple[Any, ...]
    rows: int
    length: int
    micro_batches: int


def shape_of(config: Config, layers: int = 0) -> ModelConfig:
    """The model's shape: from `model.path` where it is a folder here, else by the config's name.

    Args:
      config: the experiment.
      layers: > 0: so many instead of all.
    """
    dtype = config.model.compute_dtype
    run_time: dict[str, Any] = {"remat": config.model.remat, "attention": config.model.attention}
    run_time["compute_dtype"] = "bfloat16" if dtype == "auto" else dtype
    if (Path(config.model.path) / "config.json").exists():
        model = ModelConfig.from_hf(config.model.path, **run_time)
    else:
        known = [shape for name, shape in SHAPES.items() if config.name.startswith(name)]
        if not known:
            raise UserError(
                f"model.path={config.model.path}: no config.json there, and the config's name {config.name!r} begins "
                f"with none of {', '.join(SHAPES)}; give the folder of the model"
            )
        model = ModelConfig(**known[0], **run_time)
    return dataclasses.replace(model, num_layers=layers) if layers else model


def plan(config: Config, devices: Any, *, layers: int = 0) -> Plan:
    """The update that launch.train would run with this config on these devices: of RL where it has any, else of SFT."""
    model, mesh = shape_of(config, layers), make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    rl, behaviour = config.rl, BEHAVIOURS[config.behaviour]
    reinforced = bool(rl.steps or rl.epochs)
    longest = config.agent.max_prompt + config.agent.max_response if reinforced else config.sft.max_length
    packing = choose_packing(config, longest, mesh)
    sequences = rl.prompts // rl.mini_batches * rl.samples if reinforced else config.sft.batch_size
    objective = policy_gradient(rl.loss, width=config.agent.max_response) if reinforced else likelihood
    optimizer = states.make_optimizer(rl.optim if reinforced else config.sft.optim, 1000)
    step = make_step(
        model,
        optimizer,
        objective,
        temperature=config.rollout.temperature if reinforced else 1.0,
        entropy_target=rl.loss.entropy_target if reinforced else 0.0,
        behaviour=behaviour,
        gradients_summed=not reinforced and behaviour.sft_gradients_summed,
    )
    state = states.abstract(qwen.abstract_params(model), optimizer, mesh)
    micro_batches = most_micro_batches(sequences, packing.rows)
    shape, spec = (micro_batches, packing.rows, packing.length), NamedSharding(mesh, sharding.P(None, *sharding.TOKENS))
    like, _ = workload.packed(np.array([2]), rows=1, length=2)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=spec), like)
    used = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, sharding.P()))  # pyright: ignore[reportArgumentType]
    return Plan(model, mesh, step, (state, batch, used), packing.rows, packing.length, micro_batches)


def bytes_of(tree: Any) -> int:
    """Bytes of one device's part."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def smallest_matrix(model: ModelConfig, mesh: jax.sharding.Mesh) -> int:
    """Bytes, in the compute dtype, of the smallest gathered matrix of a layer on one device."""
    layers = qwen.abstract_params(model)["layers"]
    smallest = min(x.size // model.num_layers for x in layers.values() if x.ndim == 3)
    return (
        smallest
        * np.dtype("bfloat16" if model.compute_dtype == "bfloat16" else "float32").itemsize
        // mesh.shape["tensor"]
    )


@functools.cache
def attention_shares(length: int, parts: int, block: int) -> dict[str, float]:
    """Blocks that attention computes, as a share of the whole square of scores, on packed rows of agentic lengths.

    Returns:
      "causal": under a static mask; "packed": what the schedule runs, mean over rows; "slowest": likewise, of that
      of the parts of a row that has most to do; "exact": pairs of tokens that see each other.
    """
    sizes = workload.lengths(256, mean=min(4096, length // 4), cap=length)
    batch, used = workload.packed(sizes, rows=1, length=length)
    n = length // block

    @jax.jit
    def pairs(segments: jax.Array, positions: jax.Array) -> jax.Array:
        at = Where(segments, positions)
        return splash._pairs(at, at, 0, block).sum(-1)

    runs = np.array([pairs(batch.segment_ids[i, 0], batch.positions[i, 0]) for i in range(used)], float)
    seen = (batch.positions[:used] + (batch.segment_ids[:used] > 0)).sum() / used
    return {
        "causal": (n + 1) / (2 * n),
        "packed": float(runs.sum(-1).mean() / n**2),
        "slowest": float(runs.reshape(used, parts, -1).sum(-1).max(-1).mean() * parts / n**2),
        "exact": float(seen / length**2),
    }


def backend_of(made: Plan, length: int) -> str:
    """The attention of the step, whose rows have this length on a device."""
    with jax.set_mesh(made.mesh):
        found = pick(length, made.model.head_dim, np.dtype(made.model.compute_dtype))
    return found if made.model.attention == "auto" else made.model.attention


def report(
    made: Plan, traced: Any, compiled: Any, chip: chips.Chip, seconds: float
) -> tuple[dict[str, Any], list[str]]:
    """Everything there is to say about the compiled step, as numbers; and what is wrong with it."""
    mesh, model, devices = made.mesh, made.model, made.mesh.size
    memory, state = compiled.memory_analysis(), made.arguments[0]
    sizes = {
        "parameters": bytes_of(state.params),
        "moments": bytes_of(state.opt_state),
        "batch": bytes_of(made.arguments[1]),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "total": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    }
    travels = hlo.collectives(compiled.as_text(), dict(mesh.shape))
    whole = flops.count(traced.jaxpr)
    parts = row_parts(model.num_kv_heads, mesh)
    backend = backend_of(made, made.length // parts)
    block = triton.TILES.forward.queries if chip.gpu else splash.block_size(made.length // parts)
    shares = attention_shares(made.length, parts, block or made.length // parts)
    matrices = sum(x.size for x in jax.tree.leaves(state.params) if x.ndim > 1)
    tokens = made.rows * made.length
    compute = (whole.products + whole.kernels * shares["slowest"]) / devices / chip.flops
    links = sum(c.sent for c in travels) / chip.link_bandwidth
    # AdamW reads parameter, gradient and two moments and writes three of them, once a step; here a micro-batch is one.
    update = 7 * sizes["parameters"] / chip.hbm_bandwidth
    faults = []
    if sizes["peak"] > chip.hbm:
        faults.append(f"does not fit: the peak is {sizes['peak'] / GIB:.2f} GiB, the chip has {chip.hbm / GIB:.2f}")
    for c in hlo.all_reduced(travels, at_least=smallest_matrix(model, mesh), tokens=tokens):
        faults.append(f"{c.bytes} bytes are all-reduced over {'+'.join(c.axes)}, not reduce-scattered: {c.source}")
    if len(faults) > 1 and mesh.shape["seq"] == 1:
        faults.append("where fsdp alone fills a square torus, give mesh.seq one side of it")
    numbers = {
        "compile_seconds": round(seconds, 1),
        "mesh": dict(mesh.shape),
        "micro_batch": [made.rows, made.length],
        "micro_batches": made.micro_batches,
        "attention": backend,
        "bytes": sizes,
        "flops": {
            "matrix_products": whole.products,
            "attention_whole_square": whole.kernels,
            **{f"attention_{name}": whole.kernels * share for name, share in shares.items()},
            "model": 6.0 * matrices * tokens,
        },
        "collectives": _table(travels),
        "seconds": {"compute": compute, "links": links, "update": update, "bound": max(compute, links) + update},
    }
    return numbers, faults


def _table(travels: list[hlo.Collective]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], list[float]] = {}
    for c in travels:
        row = rows.setdefault((c.kind, "+".join(c.axes) or "itself"), [0, 0, 0.0])
        row[0], row[1], row[2] = row[0] + c.times, row[1] + c.bytes * c.times, row[2] + c.sent
    return [
        {"kind": k, "axis": a, "runs": n, "bytes": b, "sent": round(s)} for (k, a), (n, b, s) in sorted(rows.items())
    ]


def show(numbers: dict[str, Any], topology: str, chip: chips.Chip) -> None:
    """Prints what `report` found."""
    print(f"{topology}, mesh {numbers['mesh']}, micro-batch {numbers['micro_batch']} of {numbers['micro_batches']}")
    print(f"attention: {numbers['attention']}; compiled in {numbers['compile_seconds']} s")
    print("bytes a device, GiB")
    for name, size in numbers["bytes"].items():
        print(f"  {name:12} {size / GIB:9.2f}")
    print(f"  {'HBM':12} {chip.hbm / GIB:9.2f}")
    print("operations of one micro-batch on all devices (bfloat16, what is computed again included)")
    for name, count in numbers["flops"].items():
        print(f"  {name:24} {count:.3e}")
    print("collectives of one micro-batch and the update, a device")
    for row in numbers["collectives"]:
        print(f"  {row['kind']:18} {row['axis']:16} {row['runs']:6} runs {row['bytes'] / GIB:9.3f} GiB")
    t = numbers["seconds"]
    print(
        f"time of one micro-batch and update, at least: {t['bound']:.3f} s = max(compute {t['compute']:.3f}, links "
        f"{t['links']:.3f}) + update {t['update']:.3f}\n"
        "  assumed: every operation at the chip's peak rate, attention as the schedule runs it on rows packed from "
        "agentic lengths (log-normal, mean 4k) on the part of the row with most to do, collectives hidden behind "
        f"compute and in rings over one axis of the torus ({chip.link_bandwidth / 1e9:.0f} GB/s), the update bound by "
        f"memory ({chip.hbm_bandwidth / 1e9:.0f} GB/s)"
    )


def compile_for(config: Config, topology: str, *, layers: int = 0) -> tuple[dict[str, Any], list[str]]:
    """Compiles and reports; see the head of this file.

    Raises:
      UserError: an unknown topology, no libtpu, or a config that does not fit the mesh.
    """
    chip, devices = chips.chip(topology), topology_devices(topology)
    made = plan(config, devices, layers=layers)
    with jax.set_mesh(made.mesh):
        started = time.monotonic()
        traced = made.step.trace(*made.arguments)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {}, [f"does not fit: {' '.join(str(error).split())[:600]}"]
        seconds = time.monotonic() - started
    return report(made, traced, compiled, chip, seconds)


def topology_devices(name: str) -> Any:
    """The devices of a topology that need not be there."""
    if chips.chip(name).gpu:
        return gpu_topology.devices(name)
    from jax.experimental import topologies

    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # this is no cloud machine
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu says it in many ways
        text = " ".join(str(error).split())[:300]
        raise UserError(f"--topology={name}: {text}; install jax[tpu] and give a name such as v5p:2x2x1") from error


def main(config: Config, topology: str, layers: int, out: str) -> int:
    """The command."""
    numbers, faults = compile_for(config, topology, layers=layers)
    if numbers:
        show(numbers, topology, chips.chip(topology))
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
        "topology", "v5p:2x2x1", "v5p:2x2x1, v6e:2x4, v5e:8x8 ... or GPUs of one machine: h200:1, h100:8"
    )
    flags.DEFINE_integer("layers", 0, "so many layers instead of all, to try something fast")
    flags.DEFINE_string("out", "", "also write the numbers to this file, as JSON")
    load = command.config_flag()
    command.run(lambda: main(load(), flags.FLAGS.topology, flags.FLAGS.layers, flags.FLAGS.out))
