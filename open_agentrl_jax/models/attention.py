"""One attention function; the only place that picks a backend.

A backend computes for the queries of one device against all keys of their rows: (q [b t h D], k [b s k D], v [b s k D],
where the queries are [b t], where the keys are [b s]) -> o [b t h D].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from open_agentrl_jax.models.blocks import Where, bounds, needed
from open_agentrl_jax.models.cudnn import cudnn
from open_agentrl_jax.models.splash import block_size, splash, static_splash
from open_agentrl_jax.models.triton import triton
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.parallel.mesh import current_mesh
from open_agentrl_jax.types import UserError

_NEVER = -1e30  # a score no softmax sees; finite, so that a row without any visible key gives no NaN

# Tokens in a block. A block's scores [k g*256 512] in float32 stay in a core's cache; smaller ones cost loop overhead.
_BLOCK_Q, _BLOCK_KV = 256, 256


# Compute capabilities of A100, H100 and H200, B200, B300. Others have 64 to 99 KiB.
_ROOMY = ("8.0", "9.0", "10.0", "10.3")

Backend = Callable[[jax.Array, jax.Array, jax.Array, Where, Where], jax.Array]


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, positions: jax.Array, *, backend: str = "auto"
) -> jax.Array:
    """Causal attention within each segment of packed rows.

    A token sees the tokens of its own segment whose position is not greater than its own; segment 0 is padding, whose
    output is zero. Rows are as packing makes them, segments contiguous and in order; "plain", "blockwise" and "triton"
    are right for any other order too.

    On a mesh each device computes its own rows and heads. Over `seq` a part of the places is exchanged for a part of
    the heads (Jacobs et al., arXiv 2309.14509): all devices then have whole rows, and the same work. Where `seq` does
    not divide the heads of the keys, the keys of a row are gathered instead.

    Args:
      q: [b t h D].
      k: [b t k D], h a multiple of k; query head i reads head i // (h / k).
      v: [b t k D].
      segment_ids: [b t], not negative.
      positions: [b t].
      backend: a name in BACKENDS, or "auto".

    Returns:
      [b t h D] in q's dtype; scores and softmax are in float32.
    """
    mesh, where = current_mesh(), Where(jnp.asarray(segment_ids), jnp.asarray(positions))
    parts = row_parts(k.shape[2], mesh)
    compute = BACKENDS[pick(q.shape[1] // parts, q.shape[3], q.dtype) if backend == "auto" else backend]
    if mesh is None:
        return compute(q, k, v, where, where)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, queries: Where) -> jax.Array:
        if mesh.shape["seq"] == 1:
            return compute(q, k, v, queries, queries)
        keys = jax.tree.map(_whole_rows, queries)
        if parts > 1:
            return compute(q, _whole_rows(k), _whole_rows(v), queries, keys)
        q, k, v = (_exchange(x, split=2, join=1) for x in (q, k, v))
        return _exchange(compute(q, k, v, keys, keys), split=1, join=2)

    heads, tokens = sharding.HEADS, sharding.TOKENS
    # check_vma is off: loops of the backends start from constants, which do not vary over the mesh.
    mapped = jax.shard_map(local, in_specs=(heads, heads, heads, tokens), out_specs=heads, check_vma=False)
    return mapped(q, k, v, where)


def row_parts(kv_heads: int, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None) -> int:
    """Into how many parts the queries of a row are cut while attention is computed; 1 where heads can be exchanged."""
    if mesh is None or kv_heads // mesh.shape["tensor"] % mesh.shape["seq"] == 0:
        return 1
    return mesh.shape["seq"]


def _exchange(x: jax.Array, *, split: int, join: int) -> jax.Array:
    """[b t/seq h D] -> [b t h/seq D] with split=2, join=1; back the other way round."""
    return jax.lax.all_to_all(x, "seq", split, join, tiled=True)


def _whole_rows(x: jax.Array) -> jax.Array:
    """[b t/seq ...] -> [b t ...]. Gathered into a leading axis of its own: what is gathered along another one, TPU
    compilers sum by an all-reduce on the way back."""
    x = jnp.moveaxis(jax.lax.all_gather(x, "seq"), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def pick(t: int, head_dim: int, dtype: jnp.dtype) -> str:
    """The backend for rows of which a device holds t tokens."""
    if platform() == "tpu" and block_size(t):
        return "splash"
    if platform() == "gpu" and head_dim <= 128 and dtype.itemsize == 2 and roomy():
        return "triton"
    return "blockwise"


def why_slow(t: int, head_dim: int, dtype: jnp.dtype) -> str:
    """Why `pick` takes "blockwise" on an accelerator, with the field to change; "" where it takes a kernel."""
    if platform() == "cpu" or pick(t, head_dim, dtype) != "blockwise":
        return ""
    if platform() == "tpu":
        return f"a device holds {t} tokens of a row, which 128 does not divide; change packing.length"
    if dtype.itemsize > 2:
        return f"model.compute_dtype is {dtype}; use bfloat16"
    if head_dim > 128:
        return f"head_dim is {head_dim}, the GPU kernels take at most 128"
    return f"{jax.devices()[0].device_kind} has less than 130 KiB of shared memory per multiprocessor"


def platform() -> str:
    """What is compiled for: "tpu", "gpu" or "cpu"; that of the mesh, which may be a machine that is not here."""
    mesh = current_mesh()
    device = None if mesh is None else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def roomy() -> bool:
    """Whether the GPU has the shared memory that the tiles of the Triton kernels take, 130 KiB of a multiprocessor."""
    if jax.default_backend() != "gpu":
        return True  # one that is not here: open_agentrl_jax/planning/topologies.py has none but such
    return jax.devices()[0].compute_capability in _ROOMY


def ampere() -> bool:
    """Whether the GPU has bfloat16 products, compute capability 8.0 or more."""
    if jax.default_backend() != "gpu":
        return True  # one that is not here, see `roomy`
    return float(jax.devices()[0].compute_capability) >= 8.0


def plain(q: jax.Array, k: jax.Array, v: jax.Array, queries: Where, keys: Where) -> jax.Array:
    """The formula as it is written, [t, s] scores and all: the reference of the tests."""
    b, t, h, D = q.shape
    grouped = q.reshape(b, t, k.shape[2], h // k.shape[2], D)
    scores = jnp.einsum("btkgD,bskD->bkgts", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(D)
    visible = queries.segments[:, :, None] == keys.segments[:, None, :]
    visible &= queries.positions[:, :, None] >= keys.positions[:, None, :]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, _NEVER), axis=-1)
    weights = jnp.where(queries.segments[:, None, None, :, None] != 0, weights, 0)
    mixed = jnp.einsum("bkgts,bskD->btkgD", weights.astype(v.dtype), v).reshape(b, t, h, D)
    return checkpoint_name(mixed, "attention")


def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, queries: Where, keys: Where) -> jax.Array:
    """Online softmax over blocks of keys; blocks that no query of the block sees are skipped, wherever they are.

    Rows are cut into blocks and short rows are put together, so that one step of the loops is one cell: r rows x one
    block of queries x one block of keys. Nothing of the size [t, s] is ever held; the backward pass computes the scores
    again from the saved log-sum-exp (Dao et al., arXiv 2205.14135).
    """
    b, t, h, D = q.shape
    s, K = k.shape[1:3]
    nq, nk = -(-t // _BLOCK_Q), -(-s // _BLOCK_KV)
    bq, bk = -(-t // nq), -(-s // nk)
    r = max(n for n in range(1, b + 1) if b % n == 0 and (n == 1 or n * bq <= _BLOCK_Q))
    cut = functools.partial(_cut, rows=r)
    # Padding, real or added, is segment -1 as a query and -2 as a key: nothing sees it, it sees nothing.
    at_q = Where(cut(_pad(queries.segments, nq * bq), bq), cut(_pad(queries.positions, nq * bq), bq))
    at_k = Where(cut(_pad(keys.segments, nk * bk), bk), cut(_pad(keys.positions, nk * bk), bk))
    at_q = at_q._replace(segments=jnp.where(at_q.segments == 0, -1, at_q.segments))
    at_k = at_k._replace(segments=jnp.where(at_k.segments == 0, -2, at_k.segments))

    # [b t h D] -> [b/r nq r*k g*bq D] and [b s k D] -> [b/r nk r*k bk D]
    blocks = cut(_pad(q, nq * bq), bq).reshape(b // r, nq, r, bq, K, h // K, D)
    blocks = blocks.transpose(0, 1, 2, 4, 5, 3, 6).reshape(b // r, nq, r * K, -1, D)
    at_q = jax.tree.map(lambda x: jnp.tile(x, h // K), at_q)
    k, v = (cut(_pad(x, nk * bk), bk).swapaxes(3, 4).reshape(b // r, nk, r * K, bk, D) for x in (k, v))
    o = _blocks(blocks, k, v, at_q, at_k, bounds(needed(at_q, at_k)))
    o = o.reshape(b // r, nq, r, K, h // K, bq, D).transpose(0, 2, 1, 5, 3, 4, 6)
    return o.reshape(b, nq * bq, h, D)[:, :t]


def on_tpu(q: jax.Array, k: jax.Array, v: jax.Array, queries: Where, keys: Where) -> jax.Array:
    """Splash kernels; elsewhere than on a TPU they are interpreted, which is slow and for tests."""
    return splash(q, k, v, queries, keys, interpret=platform() != "tpu")


def on_tpu_static(q: jax.Array, k: jax.Array, v: jax.Array, queries: Where, keys: Where) -> jax.Array:
    """Splash kernels with a static causal mask; interpreted elsewhere than on a TPU, for tests."""
    return static_splash(q, k, v, queries, keys, interpret=platform() != "tpu")


def on_gpu(q: jax.Array, k: jax.Array, v: jax.Array, queries: Where, keys: Where) -> jax.Array:
    """Triton kernels; elsewhere than on a GPU they are interpreted, which is slow and for tests."""
    return triton(q, k, v, queries, keys, interpret=platform() != "gpu")


def by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, queries: Where, keys: Where) -> jax.Array:
    """cuDNN for what it takes, the Triton kernels for parts of rows and for rows of very many segments."""
    if platform() != "gpu":
        raise UserError("model.attention=cudnn: runs on NVIDIA GPUs alone; use auto")
    if q.dtype.itemsize > 2:
        raise UserError("model.attention=cudnn: computes in bfloat16; set model.compute_dtype=bfloat16 or use auto")
    if q.shape[1] != k.shape[1]:
        return on_gpu(q, k, v, queries, keys)
    return cudnn(q, k, v, queries, keys, otherwise=on_gpu)


BACKENDS: dict[str, Backend] = {
    "plain": plain,
    "blockwise": blockwise,
    "splash": on_tpu,
    "splash_static": on_tpu_static,
    "triton": on_gpu,
    "cudnn": by_cudnn,
}


def _pad(x: jax.Array, length: int) -> jax.Array:
    missing = length - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _cut(x: jax.Array, block: int, *, rows: int) -> jax.Array:
    """[b t ...] -> [b/rows t/block rows block ...]"""
    b, t = x.shape[:2]
    return x.reshape(b // rows, rows, t // block, block, *x.shape[2:]).swapaxes(1, 2)


def _visible(at_q: Where, at_k: Where) -> jax.Array:
    """Which keys are to be seen, [r bq bk]."""
    same = at_q.segments[:, :, None] == at_k.segments[:, None, :]
    return same & (at_q.positions[:, :, None] >= at_k.positions[:, None, :])


@jax.custom_vjp
def _blocks(q, k, v, at_q: Where, at_k: Where, bounds) -> jax.Array:
    return _forward(q, k, v, at_q, at_k, bounds)[0]


def _forward(q, k, v, at_q: Where, at_k: Where, bounds):
    groups, nq, z, m, D = q.shape
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def cell(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        g, i = number // nq, number % nq
        mine, at = q[g, i], jax.tree.map(lambda x: x[g, i], at_q)

        def step(j, carry):
            total, top, mass = carry
            visible = _visible(at, jax.tree.map(lambda x: x[g, j], at_k))[:, None]
            scores = dot("zmD,znD->zmn", mine, k[g, j]) / math.sqrt(D)
            apart = scores.reshape(visible.shape[0], -1, *visible.shape[2:])
            scores = jnp.where(visible, apart, _NEVER).reshape(scores.shape)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            part = dot("zmn,znD->zmD", weights.astype(v.dtype), v[g, j])
            return total * shrink[..., None] + part, new_top, mass * shrink + weights.sum(-1)

        start = jnp.zeros((z, m, D)), jnp.full((z, m), _NEVER), jnp.zeros((z, m))
        total, top, mass = jax.lax.fori_loop(bounds[0][g, i], bounds[1][g, i], step, start)
        seen = top > _NEVER / 2  # False for padding alone
        out = jnp.where(seen[..., None], total / jnp.where(seen, mass, 1)[..., None], 0).astype(q.dtype)
        return out, jnp.where(seen, top + jnp.log(mass), 0)

    out, lse = jax.lax.map(cell, jnp.arange(groups * nq))
    out = checkpoint_name(out.reshape(q.shape), "attention")
    lse = checkpoint_name(lse.reshape(q.shape[:-1]), "attention")
    return out, (q, k, v, at_q, at_k, bounds, out, lse)


def _backward(saved, d_out: jax.Array):
    q, k, v, at_q, at_k, bounds, out, lse = saved
    groups, nq, z, m, D = q.shape
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    slope = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)

    def cell(number: jax.Array, carry):
        dq, dk, dv = carry
        g, i = number // nq, number % nq
        mine, d_mine, at = q[g, i], d_out[g, i], jax.tree.map(lambda x: x[g, i], at_q)

        def step(j, carry):
            # All [n m], keys by queries: so no large operand of the products below lies transposed.
            d_query, dk, dv = carry
            visible = _visible(at, jax.tree.map(lambda x: x[g, j], at_k)).swapaxes(1, 2)[:, None]
            scores = dot("znD,zmD->znm", k[g, j], mine) / math.sqrt(D)
            apart = scores.reshape(visible.shape[0], -1, *visible.shape[2:])
            scores = jnp.where(visible, apart, _NEVER).reshape(scores.shape)
            weights = jnp.exp(scores - lse[g, i][:, None])
            dv = dv.at[g, j].add(dot("znm,zmD->znD", weights.astype(v.dtype), d_mine))
            d_scores = weights * (dot("znD,zmD->znm", v[g, j], d_mine) - slope[g, i][:, None]) / math.sqrt(D)
            d_scores = d_scores.astype(q.dtype)
            dk = dk.at[g, j].add(dot("znm,zmD->znD", d_scores, mine))
            return d_query + dot("znD,znm->zDm", k[g, j], d_scores), dk, dv

        start = jnp.zeros((z, D, m)), dk, dv
        d_query, dk, dv = jax.lax.fori_loop(bounds[0][g, i], bounds[1][g, i], step, start)
        return dq.at[g, i].set(d_query.swapaxes(1, 2).astype(q.dtype)), dk, dv

    # Sums over many blocks are kept in float32 whatever the dtype of k and v.
    start = jnp.zeros_like(q), jnp.zeros(k.shape), jnp.zeros(v.shape)
    dq, dk, dv = jax.lax.fori_loop(0, groups * nq, cell, start)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_blocks.defvjp(_forward, _backward)
