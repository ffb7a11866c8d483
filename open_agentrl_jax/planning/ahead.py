"""Compile a config's real train step for devices that are not attached, and check it; nothing is executed.

The result holds the bytes per device, floating-point operations, collectives, and a lower bound on the step time. A
step fails the check if it does not fit the device's memory or all-reduces gradients instead of scattering them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from open_agentrl_jax.config import Config
from open_agentrl_jax.models import lora, params, qwen, splash, triton
from open_agentrl_jax.models.attention import pick, row_parts
from open_agentrl_jax.models.blocks import Where
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.parallel.mesh import make_mesh, slice_count
from open_agentrl_jax.planning import chips, flops, hlo, topologies, workload
from open_agentrl_jax.planning.shapes import shape_of
from open_agentrl_jax.reference.behaviour import BEHAVIOURS
from open_agentrl_jax.train import state as states
from open_agentrl_jax.train.optimizer import make_optimizer
from open_agentrl_jax.train.packing import choose_packing, most_micro_batches
from open_agentrl_jax.train.step import likelihood, make_step, policy_gradient

GIB = 2**30


@dataclasses.dataclass
class StepPlan:
    """A step to compile and its abstract arguments: shapes and shardings."""

    model: ModelConfig
    mesh: jax.sharding.Mesh
    step: Any
    arguments: tuple[Any, ...]  # state, batch, occupied micro-batches, frozen weights (None without adapters)
    rows: int
    length: int
    micro_batches: int
    sequences: int  # per mini-batch


def longest_sequence(config: Config) -> int:
    """Tokens of the longest sequence that the config trains on: of RL if it has any, else of SFT."""
    reinforced = config.rl.steps or config.rl.epochs
    return config.agent.max_prompt + config.agent.max_response if reinforced else config.sft.max_length


def plan(config: Config, devices: Any, *, layers: int = 0) -> StepPlan:
    """The update that a run with this config executes on these devices: of RL if it has any, else of SFT."""
    model, mesh = shape_of(config, layers), make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    rl, behaviour = config.rl, BEHAVIOURS[config.behaviour]
    reinforced = bool(rl.steps or rl.epochs)
    packing = choose_packing(config, longest_sequence(config), mesh)
    sequences = rl.prompts // rl.mini_batches * rl.samples if reinforced else config.sft.batch_size
    objective = policy_gradient(rl.loss, width=config.agent.max_response) if reinforced else likelihood
    optimizer = make_optimizer(rl.optim if reinforced else config.sft.optim, 1000)
    step = make_step(
        model,
        optimizer,
        objective,
        temperature=config.rollout.temperature if reinforced else 1.0,
        entropy_target=rl.loss.entropy_target if reinforced else 0.0,
        token_count=behaviour.rl_token_count if reinforced else behaviour.sft_token_count,
    )
    frozen, trained = lora.abstract(model)
    state = states.abstract(trained, optimizer, mesh)
    frozen = placed(frozen, mesh)
    micro_batches = most_micro_batches(sequences, packing.rows)
    shape, spec = (micro_batches, packing.rows, packing.length), NamedSharding(mesh, sharding.P(None, *sharding.TOKENS))
    like, _ = workload.packed(np.array([2]), rows=1, length=2)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=spec), like)
    used = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, sharding.P()))  # pyright: ignore[reportArgumentType]
    return StepPlan(
        model, mesh, step, (state, batch, used, frozen), packing.rows, packing.length, micro_batches, sequences
    )


def placed(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Abstract parameters with the shardings of a run."""
    if mesh is None:
        where: Any = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree)
    else:
        where = params.shardings(tree, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)


