"""8-bit matrices for generation: integers with one symmetric scale per output channel.

The tree of parameters keeps its shape; beside each quantised matrix "q" is its "q_scale". A product multiplies the
integers in the compute dtype, then its result by the scales, which is exact. Norms, biases, and an embedding that is
not also the head stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from open_agentrl_jax.models.params import SCALE, TABLE
from open_agentrl_jax.parallel.mesh import current_mesh
from open_agentrl_jax.parallel.sharding import P


@functools.partial(jax.jit, static_argnames=("axis", "whole"))
def _quantize(w: jax.Array, axis: int, *, whole: bool = False) -> tuple[jax.Array, jax.Array]:
    """Integers from -127 to 127, and one scale in w's dtype for the numbers along `axis`."""
    top = jnp.abs(w).max(axis, keepdims=True).astype(jnp.float32)
    scale = jnp.where(top > 0, top / 127, 1).astype(w.dtype)
    values = jnp.round(w.astype(jnp.float32) / scale.astype(jnp.float32)).astype(jnp.int8)
    scale = scale.squeeze(axis)
    return values, jax.reshard(scale, P(None)) if whole and current_mesh() is not None else scale


def quantize(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with every matrix that decoding reads in 8 bits."""
    made = dict(params, layers=quantize_layers(params["layers"]))
    if "head" in made:
        made["head"], made["head" + SCALE] = _quantize(made["head"], 0)  # [d v] -> [v]
    else:
        made["embed"], made["embed" + SCALE] = _quantize(made["embed"], 1, whole=True)  # [v d] -> [v]
    return made


def quantize_layers(layers: dict[str, Any]) -> dict[str, Any]:
    """The layers with every matrix in 8 bits; adapters, norms and biases stay as they are."""
    made = dict(layers)
    for name in layers:
        if (axis := TABLE[f"layers/{name}"].int8) is not None and layers[name].dtype != jnp.int8:
            made[name], made[name + SCALE] = _quantize(layers[name], axis)  # [l in out] -> [l out]
    return made
