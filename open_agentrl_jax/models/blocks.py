"""Positions of the tokens in packed rows, and the blocks of keys that each block of queries needs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

FAR = 2**30  # above every segment id and position


class Where(NamedTuple):
    """Segment ids and positions of the tokens of rows, both [b t]."""

    segments: jax.Array
    positions: jax.Array


def needed(at_q: Where, at_k: Where) -> jax.Array:
    """Whether each block of queries [b nq r m] needs each block of keys [b nk r n], as a mask [b nq nk].

    A pair is needed if its ranges of segment ids overlap. If they overlap in one segment only, the last of the queries
    and the first of the keys, the latest query must also not precede the earliest key. The mask contains every needed
    pair for any order of tokens, and only needed pairs for ordered rows. Negative segments match nothing. The r rows of
    a block share one result.
    """
    real_q, real_k = at_q.segments >= 0, at_k.segments >= 0
    first_q = jnp.where(real_q, at_q.segments, FAR).min(-1, keepdims=True)
    last_q = jnp.where(real_q, at_q.segments, -FAR).max(-1, keepdims=True)
    first_k = jnp.where(real_k, at_k.segments, FAR).min(-1, keepdims=True)
    last_k = jnp.where(real_k, at_k.segments, -FAR).max(-1, keepdims=True)
    latest = jnp.where(at_q.segments == last_q, at_q.positions, -FAR).max(-1)[:, :, None]
    earliest = jnp.where(at_k.segments == first_k, at_k.positions, FAR).min(-1)[:, None]
    first_q, last_q = first_q[:, :, None, :, 0], last_q[:, :, None, :, 0]
    first_k, last_k = first_k[:, None, :, :, 0], last_k[:, None, :, :, 0]
    meet = (last_k >= first_q) & ((first_k < last_q) | ((first_k == last_q) & (earliest <= latest)))
    return meet.any(-1)


def bounds(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The range [low, high) of key blocks that covers the needed ones of `pairs` [... nq nk]; may be empty."""
    low = jnp.argmax(pairs, axis=-1)
    high = pairs.shape[-1] - jnp.argmax(pairs[..., ::-1], axis=-1)
    return low, jnp.where(pairs.any(-1), high, low)