def bytes_of(tree: Any) -> int:
    """Bytes per device of abstract arrays."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def smallest_matrix(model: ModelConfig, mesh: jax.sharding.Mesh) -> int:
    """Bytes, in the compute dtype, of the smallest gathered matrix of a layer on one device."""
    layers = qwen.abstract_params(lora.without(model))["layers"]
    smallest = min(x.size // model.num_layers for x in layers.values() if x.ndim in (3, 4))
    itemsize = np.dtype("bfloat16" if model.compute_dtype == "bfloat16" else "float32").itemsize
    return smallest * itemsize // mesh.shape["tensor"]


def active_parameters(params: Any, model: ModelConfig) -> int:
    """Parameters of the matrices that a token is multiplied with: of a mixture only the chosen experts."""
    share = model.experts_per_token / model.num_experts if model.num_experts else 1.0
    return round(sum(x.size * (share if x.ndim == 4 else 1) for x in jax.tree.leaves(params) if x.ndim > 1))


@functools.cache
def attention_shares(length: int, parts: int, block: int) -> dict[str, float]:
    """Fractions of the [length, length] score matrix on packed rows of agentic lengths.

    Args:
      length: tokens per row.
      parts: parts of a row whose queries different devices compute; must divide `length`.
      block: tokens per block; must divide length / parts.

    Returns:
      "causal": blocks under a static causal mask; "packed": blocks that the schedule runs, mean over rows; "slowest":
      the same for the busiest part of a row; "exact": pairs of tokens that attend to each other.
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


def attention_block(part: int, chip: chips.Chip) -> int:
    """Tokens per attention block for a row part of `part` tokens: the largest size up to the kernel's that divides it.

    The GPU kernels pad a partial block, so for them this slightly overestimates the number of blocks.
    """
    if not chip.gpu:
        return splash.block_size(part) or part
    return next(n for n in range(min(triton.TILES.forward.queries, part), 0, -1) if part % n == 0)


def backend_of(made: StepPlan, length: int) -> str:
    """The step's attention backend, for rows of which a device holds `length` tokens."""
    with jax.set_mesh(made.mesh):
        found = pick(length, made.model.head_dim, np.dtype(made.model.compute_dtype))
    return found if made.model.attention == "auto" else made.model.attention


def memory_of(made: StepPlan, compiled: Any) -> dict[str, int]:
    """Bytes per device by kind, from the compiler; "host" is pinned host memory."""
    memory, state = compiled.memory_analysis(), made.arguments[0]
    on_host = [x for x in jax.tree.leaves(made.arguments) if x.sharding.memory_kind == "pinned_host"]
    # GPU compilers count arguments in host memory as the device's, TPU compilers do not.
    unseparated = bytes_of(on_host) if on_host and not memory.host_argument_size_in_bytes else 0
    sizes = {
        "parameters": bytes_of(state.params),
        "frozen": bytes_of(made.arguments[3]),
        "moments": bytes_of(state.opt_state),
        "batch": bytes_of(made.arguments[1]),
        "arguments": memory.argument_size_in_bytes - unseparated,
        "temporary": memory.temp_size_in_bytes,
    }
    # Donated arguments alias the outputs; only the rest of the outputs takes memory of its own.
    returned = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    sizes["total"] = sizes["arguments"] + sizes["temporary"] + returned + memory.generated_code_size_in_bytes
    # With offloading the compiler's peak includes host memory; the device never holds more than the total.
    sizes["peak"] = min(memory.peak_memory_in_bytes, sizes["total"])
    sizes["host"] = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes + unseparated
    return sizes


