"""Attention on NVIDIA GPUs: Pallas kernels, compiled by Triton, that walk only the blocks which packed rows need.

One program computes one block of one head and goes through the range of blocks that its tokens see, which is computed
in the step from the rows at hand (models/blocks.py): a row of short sequences costs what the short sequences cost.
The forward pass is that of flash attention (Dao, arXiv 2307.08691); the backward pass has a program for each block of
queries (dq) and one for each block of keys (dk, dv), so that nothing is added to from two sides.

The kernels that JAX ships for GPUs mask by segment but go through all blocks (Triton), or know no segments (Mosaic).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from open_agentrl_jax.models.blocks import Where, bounds, needed

_NEVER = -1e30  # a score no softmax sees


class Tile(NamedTuple):
    """What one step of a kernel's loop computes, tokens by tokens, and how Triton is to compile it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of the three kernels; numbers of tokens are powers of two, 16 at least, for so are Triton's."""

    forward: Tile
    by_query: Tile
    by_key: Tile


# For a head_dim of 128 in bfloat16 on a GPU of compute capability 9.0. Chosen by what the compiler says of registers
# and shared memory (docs/measurements.md), not by the clock.
TILES = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2))


def triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Where,
    keys: Where,
    *,
    tiles: Tiles = TILES,
    interpret: bool = False,
) -> jax.Array:
    """A backend of models/attention.py, right for any order of tokens; fast where segments are contiguous.

    Rows are padded to whole tiles, head_dim to a power of two: both exact.
    """
    t, D = q.shape[1], q.shape[3]
    width = max(16, pl.next_power_of_2(D))
    scale = 1 / math.sqrt(D)
    size_q, size_k = (max(getattr(tile, side) for tile in tiles) for side in ("queries", "keys"))
    queries = jax.tree.map(lambda x: _grow(x, 1, -(-t // size_q) * size_q), queries)
    keys = jax.tree.map(lambda x: _grow(x, 1, -(-k.shape[1] // size_k) * size_k), keys)
    # Padding, real or added, is segment -1 as a query and -2 as a key: nothing sees it, it sees nothing.
    queries = queries._replace(segments=jnp.where(queries.segments == 0, -1, queries.segments))
    keys = keys._replace(segments=jnp.where(keys.segments == 0, -2, keys.segments))
    q = _grow(_grow(q, 1, queries.segments.shape[1]), 3, width)
    k, v = (_grow(_grow(x, 1, keys.segments.shape[1]), 3, width) for x in (k, v))
    o = jnp.asarray(_attend(q, k, v, queries, keys, scale, tiles, interpret))
    return o[:, :t, :, :D]


def _grow(x: jax.Array, axis: int, size: int) -> jax.Array:
    missing = size - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, queries: Where, keys: Where, scale: float, tiles: Tiles, interpret: bool) -> jax.Array:
    return _forward(q, k, v, queries, keys, scale, tiles, interpret)[0]


def _forward(q, k, v, queries: Where, keys: Where, scale: float, tiles: Tiles, interpret: bool):
    b, t, h, D = q.shape
    tile = tiles.forward
    low, high = bounds(_pairs(queries, keys, tile))
    o, lse = _call(
        functools.partial(_forward_kernel, tile=tile, scale=scale),
        tile,
        grid=(t // tile.queries, h, b),
        flops=2 * 2 * b * h * t * k.shape[1] * D,
        inputs=(*_spans(low, high), *_tokens(queries, tile.queries), *_tokens(keys), *_heads(q, k, v, tile.queries)),
        outputs=[_heads_of(q, tile.queries), (jax.ShapeDtypeStruct((b, h, t), jnp.float32), _row_of(tile.queries))],
        interpret=interpret,
    )
    o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention")
    return o, (q, k, v, queries, keys, o, lse)


def _backward(scale: float, tiles: Tiles, interpret: bool, saved, d_o: jax.Array):
    q, k, v, queries, keys, o, lse = saved
    b, t, h, D = q.shape
    s, K = k.shape[1:3]
    slope = (o.astype(jnp.float32) * d_o.astype(jnp.float32)).sum(-1).swapaxes(1, 2)

    tile = tiles.by_query
    low, high = bounds(_pairs(queries, keys, tile))
    (dq,) = _call(
        functools.partial(_by_query_kernel, tile=tile, scale=scale),
        tile,
        grid=(t // tile.queries, h, b),
        flops=2 * 3 * b * h * t * s * D,
        inputs=(
            *_spans(low, high),
            *_tokens(queries, tile.queries),
            *_tokens(keys),
            *_heads(q, k, v, tile.queries),
            (d_o, _heads_of(q, tile.queries)[1]),
            *((x, _row_of(tile.queries)) for x in (lse, slope)),
        ),
        outputs=[_heads_of(q, tile.queries)],
        interpret=interpret,
    )

    tile = tiles.by_key
    low, high = bounds(_pairs(queries, keys, tile).swapaxes(1, 2))
    group = h // K
    all_q = pl.BlockSpec((None, t, group, D), lambda j, n, b: (b, 0, n, 0))  # of the heads that read key head n
    all_rows = pl.BlockSpec((None, group, t), lambda j, n, b: (b, n, 0))
    dk, dv = _call(
        functools.partial(_by_key_kernel, tile=tile, scale=scale),
        tile,
        grid=(s // tile.keys, K, b),
        flops=2 * 4 * b * h * t * s * D,
        inputs=(
            *_spans(low, high),
            *_tokens(queries),
            *_tokens(keys, tile.keys),
            (q, all_q),
            *((x, _heads_of(x, tile.keys)[1]) for x in (k, v)),
            (d_o, all_q),
            *((x, all_rows) for x in (lse, slope)),
        ),
        outputs=[_heads_of(x, tile.keys) for x in (k, v)],
        interpret=interpret,
    )
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


def _pairs(queries: Where, keys: Where, tile: Tile) -> jax.Array:
    """Which pairs of blocks are to be computed, [b nq nk]."""
    cut = [
        jax.tree.map(lambda x, n=n: x.reshape(x.shape[0], -1, 1, n), at)
        for at, n in ((queries, tile.queries), (keys, tile.keys))
    ]
    return needed(*cut)


# Operands with their blocks; a program is (number of its block, head, row).


def _spans(low: jax.Array, high: jax.Array):
    spec = pl.BlockSpec((None, None), lambda i, n, b: (b, i))
    return (low.astype(jnp.int32), spec), (high.astype(jnp.int32), spec)


def _tokens(at: Where, block: int | None = None):
    """Segments and positions: of the program's block, or of the whole row."""
    whole = pl.BlockSpec((None, at.segments.shape[1]), lambda i, n, b: (b, 0))
    spec = pl.BlockSpec((None, block), lambda i, n, b: (b, i)) if block else whole
    return tuple((x.astype(jnp.int32), spec) for x in at)


