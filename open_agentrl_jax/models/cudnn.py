"""Attention on NVIDIA GPUs with cuDNN: each segment of a packed row is a sequence (cuDNN's "packed layout").

Lengths and offsets of the segments are data; their maximum number per row is a shape, and the log-sum-exp has the shape
[b*SEGMENTS h t]. Rows with more segments take another backend in the same compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from open_agentrl_jax.models.blocks import Where
from open_agentrl_jax.types import UserError

# A row of 23,040 tokens of agentic lengths (mean 4k) has 6 segments on average. The log-sum-exp of 32 segments, 32
# heads and 23,040 tokens takes 94 MB.
SEGMENTS = 32


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Where, keys: Where, *, otherwise: Callable[..., jax.Array]
) -> jax.Array:
    """A backend of models/attention.py for whole rows as packing makes them: segments contiguous, positions in order.

    Needs float16 or bfloat16 and compute capability 9.0 (cuDNN's conditions).

    Args:
      q: [b t h D], D a multiple of 8.
      k: [b t k D].
      v: [b t k D].
      queries: positions of the tokens.
      keys: equal to `queries`: this backend is called with whole rows only.
      otherwise: the backend for rows with more than SEGMENTS segments.
    """
    fits = queries.segments.max() <= SEGMENTS
    return jax.lax.cond(
        fits, _by_cudnn, lambda q, k, v, _: otherwise(q, k, v, queries, keys), q, k, v, queries.segments
    )


def _by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    from jax._src.cudnn import fused_attention_stablehlo as library  # jax.nn's function does not pass the segments

    real = (segments != 0)[:, :, None, None]
    # cuDNN neither reads nor writes positions outside all segments: their values must not reach output or gradients.
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    lengths, starts = layout(segments)
    try:
        o = library.dot_product_attention(
            q,
            k,
            v,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=starts,
            kv_offsets=starts,
            scale=1 / math.sqrt(q.shape[-1]),
            mask_type=library.MaskType.PADDING_CAUSAL,
        )
    except (NotImplementedError, RuntimeError) as error:  # another GPU, none, no cuDNN, an unsupported head_dim
        raise UserError(f"model.attention=cudnn: {' '.join(str(error).split())}; use auto") from error
    return checkpoint_name(jnp.where(real, jnp.asarray(o), 0), "attention")


def layout(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens [b SEGMENTS] and first position [b SEGMENTS+1] of each segment of rows [b t]; -1 for absent segments."""
    each = segments[:, None, :] == jnp.arange(1, SEGMENTS + 1)[:, None]
    lengths = each.sum(-1, dtype=jnp.int32)
    starts = jnp.argmax(each, axis=-1).astype(jnp.int32)
    lengths, starts = (jnp.where(lengths > 0, x, -1) for x in (lengths, starts))
    return lengths, jnp.pad(starts, [(0, 0), (0, 1)], constant_values=-1)
