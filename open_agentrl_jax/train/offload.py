"""AdamW whose moments lie in host memory: a parameter's come to the device for its own update and leave it again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def adamw_on_host(
    rate: optax.Schedule, *, b1: float, b2: float, weight_decay: float, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """optax.adamw, bit for bit and with its state's tree, one parameter after the other.

    Its update wants `finite`, a scalar: where that is False the moments stay as they are. To do that afterwards, as for
    what lies on the device, would bring them there twice.

    Args:
        rate: learning rate by update.
        b1: decay of the mean.
        b2: decay of the mean square.
        weight_decay: of every parameter.
        eps: added to the root of the mean square.
    """
    plain = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    def init(params: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, HOST) if x.ndim else x, plain.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        adam, decay, schedule = state
        count = optax.safe_increment(adam.count)
        corrections = 1 - b1**count, 1 - b2**count
        step = -jnp.asarray(rate(schedule.count), jnp.float32)
        finite = done = extra["finite"]

        def one(grad: jax.Array, param: jax.Array, *moments: jax.Array) -> tuple[jax.Array, ...]:
            nonlocal done
            # Without the barriers all moments are on the device at once: nothing else says that one has to wait.
            moments, done = jax.lax.optimization_barrier((moments, done))
            old = [jax.device_put(x, DEVICE) for x in moments]
            mean, square = new = (1 - b1) * grad + b1 * old[0], (1 - b2) * grad**2 + b2 * old[1]
            direction = mean / corrections[0] / (jnp.sqrt(square / corrections[1]) + eps) + weight_decay * param
            kept = [jnp.where(finite, *pair) for pair in zip(new, old, strict=True)]
            kept, done = jax.lax.optimization_barrier((kept, done))
            return step * direction, *(jax.device_put(x, HOST) for x in kept)

        both = jax.tree.map(one, updates, params, adam.mu, adam.nu)
        moved, mu, nu = jax.tree.transpose(jax.tree.structure(params), None, both)
        schedule = schedule._replace(count=optax.safe_increment(schedule.count))
        return moved, (adam._replace(count=count, mu=mu, nu=nu), decay, schedule)

    return optax.GradientTransformationExtraArgs(init, update)


def lies_on_host(x: jax.Array) -> bool:
    """Whether an array, traced or not, is in host memory."""
    return jax.typeof(x).memory_space == HOST
