"""The backends for NVIDIA GPUs, as far as a machine without one can tell: kernels interpreted, arguments emulated."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.models import attention as module
from open_agentrl_jax.models import cudnn, triton
from open_agentrl_jax.models.blocks import Where
from open_agentrl_jax.models.config import ATTENTION
from open_agentrl_jax.types import UserError

from .rows import packed

# Small, and not square, so that short rows have many blocks of both kinds.
TILES = triton.Tiles(triton.Tile(16, 32, 4, 2), triton.Tile(32, 16, 4, 2), triton.Tile(16, 32, 4, 2))
small = functools.partial(triton.triton, tiles=TILES, interpret=True)


def _values(compute, q, k, v, weight):
    """Output and gradients of `compute`, jitted."""

    def total(q, k, v):
        o = compute(q, k, v)
        return (o * weight).astype(jnp.float32).sum(), o

    (_, o), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return o, *gradients


def _at(compute, queries, keys=None):
    return lambda q, k, v: compute(q, k, v, queries, queries if keys is None else keys)


def _arrays(rng, b, t, h, k, D, dtype=jnp.float32):
    return [jnp.asarray(rng.standard_normal((b, t, n, D)), dtype) for n in (h, k, k, h)]


def _same(compute, reference, arrays, atol):
    for a, b in zip(_values(compute, *arrays), _values(reference, *arrays), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=atol)


@pytest.mark.parametrize(("t", "h", "k", "D", "shuffled"), [(70, 6, 2, 8, False), (100, 7, 1, 16, True)])
def test_triton_is_the_plain_formula(t, h, k, D, shuffled):
    rng = np.random.default_rng(t)
    _, positions, segments = packed(rng, 2, t, 40, fill=0.8)
    segments[1, 60:] = 0
    if shuffled:
        order = rng.permutation(t)
        positions, segments = positions[:, order], segments[:, order]
    where = Where(jnp.asarray(segments), jnp.asarray(positions))
    arrays = _arrays(rng, 2, t, h, k, D)
    _same(_at(small, where), _at(module.plain, where), arrays, 5e-6)


def test_triton_at_its_real_tiles_and_through_the_table():
    rng = np.random.default_rng(0)
    _, positions, segments = packed(rng, 1, 300, 200)
    where = Where(jnp.asarray(segments), jnp.asarray(positions))
    arrays = _arrays(rng, 1, 300, 2, 1, 128, jnp.bfloat16)

    def run(q, k, v):
        return module.attention(q, k, v, *where, backend="triton")

    _same(run, _at(module.plain, where), arrays, 0.06)


def test_triton_of_a_part_of_the_row():
    # What a device of the mesh axis seq computes: its queries against the keys of the whole row.
    rng = np.random.default_rng(0)
    _, positions, segments = packed(rng, 1, 96, 60)
    whole = Where(jnp.asarray(segments), jnp.asarray(positions))
    part = jax.tree.map(lambda x: x[:, 32:64], whole)
    q, k, v, weight = _arrays(rng, 1, 96, 2, 1, 16)
    arrays = q[:, 32:64], k, v, weight[:, 32:64]
    _same(_at(small, part, whole), _at(module.plain, part, whole), arrays, 5e-6)


def test_triton_reads_only_the_blocks_that_are_needed():
    # Two segments that begin at blocks: what lies in the one, nan here, must not be touched for the other. A masked
    # block would give 0 * nan.
    segments = np.repeat(np.array([[1, 2]], np.int32), 64, axis=1)
    positions = np.tile(np.arange(64, dtype=np.int32), (1, 2))
    where = Where(jnp.asarray(segments), jnp.asarray(positions))
    rng = np.random.default_rng(0)
    q, k, v, weight = (x.at[:, 64:].set(jnp.nan) for x in _arrays(rng, 1, 128, 1, 1, 16))
    for x in _values(_at(small, where), q, k, v, weight):
        assert np.isfinite(x[:, :64]).all()
        assert np.isnan(x[:, 64:]).any()


def _as_cudnn_does(q, k, v, lengths, starts, scale):
    """Ragged sequences, lengths [n] at starts [n] of the rows laid end to end; what is in none is nan."""
    b, t, h, D = q.shape
    flat = [np.asarray(x, np.float64).reshape(b * t, -1, D) for x in (q, k, v)]
    o = np.full((b * t, h, D), np.nan)
    for length, start in zip(lengths, starts, strict=False):
        q, k, v = (x[start : start + length] for x in flat)
        k, v = (x.repeat(h // x.shape[1], axis=1) for x in (k, v))
        scores = np.einsum("thD,shD->hts", q, k) * scale
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True)) if length else scores
        o[start : start + length] = np.einsum("hts,shD->thD", weights / weights.sum(-1, keepdims=True), v)
    return jnp.asarray(o.reshape(b, t, h, D), jnp.float32)


def test_cudnn_gets_each_segment_as_a_sequence(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as library

    rng = np.random.default_rng(0)
    _, positions, segments = packed(rng, 3, 50, 20, fill=0.9)
    segments[1] = 0  # a row of padding alone
    where = Where(jnp.asarray(segments), jnp.asarray(positions))
    q, k, v, _ = _arrays(rng, 3, 50, 4, 2, 8)

    def instead(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert mask_type is library.MaskType.PADDING_CAUSAL
        assert kv_seqlen is q_seqlen
        assert kv_offsets is q_offsets
        assert not np.asarray(q)[segments == 0].any()
        # JAX's own step from what it is given to what cuDNN is given: offsets there count elements.
        lengths, _, starts, _ = library._fix_seqlen_offsets(q_seqlen, kv_seqlen, q_offsets, kv_offsets, q, k)
        count = int((lengths > 0).sum())
        assert count == len({(i, s) for i, row in enumerate(segments) for s in row if s})
        places = np.asarray(starts).ravel() // (q.shape[2] * q.shape[3])
        return _as_cudnn_does(q, k, v, np.asarray(lengths).ravel()[:count], places, scale)

    monkeypatch.setattr(library, "dot_product_attention", instead)
    o = cudnn._by_cudnn(q, k, v, where.segments)
    np.testing.assert_allclose(o, module.plain(q, k, v, where, where), atol=1e-5)


def test_cudnn_says_what_it_does_not_take(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as library

    def instead(*_, **__):
        raise NotImplementedError("Packed layout requires\n Hopper.")

    monkeypatch.setattr(library, "dot_product_attention", instead)
    x = jnp.zeros((1, 4, 1, 8), jnp.bfloat16)
    with pytest.raises(UserError, match=r"attention=cudnn: Packed layout requires Hopper\.; use auto"):
        cudnn._by_cudnn(x, x, x, jnp.ones((1, 4), jnp.int32))


def test_cudnn_leaves_rows_of_very_many_segments_to_another():
    segments = jnp.arange(1, 41)[None]
    where = Where(segments, jnp.zeros_like(segments))
    rng = np.random.default_rng(0)
    q, k, v, _ = _arrays(rng, 1, 40, 2, 1, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "_by_cudnn", lambda q, k, v, segments: jnp.full_like(q, jnp.nan))
        o = cudnn.cudnn(q, k, v, where, where, otherwise=module.plain)
    np.testing.assert_allclose(o, jnp.repeat(v, 2, axis=2), atol=1e-6)  # each token sees itself alone


def test_the_backend_of_a_gpu_follows_the_width(monkeypatch):
    x, ones = jnp.zeros((1, 4, 1, 8)), jnp.ones((1, 4), jnp.int32)
    assert set(ATTENTION) == {"auto", *module.BACKENDS}
    with pytest.raises(UserError, match="attention=cudnn: runs on NVIDIA GPUs alone"):
        module.attention(x, x, x, ones, ones, backend="cudnn")
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    assert module.pick(23040, 128, jnp.dtype("bfloat16")) == "triton"
    assert module.pick(100, 64, jnp.dtype("bfloat16")) == "triton"
    assert module.pick(23040, 256, jnp.dtype("bfloat16")) == "blockwise"
    assert module.pick(23040, 128, jnp.dtype("float32")) == "blockwise"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, wanted in (("8.9", "blockwise"), ("9.0", "triton")):  # an L4 has a smaller shared memory
        monkeypatch.setattr(jax, "devices", lambda c=capability: [types.SimpleNamespace(compute_capability=c)])
        assert module.pick(23040, 128, jnp.dtype("bfloat16")) == wanted
    with pytest.raises(UserError, match="attention=cudnn: computes in bfloat16"):
        module.attention(x, x, x, ones, ones, backend="cudnn")
