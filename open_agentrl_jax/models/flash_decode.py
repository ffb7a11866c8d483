"""Attention of one new token per row over the cache on NVIDIA GPUs: a Pallas kernel, compiled by Triton.

XLA gathers every block of the cache into a temporary array and waits for the host before each step of a loop whose
length it does not know. Here one program reads one block of one row and head where it lies in the cache (split keys, as
in "Flash-Decoding"), and the parts are merged in a fixed order: the result of a row depends on that row alone.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

_NEVER = -1e30  # a score that no softmax sees
_TILE = 128  # positions per step of the loop within a block
_ROWS = 16  # of queries in a product, at least: the smallest that Triton's matrix instructions take


def flash_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    slots: jax.Array,
    counts: jax.Array,
    layer: jax.Array | int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one token per row over the first positions of its slot and itself.

    Args:
      q: [p h D]; D is a power of two, 16 at least.
      k: [p k D], the token's own key.
      v: [p k D].
      keys: the cache, [l blocks s k D n].
      values: the cache, [l blocks s k n D].
      slots: [p] int32; one out of range reads the last slot.
      counts: [p] int32, positions of the slot that the row sees.
      layer: which layer of the cache.
      interpret: run the kernel without a GPU.

    Returns:
      [p h D] in q's dtype; scores and softmax are float32.
    """
    from jax.experimental.pallas import triton  # not in every build of jaxlib

    (p, h, D), K = q.shape, k.shape[1]
    _, blocks, s, _, _, n = keys.shape
    group, scale = h // K, 1 / math.sqrt(D)
    q = q.reshape(p, K, group, D)
    rows = max(_ROWS, pl.next_power_of_2(group))
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, rows - group), (0, 0)))

    of_row = pl.BlockSpec((None,), lambda r, head, i: (r,))
    part = lambda *inner: pl.BlockSpec((None, None, None, *inner), lambda r, head, i: (r, head, i, *[0] * len(inner)))  # noqa: E731
    shape = lambda *inner: jax.ShapeDtypeStruct((p, K, blocks, *inner), jnp.float32)  # noqa: E731
    mixed, top, mass = pl.pallas_call(
        functools.partial(_kernel, group=group, scale=scale, tile=min(n, _TILE)),
        grid=(p, K, blocks),
        in_specs=[
            pl.BlockSpec((None,), lambda r, head, i: (0,)),
            of_row,
            of_row,
            pl.BlockSpec((None, None, rows, D), lambda r, head, i: (r, head, 0, 0)),
            *(pl.BlockSpec(x.shape, lambda r, head, i: (0,) * 6) for x in (keys, values)),
        ],
        out_specs=[part(rows, D), part(rows), part(rows)],
        out_shape=[shape(rows, D), shape(rows), shape(rows)],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="flash_decode",
    )(jnp.reshape(jnp.asarray(layer, jnp.int32), 1), jnp.minimum(slots, s - 1), counts, padded, keys, values)

    own = jnp.einsum("pkgD,pkD->pkg", q, k, preferred_element_type=jnp.float32) * scale
    mixed, top, mass = mixed[:, :, :, :group], top[..., :group], mass[..., :group]
    highest = jnp.maximum(top.max(2), own)
    shares, mine = jnp.exp(top - highest[:, :, None]), jnp.exp(own - highest)
    total = (mass * shares).sum(2) + mine
    out = (mixed * shares[..., None]).sum(2) + mine[..., None] * v[:, :, None].astype(jnp.float32)
    return (out / total[..., None]).astype(q.dtype).reshape(p, h, D)


def _kernel(layer, slot, count, q, keys, values, mixed, top, mass, *, group: int, scale: float, tile: int):
    """One block of one row and head; a block without visible positions has no mass."""
    from jax.experimental.pallas import triton

    n, place = values.shape[4], (layer[...], pl.program_id(2), slot[...], pl.program_id(1))
    seen, mine = jnp.clip(count[...] - place[1] * n, 0, n), q[...]

    def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, highest, sums = carry
        span = pl.ds(j * tile, tile)
        scores = _dot(mine, keys[*place, :, span]) * scale
        scores = jnp.where((j * tile + jnp.arange(tile) < seen)[None], scores, _NEVER)
        new = jnp.maximum(highest, scores.max(1))
        weights, shrink = jnp.exp(scores - new[:, None]), jnp.exp(highest - new)
        part = _dot(weights.astype(values.dtype), values[*place, span, :])
        return total * shrink[:, None] + part, new, sums * shrink + weights.sum(1)

    rows = len(mine)
    start = jnp.zeros(mine.shape, jnp.float32), jnp.full(rows, _NEVER, jnp.float32), jnp.zeros(rows, jnp.float32)
    found = jax.lax.fori_loop(0, pl.cdiv(seen, tile), step, start)
    real = jnp.arange(rows) < group  # the others are padding and stay unwritten
    triton.store(mixed, found[0], mask=jnp.broadcast_to(real[:, None], mine.shape))
    for of, value in zip((top, mass), found[1:], strict=True):
        triton.store(of, value, mask=real)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # else Triton would round to tf32
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)
