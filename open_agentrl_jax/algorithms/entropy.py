"""Control of the entropy coefficient."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def update_coefficient(
    coefficient: Float[Array, ""], entropy: Float[Array, ""], target: float, *, rate: float = 1e-3, most: float = 0.05
) -> Float[Array, ""]:
    """Updates the coefficient so that the policy's entropy does not fall below `target`.

    An integral controller: the coefficient grows by `rate` per nat below the target and shrinks above it. It stays
    within [0, most], so that an entropy above the target is not penalized.

    Args:
        coefficient: of the entropy term in this step's loss.
        entropy: mean over this step's tokens, in nats.
        target: in nats.
        rate: change per nat and step.
        most: upper bound.
    """
    return jnp.clip(coefficient + rate * (target - entropy), 0.0, most)
