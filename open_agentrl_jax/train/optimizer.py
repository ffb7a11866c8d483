"""The optimizer: learning-rate schedule, global-norm clipping, AdamW with moments on the device or in host memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from open_agentrl_jax.config import Optim
from open_agentrl_jax.train.offload import AdamWOnHost


def schedule(optim: Optim, updates: int) -> optax.Schedule:
    """Learning rate per update: linear warm-up, then constant, or a cosine that reaches 0 at the last update."""
    warmup = round(optim.warmup * updates) if optim.warmup < 1 else int(optim.warmup)
    if optim.schedule == "cosine":
        after: optax.Schedule = optax.cosine_decay_schedule(optim.lr, max(1, updates - warmup))
    else:
        after = optax.constant_schedule(optim.lr)
    if not warmup:
        return after
    # The first update has 1 / warmup of the rate, not 0.
    ramp = optax.linear_schedule(optim.lr / warmup, optim.lr, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def rates(optim: Optim, updates: int) -> np.ndarray:
    """The learning rate of every update, on the host, so that logging never waits for the device."""
    return np.asarray(jax.vmap(schedule(optim, updates))(jnp.arange(max(updates, 1))))


Optimizer = optax.GradientTransformation | AdamWOnHost


def make_optimizer(optim: Optim, updates: int) -> Optimizer:
    """Global-norm clipping, then AdamW; weight decay applies to every parameter, as in torch."""
    rate, b1, b2, decay = schedule(optim, updates), optim.b1, optim.b2, optim.weight_decay
    if optim.offload:
        return AdamWOnHost(rate, b1, b2, decay, optim.clip_norm)
    adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay)
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)


def update(optimizer: Optimizer, grads: Any, state: Any, finite: jax.Array) -> tuple[Any, Any]:
    """New parameters and optimizer state of a TrainState; both unchanged if `finite` is False."""
    if isinstance(optimizer, AdamWOnHost):
        return optimizer.apply(grads, state.opt_state, state.params, finite)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    return keep(optax.apply_updates(state.params, updates), state.params), keep(opt_state, state.opt_state)
