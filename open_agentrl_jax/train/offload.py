"""AdamW whose moments lie in host memory and come to the device one layer at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


@dataclasses.dataclass(frozen=True)
class AdamWOnHost:
    """Global-norm clip and AdamW as optax computes them, with their state's tree, the moments in pinned host memory.

    The formulas are written out, since optax updates all parameters at once.
    """

    rate: optax.Schedule
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float
    eps: float = 1e-8

    def init(self, params: Any) -> Any:
        """The state of optax.chain(clip_by_global_norm, adamw)."""
        plain = optax.chain(optax.clip_by_global_norm(self.clip_norm), optax.adamw(self.rate))
        return jax.tree.map(lambda x: jax.device_put(x, HOST) if x.ndim else x, plain.init(params))

    def apply(self, grads: Any, state: Any, params: Any, finite: jax.Array) -> tuple[Any, Any]:
        """New parameters and state; both as they were where `finite` is False."""
        clip, (adam, decay, schedule) = state
        norm = optax.global_norm(grads)
        count = optax.safe_increment(adam.count)
        corrections = 1 - self.b1**count, 1 - self.b2**count
        step = -jnp.asarray(self.rate(schedule.count), jnp.float32)

        def one(grad: jax.Array, param: jax.Array, *moments: jax.Array) -> tuple[jax.Array, ...]:
            grad = jnp.where(norm < self.clip_norm, grad, grad / norm * self.clip_norm)
            mean, square = old = [jax.device_put(x, DEVICE) for x in moments]
            mean, square = (1 - self.b1) * grad + self.b1 * mean, (1 - self.b2) * grad**2 + self.b2 * square
            direction = mean / corrections[0] / (jnp.sqrt(square / corrections[1]) + self.eps)
            moved = param + step * (direction + self.weight_decay * param)
            moved, *new = (jnp.where(finite, a, b) for a, b in zip((moved, mean, square), (param, *old), strict=True))
            return moved, *(jax.device_put(x, HOST) for x in new)

        def several(trees: Any) -> Any:
            return jax.tree.transpose(jax.tree.structure(trees[0]), None, jax.tree.map(one, *trees))

        # The layers are stacked, and taken in a loop: nothing less keeps their moments from coming all at once.
        trees = grads, params, adam.mu, adam.nu
        rest = several([{name: x for name, x in tree.items() if name != "layers"} for tree in trees])
        _, layers = jax.lax.scan(lambda _, layer: (None, several(layer)), None, tuple(tree["layers"] for tree in trees))
        params, mu, nu = (part | {"layers": stack} for part, stack in zip(rest, layers, strict=True))
        # What is skipped does not count either.
        moved, followed = (jnp.where(finite, optax.safe_increment(n), n) for n in (adam.count, schedule.count))
        adam, schedule = adam._replace(count=moved, mu=mu, nu=nu), schedule._replace(count=followed)
        return params, (clip, (adam, decay, schedule))
