"""The state that training carries from update to update."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from open_agentrl_jax.models.params import shardings
from open_agentrl_jax.train.offload import HOST
from open_agentrl_jax.train.optimizer import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """fp32 master weights, optimizer moments in their sharding, and counters."""

    params: Any
    opt_state: Any
    updates: jax.Array  # int32: optimizer updates of this phase, skipped ones included
    skipped: jax.Array  # int32: updates skipped because the gradient was not finite
    entropy_coef: jax.Array  # float32


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