def report(
    made: StepPlan, traced: Any, compiled: Any, chip: chips.Chip, seconds: float
) -> tuple[dict[str, Any], list[str]]:
    """The compiled step in numbers, and its faults."""
    mesh, model, devices = made.mesh, made.model, made.mesh.size
    sizes, state = memory_of(made, compiled), made.arguments[0]
    slices = slice_count(mesh.devices.flat)
    travels = hlo.collectives(compiled.as_text(), dict(mesh.shape), slices=slices)
    whole = flops.count(traced.jaxpr)
    parts = row_parts(model.num_kv_heads, mesh)
    part = made.length // parts
    shares = attention_shares(made.length, parts, attention_block(part, chip))
    matrices, frozen = (active_parameters(tree, model) for tree in (state.params, made.arguments[3]))
    tokens = made.rows * made.length
    ragged = whole.ragged / mesh.shape["expert"]  # the devices along it share the choices, here evenly
    compute = (whole.products + ragged + whole.kernels * shares["slowest"]) / devices / chip.flops
    links = sum(c.sent for c in travels if c.axes != hlo.BETWEEN) / chip.link_bandwidth
    between = sum(c.sent for c in travels if c.axes == hlo.BETWEEN) / (chip.slice_bandwidth or math.inf)
    # AdamW reads the parameter, gradient and two moments, and writes three of them, once per step (here of one
    # micro-batch).
    update = 7 * sizes["parameters"] / chip.hbm_bandwidth
    faults = []
    if sizes["peak"] > chip.hbm:
        faults.append(f"does not fit: the peak is {sizes['peak'] / GIB:.2f} GiB, the chip has {chip.hbm / GIB:.2f}")
    for c in hlo.all_reduced(travels, at_least=smallest_matrix(model, mesh), tokens=tokens):
        faults.append(f"{c.bytes} bytes are all-reduced over {'+'.join(c.axes)}, not reduce-scattered: {c.source}")
    if len(faults) > 1 and mesh.shape["seq"] == 1:
        faults.append("if fsdp alone fills a square torus, set mesh.seq to one side of it")
    numbers = {
        "compile_seconds": round(seconds, 1),
        "mesh": dict(mesh.shape),
        "micro_batch": [made.rows, made.length],
        "micro_batches": made.micro_batches,
        "packed": workload.utilization(made.sequences, rows=made.rows, lengths=(made.length,)),
        "attention": backend_of(made, part),
        "bytes": sizes,
        "flops": {
            "matrix_products": whole.products + ragged,
            "attention_whole_square": whole.kernels,
            **{f"attention_{name}": whole.kernels * share for name, share in shares.items()},
            "model": (6.0 * matrices + 4.0 * frozen) * tokens,  # frozen weights have no gradient
        },
        "collectives": _table(travels),
        "seconds": {
            "compute": compute,
            "links": links,
            "slices": between,
            "update": update,
            "bound": max(compute, links, between) + update,
        },
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


def compile_for(config: Config, topology: str, *, layers: int = 0) -> tuple[dict[str, Any], list[str]]:
    """Compiles the config's step for a topology; returns numbers (empty if it does not compile) and faults.

    Raises:
      UserError: the topology is unknown, its compiler is missing, or the config does not fit the mesh.
    """
    chip, devices = chips.chip(topology), topologies.devices(topology)
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


def describe(numbers: dict[str, Any], topology: str) -> str:
    """The numbers of `report` as text."""
    chip, t = chips.chip(topology), numbers["seconds"]
    lines = [
        f"{topology}, mesh {numbers['mesh']}, micro-batch {numbers['micro_batch']}, up to {numbers['micro_batches']}",
        f"attention: {numbers['attention']}; compiled in {numbers['compile_seconds']} s",
        f"packing: {numbers['packed']:.0%} of a micro-batch's tokens are useful (log-normal lengths, mean 4k)",
        "GiB per device",
        *(f"  {name:12} {size / GIB:9.2f}" for name, size in {**numbers["bytes"], "HBM": chip.hbm}.items()),
        "operations per micro-batch on all devices (bfloat16, recomputation included)",
        *(f"  {name:24} {count:.3e}" for name, count in numbers["flops"].items()),
        "collectives per device, of one micro-batch and the update",
        *(
            f"  {row['kind']:18} {row['axis']:16} {row['runs']:6} runs {row['bytes'] / GIB:9.3f} GiB"
            for row in numbers["collectives"]
        ),
        f"lower bound for one micro-batch and the update: {t['bound']:.3f} s = max(compute {t['compute']:.3f}, links "
        f"{t['links']:.3f}, between slices {t['slices']:.3f}) + update {t['update']:.3f}",
        "  assumes the chip's peak rate for every operation, attention as the schedule runs it on packed rows of "
        "agentic lengths (log-normal, mean 4k) on the busiest part of a row, collectives hidden behind compute in "
        f"rings over one torus axis ({chip.link_bandwidth / 1e9:.0f} GB/s), between slices at "
        f"{chip.slice_bandwidth / 1e9:g} GB/s per chip, the update bound by memory "
        f"({chip.hbm_bandwidth / 1e9:.0f} GB/s)",
    ]
    return "\n".join(lines)
