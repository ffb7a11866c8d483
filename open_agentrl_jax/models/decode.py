"""Generation: the cached forward pass, sampling, several decode steps in one dispatch.

What a row computes depends on nothing but the parameters, its own slot and its own arguments: rows never mix, each is
reduced in an order that its own positions decide, and a block of the cache that a row does not see adds exactly
nothing. So tokens and log-probs do not change a bit with the slot, with the other rows, or with when they came.

On a mesh (`jax.set_mesh`) all devices have all rows; parameters lie as the trainer's, slots as models/kv.py says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from open_agentrl_jax.models.attention import ampere, platform
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.flash_decode import flash_decode
from open_agentrl_jax.models.kv import Cache, by_owner, each_row, turned, write
from open_agentrl_jax.models.linear import APART, GENERATION, Way, at_rest
from open_agentrl_jax.models.params import SCALE
from open_agentrl_jax.models.qwen import Params, run_layers
from open_agentrl_jax.parallel.mesh import current_mesh
from open_agentrl_jax.parallel.sharding import P

STOPS = 8  # stop ids a row may have

Array = jax.Array | np.ndarray  # on the device, and what the host makes of it

_NEVER = -1e30  # a score no softmax sees; finite, so that no difference of two is NaN


class Rows(NamedTuple):
    """What the running requests need, one row each; a row with slot >= s or left 0 does nothing."""

    slot: Array  # [a] int32
    token: Array  # [a] int32, the last token, whose keys and values are not in the cache yet
    position: Array  # [a] int32, of `token`; the cache holds the positions before it
    left: Array  # [a] int32, how many tokens may still be sampled
    stop: Array  # [a STOPS] int32, filled up with -1
    key: Array  # [a 2] uint32, the seed
    temperature: Array  # [a] float32
    top_p: Array  # [a] float32
    top_k: Array  # [a] int32


class Sampled(NamedTuple):
    """Up to n new tokens a row; row a has the first count[a]."""

    tokens: Array  # [n a] int32
    logprobs: Array  # [n a] float32
    count: Array  # [a] int32
    left: Array  # [a] int32, 0 where the row has finished
    steps: Array  # [] int32, how many steps were computed


def extend(
    params: Params,
    model_config: ModelConfig,
    cache: Cache,
    tokens: jax.Array,
    slots: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    *,
    aligned: bool = False,
) -> tuple[jax.Array, Cache]:
    """The forward pass of tokens that follow what their slots hold.

    Args:
      params: as models.qwen has them, or `qwen.apart`; matrices may be in 8 bits, see models/int8.py.
      model_config: the model.
      cache: filled before `starts`.
      tokens: [p c].
      slots: [p]; one out of range writes nothing.
      starts: [p], the position of each row's first token.
      counts: [p], how many tokens of the row are real; the others write nothing.
      aligned: on a mesh, row i is of slot i, or it does nothing.

    Returns:
      hidden [p c d] after the final norm, and the cache with the new keys and values.
    """
    c, block = tokens.shape[1], cache.k.shape[-1]
    offsets = jnp.arange(c)
    positions = starts[:, None] + offsets
    alive = (slots < cache.k.shape[2]) & (counts > 0)
    seen = jnp.where(alive, starts, 0)
    blocks = (jnp.max(seen) + block - 1) // block

    of_values = "pkcgb,pkDb->pkcgD" if turned() else "pkcgb,pkbD->pkcgD"

    def mix(q, k, v, cache: Cache, slots, starts, layer, blocks) -> jax.Array:
        p, _, heads, size = k.shape
        if c == 1 and _kernel_serves(size, q.dtype):
            return flash_decode(q[:, 0], k[:, 0], v[:, 0], *cache, slots, starts, layer)[:, None]
        own = jnp.broadcast_to(jnp.arange(c)[:, None] >= jnp.arange(c), (p, c, c))
        q = q.reshape(p, c, heads, -1, size).swapaxes(1, 2)  # [p k c g D]
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [p k c D]

        def see(state: tuple[jax.Array, ...] | None, k: jax.Array, v: jax.Array, visible: jax.Array):
            """Online softmax over the keys k [p k D b] that `visible` [p c b] lets each query see."""
            scores = jnp.einsum("pkcgD,pkDb->pkcgb", q, k, preferred_element_type=jnp.float32)
            scores = jnp.where(visible[:, None, :, None], scores * size**-0.5, _NEVER)
            top = scores.max(-1) if state is None else jnp.maximum(state[0], scores.max(-1))
            weights = jnp.exp(scores - top[..., None])  # exactly 0 off the mask: a query sees at least itself
            total = weights.sum(-1)
            mixed = jnp.einsum(of_values, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            if state is not None:
                kept = jnp.exp(state[0] - top)
                total, mixed = state[1] * kept + total, state[2] * kept[..., None] + mixed
            return top, total, mixed

        def read(of: jax.Array, i: jax.Array) -> jax.Array:
            sizes = (1, 1, 1, *of.shape[3:])
            return jax.vmap(lambda s: jax.lax.dynamic_slice(of, (layer, i, s, 0, 0, 0), sizes)[0, 0, 0])(slots)

        def body(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            visible = i * block + jnp.arange(block) < starts[:, None, None]
            return see(state, read(cache.k, i), read(cache.v, i), jnp.broadcast_to(visible, (p, c, block)))

        first = see(None, k.swapaxes(2, 3), v.swapaxes(2, 3) if turned() else v, own)
        _, total, mixed = jax.lax.fori_loop(0, blocks, body, first)
        mixed = (mixed / total[..., None]).astype(q.dtype)
        return mixed.swapaxes(1, 2).reshape(p, c, -1, size)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> tuple[jax.Array, Cache]:
        return by_owner(mix, aligned=aligned)(q, k, v, cache, slots, seen, layer, blocks), Cache(k, v)

    layers = jnp.arange(model_config.num_layers)
    way = _way(params)
    hidden, new, _ = run_layers(params, model_config, tokens, positions, attend, layers, way=way)
    if way is APART:
        # Changes no finite number. But unless what is written depends on the last layer's output, XLA does not know
        # that this layer reads the cache before the write, and copies all of it at each step.
        real = jnp.isfinite(hidden).all(-1)[..., None, None]
        new = jax.tree.map(lambda x: jnp.where(real, x, jnp.nan), new)
    at = jnp.where(offsets < counts[:, None], positions // block, cache.k.shape[1])  # out of range is dropped
    return hidden, write(cache, new, slots, at, positions % block)


@functools.partial(jax.jit, static_argnames="model_config", donate_argnames="cache")
def prefill(
    params: Params,
    model_config: ModelConfig,
    cache: Cache,
    tokens: jax.Array,
    slots: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
) -> Cache:
    """`extend` for the cache alone."""
    return extend(params, model_config, cache, tokens, slots, starts, counts)[1]


@functools.partial(jax.jit, static_argnames=("model_config", "steps"), donate_argnames="cache")
def decode(params: Params, model_config: ModelConfig, cache: Cache, rows: Rows, steps: int) -> tuple[Cache, Sampled]:
    """Sample up to `steps` tokens in every row; ends early when all rows have finished.

    On a mesh there are as many rows as slots, row i for slot i.
    """
    slots, a = cache.k.shape[2], rows.slot.shape[0]

    def unfinished(state) -> jax.Array:
        return (state[0] < steps) & jnp.any(state[2].left > 0)

    def step(state):
        i, cache, rows, tokens, logprobs, count = state
        alive = rows.left > 0
        at = rows.slot, rows.position, alive.astype(jnp.int32)
        hidden, cache = extend(params, model_config, cache, rows.token[:, None], *at, aligned=True)
        # The head gets as many rows as there are slots: the last bit of some matrix products depends on their number.
        # The barriers keep XLA from cutting the padding off again.
        hidden = jax.lax.optimization_barrier(jnp.pad(hidden, ((0, slots - a), (0, 0), (0, 0))))
        scores = jax.lax.optimization_barrier(_scores(params, model_config, hidden))
        token, logprob = each_row(sample)(scores[:a, 0], rows)
        stopped = jnp.any(token[:, None] == rows.stop, axis=-1)
        rows = rows._replace(
            token=jnp.where(alive, token, rows.token),
            position=rows.position + alive,
            left=jnp.where(stopped, 0, rows.left - alive),
        )
        return i + 1, cache, rows, tokens.at[i].set(token), logprobs.at[i].set(logprob), count + alive

    rows = rows._replace(left=jnp.where(rows.slot < slots, rows.left, 0))
    start = (
        jnp.int32(0),
        cache,
        rows,
        jnp.zeros((steps, a), jnp.int32),
        jnp.zeros((steps, a), jnp.float32),
        jnp.zeros(a, jnp.int32),
    )
    i, cache, rows, tokens, logprobs, count = jax.lax.while_loop(unfinished, step, start)
    return cache, Sampled(tokens, logprobs, count, rows.left, i)


def _kernel_serves(head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether models/flash_decode.py takes it: 16 bits, on NVIDIA GPUs from an A100 on."""
    return platform() == "gpu" and dtype.itemsize == 2 and ampere() and head_dim in (16, 32, 64, 128, 256)


