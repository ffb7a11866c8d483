"""What a training run carries from update to update, and the optimizer that moves it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from open_agentrl_jax.config import Optim
from open_agentrl_jax.models.params import shardings
from open_agentrl_jax.train.offload import HOST, AdamWOnHost


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """fp32 master weights, optimizer moments in their sharding, and counters."""

    params: Any
    opt_state: Any
    updates: jax.Array  # optimizer updates done in this phase, skipped ones included; int32
    skipped: jax.Array  # updates skipped because the gradient was not finite; int32
    entropy_coef: jax.Array  # float32


def schedule(optim: Optim, updates: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up, then constant, or a cosine that reaches 0 at the last update."""
    warmup = round(optim.warmup * updates) if optim.warmup < 1 else int(optim.warmup)
    if optim.schedule == "cosine":
        after: optax.Schedule = optax.cosine_decay_schedule(optim.lr, max(1, updates - warmup))
    else:
        after = optax.constant_schedule(optim.lr)
    if not warmup:
        return after
    # The first update already moves: it has 1 / warmup of the rate.
    ramp = optax.linear_schedule(optim.lr / warmup, optim.lr, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def rates(optim: Optim, updates: int) -> np.ndarray:
    """The learning rate of every update, on the host: to log one must not wait for the device."""
    return np.asarray(jax.vmap(schedule(optim, updates))(jnp.arange(max(updates, 1))))


Optimizer = optax.GradientTransformation | AdamWOnHost


def make_optimizer(optim: Optim, updates: int) -> Optimizer:
    """Global-norm clip, then AdamW; every parameter decays, as in torch's AdamW."""
    rate, b1, b2, decay = schedule(optim, updates), optim.b1, optim.b2, optim.weight_decay
    if optim.offload:
        return AdamWOnHost(rate, b1, b2, decay, optim.clip_norm)
    adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay)
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)


def update(optimizer: Optimizer, grads: Any, state: TrainState, finite: jax.Array) -> tuple[Any, Any]:
    """New parameters and optimizer state; both as they were where `finite` is False."""
    if isinstance(optimizer, AdamWOnHost):
        return optimizer.apply(grads, state.opt_state, state.params, finite)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    return keep(optax.apply_updates(state.params, updates), state.params), keep(opt_state, state.opt_state)


def create(params: Any, optimizer: Optimizer, *, entropy_coef: float = 0.0) -> TrainState:
    """A state at update 0 around `params`."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), zero, zero + 0, jnp.asarray(entropy_coef, jnp.float32))


def abstract(params: Any, optimizer: Optimizer, mesh: jax.sharding.Mesh | None) -> TrainState:
    """The state as ShapeDtypeStructs with shardings and memory kinds, to restore into or to compile for.

    Args:
        params: arrays or ShapeDtypeStructs.
        optimizer: of `make_optimizer`.
        mesh: None: the first device.
    """
    traced = jax.jit(lambda p: create(p, optimizer)).trace(params)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        where = jax.tree.map(lambda _: here, traced.out_info)
    else:
        where = shardings(traced.out_info, mesh)

    def leaf(made: Any, sharding: Any, aval: Any) -> jax.ShapeDtypeStruct:
        if aval.memory_space == HOST:
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(made.shape, made.dtype, sharding=sharding)

    avals = jax.tree.structure(traced.out_info).unflatten(traced.jaxpr.out_avals)
    return jax.tree.map(leaf, traced.out_info, where, avals)