def _heads(q: jax.Array, k: jax.Array, v: jax.Array, block: int):
    """The program's queries, and the keys and values of its row."""
    group = q.shape[2] // k.shape[2]
    row = pl.BlockSpec((None, k.shape[1], None, k.shape[3]), lambda i, n, b: (b, 0, n // group, 0))
    return (q, _heads_of(q, block)[1]), (k, row), (v, row)


def _heads_of(x: jax.Array, block: int):
    spec = pl.BlockSpec((None, block, None, x.shape[3]), lambda i, n, b: (b, i, n, 0))
    return jax.ShapeDtypeStruct(x.shape, x.dtype), spec


def _row_of(block: int):
    return pl.BlockSpec((None, None, block), lambda i, n, b: (b, n, i))


def _call(kernel: Callable[..., None], tile: Tile, *, grid, flops: int, inputs, outputs, interpret: bool) -> Any:
    from jax.experimental.pallas import triton as compiler

    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        compiler_params=compiler.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        # Of the whole square of scores: how much of it is walked, the rows tell.
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=0),
        name=kernel.func.__name__.strip("_"),  # pyright: ignore[reportFunctionMemberAccess]
    )(*arrays)


# The kernels. Scores are in units of log 2, as GPUs have 2**x.


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # else Triton would round to tf32
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _visible(segment_q, position_q, segment_k, position_k) -> jax.Array:
    """[m n] of queries [m] and keys [n]."""
    same = segment_q[:, None] == segment_k[None, :]
    return same & (position_q[:, None] >= position_k[None, :])


