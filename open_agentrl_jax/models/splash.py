"""Attention on TPUs: JAX's splash kernels, with a schedule of blocks that each step computes from its rows.

The kernels skip the blocks of scores that their table of blocks leaves out; segment ids alone skip nothing. JAX makes
the table ahead of time from a static mask, which for packed rows can only be the causal one. Here each step computes
it, so that a row of short sequences costs as much as the short sequences, without recompilation.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from open_agentrl_jax.models.blocks import Where, bounds, needed
from open_agentrl_jax.types import UserError

LANES = 128  # of a TPU's vector registers: blocks are multiples of it
# Larger blocks have fewer grid steps and waste more at the ends of sequences; from 2,560 on they do not fit into the
# vector memory.
_LARGEST = 768


def block_size(t: int) -> int | None:
    """Tokens per block if a device holds t tokens of a row: the largest multiple of 128 that divides t, or None."""
    return max((n for n in range(LANES, min(t, _LARGEST) + 1, LANES) if t % n == 0), default=None)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Where, keys: Where, *, interpret: bool = False
) -> jax.Array:
    """A backend of models/attention.py for rows as packing makes them: segments contiguous, positions in order.

    Queries may be a part of the row (over the mesh axis seq), keys are whole rows. q is scaled in its own dtype.
    """
    block = block_size(q.shape[1])
    assert block is not None, "pick() gives rows of other lengths to another backend"
    start = jax.lax.axis_index("seq") * q.shape[1] if q.shape[1] != k.shape[1] else 0
    row = functools.partial(_row, start=start, block=block, interpret=interpret)
    rows = (q, k, v, queries, keys)
    if q.shape[0] == 1:
        return row(*jax.tree.map(lambda x: x[0], rows))[None]
    return jax.lax.map(lambda x: row(*x), rows)


def _row(q: jax.Array, k: jax.Array, v: jax.Array, queries: Where, keys: Where, *, start, block: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    pairs = _pairs(queries, keys, start, block)
    forward = _schedule(pairs, following=True)
    backward = tuple(x.swapaxes(-1, -2) for x in _schedule(pairs.T, following=False))
    places = start + jnp.arange(q.shape[0], dtype=jnp.int32)
    by_query, by_key = (MaskInfo(block_of, None, runs, None, places) for block_of, runs in (forward, backward))
    sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block)
    # The fused backward kernel would hold one dq [h t D] a block of keys, 8 GB for a row of 23,040 tokens.
    attend = kernels.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=kernels.BlockSizes(**sizes, block_kv_compute=block, block_kv_dkv_compute=block),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="attention",
        mask_function=_causal,
        interpret=interpret,
    )
    q = (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    o = jnp.asarray(attend(q, k, v, kernels.SegmentIds(queries.segments, keys.segments)))
    return jnp.where((queries.segments != 0)[:, None, None], o.swapaxes(0, 1), 0)


def _pairs(queries: Where, keys: Where, start, block: int) -> jax.Array:
    """The pairs of blocks to compute, [nq nk]; includes the diagonal, because a row of scores must not be empty."""
    queries, keys = (
        Where(jnp.where(at.segments == 0, hidden, at.segments), at.positions)
        for at, hidden in ((queries, -1), (keys, -2))
    )
    pairs = needed(*jax.tree.map(lambda x: x.reshape(1, -1, 1, block), (queries, keys)))[0]
    own = start // block + jnp.arange(pairs.shape[0])
    return pairs | (own[:, None] == jnp.arange(pairs.shape[1]))


def _schedule(pairs: jax.Array, *, following: bool) -> tuple[jax.Array, jax.Array]:
    """For each row of `pairs` [n m], the blocks to run, moved to the front, and whether each step runs: both [1 n m].

    A step that runs nothing names the block to prefetch: the first one of the next row if `following`, else of the same
    row (for the next head).
    """
    low, high = bounds(pairs)
    block = low[:, None] + jnp.arange(pairs.shape[1])
    runs = block < high[:, None]
    block = jnp.where(runs, block, (jnp.roll(low, -1) if following else low)[:, None])
    return block.astype(jnp.int32)[None], runs.astype(jnp.int32)[None]


def _causal(query: jax.Array, key: jax.Array) -> jax.Array:
    return query >= key


def static_splash(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Where, keys: Where, *, interpret: bool = False
) -> jax.Array:
    """As `splash`, but with JAX's own static causal mask instead of a schedule made on the device.

    Computes every block below the diagonal, whatever the segments. Use it if the schedules fail on a real TPU.

    Raises:
      UserError: the queries are a part of the row: the static mask needs whole rows.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block, (_, t, h, D) = block_size(q.shape[1]), q.shape
    if block is None or t != k.shape[1]:
        raise UserError(
            f"model.attention=splash_static: rows of {t} of {k.shape[1]} tokens; it needs whole rows of a multiple of "
            f"{LANES} tokens: choose packing.length so, and mesh.seq so that it divides the key-value heads"
        )
    sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block)
    attend = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((t, t))] * h),
        block_sizes=kernels.BlockSizes(**sizes, block_kv_compute=block, block_kv_dkv_compute=block),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    q = (q.astype(jnp.float32) / math.sqrt(D)).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))

    def row(q: jax.Array, k: jax.Array, v: jax.Array, at: jax.Array) -> jax.Array:
        o = jnp.asarray(attend(q, k, v, kernels.SegmentIds(at, at)))
        return jnp.where((at != 0)[:, None, None], o.swapaxes(0, 1), 0)

    return jax.lax.map(lambda x: row(*x), (q, k, v, queries.segments))
