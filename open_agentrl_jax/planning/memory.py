"""Estimate what a run holds on each device, before anything is allocated.

The activation estimate follows the compiled programs of `launch.compile` to about a quarter (tests/planning); compile
the step for an exact figure.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from open_agentrl_jax.config import Config
from open_agentrl_jax.models import kv, lora, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.planning.ahead import bytes_of, longest_sequence, placed
from open_agentrl_jax.train import state as states
from open_agentrl_jax.train.optimizer import make_optimizer
from open_agentrl_jax.train.packing import choose_packing
from open_agentrl_jax.types import UserError

GIB = 2**30
_CHUNK = 1024  # tokens whose logits the head holds at once, the default of train.step


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    bytes: int  # per device
    cure: str  # the config field that reduces it


def table(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh | None, *, processes: int = 1) -> Sequence[Entry]:
    """What the busiest device holds, by purpose.

    Args:
      config: the experiment.
      model: shape, compute dtype and rematerialisation.
      mesh: None: one device.
      processes: with several, the embedded engine keeps whole weights and the whole cache on one device.
    """
    reinforced = bool(config.rl.steps or config.rl.epochs)
    optim = config.rl.optim if reinforced else config.sft.optim
    frozen, trained = lora.abstract(model)
    state = states.abstract(trained, make_optimizer(optim, 1000), mesh)
    weights = bytes_of(state.params)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.sharding.memory_kind != "pinned_host"]
    entries = [
        *([Entry("frozen weights", bytes_of(placed(frozen, mesh)), "model.lora.base=int8")] if frozen else []),
        Entry("adapters (float32)" if frozen else "weights (float32)", weights, "mesh.fsdp (more devices)"),
        Entry("optimizer", bytes_of(moments), f"{'rl' if reinforced else 'sft'}.optim.offload=True"),
        Entry("gradients", weights, "mesh.fsdp (more devices)"),
        Entry(
            "activations of a micro-batch", activations(config, model, mesh), "mesh.seq, packing.rows or model.remat"
        ),
    ]
    evaluates = bool(config.data.eval)
    if not (reinforced or evaluates):
        return entries
    item = jnp.dtype(model.compute_dtype).itemsize
    base = qwen.abstract_params(lora.without(model))
    total = sum(x.size for x in jax.tree.leaves(base))
    if config.rollout.engine != "local":
        if frozen:
            return [*entries, Entry("publishing (merged copy)", total * item, "mesh.fsdp (more devices)")]
        largest = max(x.size // (model.num_layers if x.ndim in (3, 4) else 1) for x in jax.tree.leaves(base))
        return [*entries, Entry("publishing (largest matrix)", largest * item, "mesh.fsdp (more devices)")]
    whole = mesh is None or processes > 1
    copies = config.rl.max_staleness if reinforced else 0
    if frozen:
        copies = int(config.rollout.weights != "same")  # the frozen weights are shared with the trainer
    elif item != 4 or config.rollout.weights == "int8":
        copies += 1  # in the compute dtype; float32 weights are shared with the trainer
    size = 1 if config.rollout.weights == "int8" else item
    held = total * size // (1 if whole else _ways(mesh, (*sharding.PARTS, "tensor")))
    gathered = 4 * total if processes > 1 else 0
    entries.append(Entry("engine weights", copies * held + gathered, "rollout.engine=sglang"))
    cache, slots = engine_cache(config, model, None if whole else mesh)
    return [*entries, Entry(f"engine cache ({slots} slots)", cache, "rollout.slots")]


def activations(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh | None) -> int:
    """Bytes per device that one micro-batch takes beside state and gradients: forward, backward and head."""
    packing = choose_packing(config, longest_sequence(config), mesh)
    c, item = model, jnp.dtype(model.compute_dtype).itemsize
    length = max(packing.length, *packing.more_lengths, 0)
    tokens = packing.rows * length // _ways(mesh, sharding.SLOTS)
    tensor, vocabulary = _ways(mesh, ("tensor",)), _ways(mesh, sharding.VOCABULARY)
    heads, kv_heads = c.num_heads * c.head_dim // tensor, c.num_kv_heads * c.head_dim // tensor
    # Of a mixture, one row of hidden units for each choice.
    hidden = (c.experts_per_token * c.expert_size if c.num_experts else c.intermediate_size) // tensor
    products = heads + 2 * kv_heads + 2 * hidden + 2 * c.hidden_size  # outputs of a layer's matrix products
    saved = {  # values per token and layer that wait for the backward pass
        "none": 3 * products,
        "dots": products + c.hidden_size // tensor,
        "attention": heads + c.hidden_size // tensor,
        "full": c.hidden_size // tensor,
        "offload": 0,
    }[c.remat]
    layer = tokens * (6 * hidden + 2 * heads + 4 * c.hidden_size) * item  # one layer forward and backward
    matrix = c.hidden_size * c.vocab_size // vocabulary
    gradient = 4 if c.lora is None else 0
    head = matrix * (item + gradient) + 3 * 4 * min(_CHUNK, tokens) * c.vocab_size // vocabulary
    return tokens * saved * c.num_layers * item + max(layer, head)


def engine_cache(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh | None) -> tuple[int, int]:
    """Bytes per device of the embedded engine's KV cache, and its slots."""
    groups = _ways(mesh, sharding.SLOTS)
    slots = -(-config.rollout.slots // groups) * groups
    length = config.agent.max_prompt + config.agent.max_response
    cache = jax.eval_shape(lambda: kv.init_cache(model, slots, length))
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return total // groups // _ways(mesh, ("tensor",)), slots


def device_bytes() -> int:
    """Memory that JAX may use on one device of this process; a CPU's devices share the machine's."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return int((device.memory_stats() or {}).get("bytes_limit", 0))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def check(entries: Sequence[Entry], available: int) -> None:
    """Refuses a run that cannot fit.

    Raises:
      UserError: the entries exceed `available` bytes; names the largest entry and the field that reduces it.
    """
    total = sum(entry.bytes for entry in entries)
    if not available or total <= available:
        return
    largest = max(entries, key=lambda entry: entry.bytes)
    parts = ", ".join(f"{entry.name} {entry.bytes / GIB:.1f}" for entry in entries)
    cure = largest.cure
    if cure == "rollout.slots":
        slots = int(largest.name.split("(")[1].split()[0])
        room = available - (total - largest.bytes)
        cure = f"rollout.slots={room * slots // largest.bytes}" if room * slots >= largest.bytes else "rollout.slots=1"
    share = ""
    if jax.local_devices()[0].platform == "gpu" and not os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"):
        share = "; JAX uses 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 is set"
    raise UserError(
        f"memory: a device needs about {total / GIB:.1f} GiB and has {available / GIB:.1f} ({parts}); "
        f"reduce {largest.name} by {cure}{share}"
    )


def rows(entries: Sequence[Entry], available: int) -> list[list[str]]:
    """The table as text: purpose, GiB per device, and the field that reduces it."""
    body = [[entry.name, f"{entry.bytes / GIB:.2f}", entry.cure] for entry in entries]
    total = sum(entry.bytes for entry in entries)
    return [*body, ["total", f"{total / GIB:.2f}", f"of {available / GIB:.2f} available" if available else ""]]


def _ways(mesh: jax.sharding.Mesh | None, axes: tuple[str, ...]) -> int:
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