def _forward_kernel(
    low, high, segments_q, positions_q, segments_k, positions_k, q, k, v, o, lse, *, tile: Tile, scale: float
):
    mine, at = q[...], (segments_q[...], positions_q[...])

    def step(j, carry):
        total, top, mass = carry
        block = pl.ds(j * tile.keys, tile.keys)
        scores = _dot(mine, k[block, :].T) * (scale * math.log2(math.e))
        scores = jnp.where(_visible(*at, segments_k[block], positions_k[block]), scores, _NEVER)
        new_top = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        part = _dot(weights.astype(v.dtype), v[block, :])
        return total * shrink[:, None] + part, new_top, mass * shrink + weights.sum(1)

    m = tile.queries
    start = jnp.zeros((m, q.shape[-1]), jnp.float32), jnp.full(m, _NEVER, jnp.float32), jnp.zeros(m, jnp.float32)
    total, top, mass = jax.lax.fori_loop(low[...], high[...], step, start)
    seen = top != _NEVER  # False for padding alone; nan stays nan
    mass = jnp.where(seen, mass, 1.0)
    o[...] = jnp.where(seen[:, None], total / mass[:, None], 0.0).astype(o.dtype)
    lse[...] = jnp.where(seen, top + jnp.log2(mass), 0.0)


def _by_query_kernel(
    low,
    high,
    segments_q,
    positions_q,
    segments_k,
    positions_k,
    q,
    k,
    v,
    d_o,
    lse,
    slope,
    dq,
    *,
    tile: Tile,
    scale: float,
):
    mine, d_mine, at = q[...], d_o[...], (segments_q[...], positions_q[...])
    norm, mean = lse[...][:, None], slope[...][:, None]

    def step(j, total):
        block = pl.ds(j * tile.keys, tile.keys)
        theirs = k[block, :]
        scores = _dot(mine, theirs.T) * (scale * math.log2(math.e))
        visible = _visible(*at, segments_k[block], positions_k[block])
        weights = jnp.exp2(jnp.where(visible, scores, _NEVER) - norm)
        d_scores = weights * (_dot(d_mine, v[block, :].T) - mean)
        return total + _dot(d_scores.astype(k.dtype), theirs)

    start = jnp.zeros((tile.queries, q.shape[-1]), jnp.float32)
    dq[...] = (jax.lax.fori_loop(low[...], high[...], step, start) * scale).astype(dq.dtype)


def _by_key_kernel(
    low, high, segments_q, positions_q, segments_k, positions_k, q, k, v, d_o, lse, slope, dk, dv, *, tile: Tile, scale
):
    mine, values, at = k[...], v[...], (segments_k[...], positions_k[...])
    first, blocks = low[...], high[...] - low[...]

    def step(number, carry):
        # All [n m], keys by queries: so nothing but what is read lies transposed.
        d_mine, d_values = carry
        head, block = number // blocks, pl.ds((first + number % blocks) * tile.queries, tile.queries)
        theirs, d_theirs = q[block, head, :], d_o[block, head, :]
        scores = _dot(mine, theirs.T) * (scale * math.log2(math.e))
        visible = _visible(segments_q[block], positions_q[block], *at).T
        weights = jnp.exp2(jnp.where(visible, scores, _NEVER) - lse[head, block][None, :])
        d_values += _dot(weights.astype(d_o.dtype), d_theirs)
        d_scores = weights * (_dot(values, d_theirs.T) - slope[head, block][None, :])
        return d_mine + _dot(d_scores.astype(q.dtype), theirs), d_values

    start = (jnp.zeros((tile.keys, k.shape[-1]), jnp.float32),) * 2
    d_mine, d_values = jax.lax.fori_loop(0, blocks * q.shape[1], step, start)
    dk[...] = (d_mine * scale).astype(dk.dtype)
    dv[...] = d_values.astype(dv.dtype)