def _way(params: Params) -> Way:
    return APART if isinstance(params["layers"], tuple) else GENERATION


def _scores(params: Params, model_config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Float32 logits [b t v] of hidden states [b t d], split over the devices as the head is."""
    name = "embed" if model_config.tie_word_embeddings else "head"
    scores = at_rest(hidden, params[name].T if model_config.tie_word_embeddings else params[name], jnp.float32)
    if (scale := params.get(name + SCALE)) is None:
        return scores
    return scores * (scale if current_mesh() is None else jax.reshard(scale, P(jax.typeof(scores).sharding.spec[2])))


def sample(scores: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Draw one token a row, from a uniform number that the row's seed and the new token's position decide.

    Args:
      scores: [a v] float32 logits.
      rows: how to sample.

    Returns:
      tokens [a] and their log-probs [a], those of the distribution that was sampled from: after temperature, top-k and
      top-p, in this order, renormalised. Temperature 0 takes the argmax and reports its log-prob at temperature 1.
    """
    a, v = scores.shape
    random = rows.temperature > 0
    scores = scores / jnp.where(random, rows.temperature, 1)[:, None]
    cut = random & ((rows.top_p < 1) | (rows.top_k > 0)) & (rows.left > 0)
    top_k, top_p = jnp.where(cut, rows.top_k, 0), jnp.where(cut, rows.top_p, 1)
    # A branch, not a variant: it is paid for only where some row wants it, and the bits of the others stay.
    scores = jax.lax.cond(jnp.any(cut), lambda: truncate(scores, top_k, top_p), lambda: scores)
    top = scores.max(axis=-1, keepdims=True)
    # The inverse of the cumulative distribution: first the block of about sqrt(v) tokens, then the token in it.
    size = 1 << (v.bit_length() + 1) // 2
    weights = jnp.pad(jnp.exp(scores - top), ((0, 0), (0, -v % size))).reshape(a, -1, size)
    mass = weights.sum(axis=-1)
    total = mass.sum(axis=-1)
    block, rest = _pick(mass, jax.vmap(_uniform)(*map(jnp.asarray, (rows.key, rows.position + 1))) * total)
    within, _ = _pick(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], rest)
    best = jnp.min(jnp.where(scores == top, jnp.arange(v), v - 1), axis=-1)  # argmax is a slow scalar loop on CPU
    token = jnp.where(random, block * size + within, best).astype(jnp.int32)
    return token, (jnp.take_along_axis(scores, token[:, None], axis=-1) - top)[:, 0] - jnp.log(total)


