"""Matrices for generation in 8 bits: whole numbers, and one scale for each output channel, symmetric.

Parameters keep their tree; beside each quantised matrix "q" lies its "q_scale". A product multiplies the whole numbers
in the compute dtype and its result with the scales: a bracket that holds exactly. Norms, biases and an embedding that
is not the head too stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from open_agentrl_jax.parallel.mesh import current_mesh
from open_agentrl_jax.parallel.sharding import P

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
SCALE = "_scale"


@functools.partial(jax.jit, static_argnames=("axis", "whole"))
def _quantize(w: jax.Array, axis: int, *, whole: bool = False) -> tuple[jax.Array, jax.Array]:
    """Whole numbers of -127 to 127, and scales, of which each stands for the numbers along `axis`."""
    w = w.astype(jnp.float32)
    top = jnp.abs(w).max(axis, keepdims=True)
    scale = jnp.where(top > 0, top / 127, 1)
    values = jnp.round(w / scale).astype(jnp.int8)
    scale = scale.squeeze(axis)
    return values, jax.reshard(scale, P(None)) if whole and current_mesh() is not None else scale


def quantize(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters as models.qwen has them, with the matrices that a step of decoding reads in 8 bits."""
    layers = dict(params["layers"])
    for name in MATRICES:
        layers[name], layers[name + SCALE] = _quantize(layers[name], -2)  # [l in out] -> [l out]
    made = dict(params, layers=layers)
    if "head" in made:
        made["head"], made["head" + SCALE] = _quantize(made["head"], 0)  # [d v] -> [v]
    else:
        made["embed"], made["embed" + SCALE] = _quantize(made["embed"], 1, whole=True)  # [v d] -> [v]
    return made