def _uniform(key: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position))


def _pick(weights: jax.Array, mark: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first of weights [a n] whose cumulative sum exceeds mark [a], none of weight 0; and what is left of mark."""
    sums, n = jnp.cumsum(weights, axis=-1), weights.shape[1]
    first = jnp.min(jnp.where((sums > mark[:, None]) & (weights > 0), jnp.arange(n), n), axis=-1)
    last = jnp.max(jnp.where(weights > 0, jnp.arange(n), 0), axis=-1)  # where rounding put the mark beyond the end
    place = jnp.minimum(first, last)
    return place, mark - jnp.take_along_axis(sums - weights, place[:, None], axis=-1)[:, 0]


def truncate(scores: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Scores [a v] with -inf outside the `top_k` best (0: all), then outside the smallest set whose mass is `top_p`.

    Its mass, that is, among those best, reaches `top_p`. Scores that equal the last one kept are kept too. The last one
    is found by bisection, in 32 passes over the scores: ten times faster than a sort on CPU.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)  # whole numbers in the order of the scores

    def kept_from(wanted: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The largest limit [a] with enough(order >= limit) where `wanted` [a], else one that keeps all."""

        def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low & high) + ((low ^ high) >> 1)
            ok = enough(order >= middle[:, None])
            return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

        least = jnp.full(scores.shape[0], jnp.iinfo(jnp.int32).min)
        bounds = least, order.max(axis=-1) + 1
        low, _ = jax.lax.fori_loop(0, jnp.where(jnp.any(wanted), 32, 0), halve, bounds)
        return jnp.where(wanted, low, least)[:, None]

    kept = order >= kept_from(top_k > 0, lambda kept: kept.sum(axis=-1) >= top_k)
    weights = jnp.where(kept, jnp.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    goal = top_p * weights.sum(axis=-1)
    kept &= order >= kept_from(top_p < 1, lambda kept: jnp.where(kept, weights, 0).sum(axis=-1) >= goal)
    return jnp.where(kept, scores, -jnp.inf)
