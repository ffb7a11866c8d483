import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_agentrl_jax.models import attention as module
from open_agentrl_jax.models import blocks, splash
from open_agentrl_jax.models.attention import attention

from .rows import packed


def _inputs(rng, b, t, h, k, D, dtype=jnp.float32):
    arrays = [jnp.asarray(rng.standard_normal((b, t, n, D)), dtype) for n in (h, k, k, h)]
    return arrays[:3], arrays[3]


def _with_gradients(backend, qkv, weight, segments, positions):
    def total(q, k, v):
        o = attention(q, k, v, segments, positions, backend=backend)
        return (o * weight).astype(jnp.float32).sum(), o

    (_, o), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return o, *gradients


@settings(max_examples=9, deadline=None, derandomize=True)
@given(
    b=st.integers(1, 4),
    t=st.integers(1, 70),
    k=st.sampled_from([1, 2]),
    g=st.sampled_from([1, 3]),
    longest=st.integers(1, 70),
    shuffled=st.booleans(),
    seed=st.integers(0, 9),
)
def test_blockwise_is_the_plain_formula(b, t, k, g, longest, shuffled, seed):
    rng = np.random.default_rng(seed)
    qkv, weight = _inputs(rng, b, t, k * g, k, 8)
    _, positions, segments = packed(rng, b, t, longest, fill=0.8)
    if shuffled:  # tokens in any order, as after a balanced split of long rows
        order = rng.permutation(t)
        positions, segments = positions[:, order], segments[:, order]
    with pytest.MonkeyPatch.context() as patch:  # small blocks, so that small rows have many
        patch.setattr(module, "_BLOCK_Q", 16)
        patch.setattr(module, "_BLOCK_KV", 24)
        ours = _with_gradients("blockwise", qkv, weight, segments, positions)
    for a, b in zip(ours, _with_gradients("plain", qkv, weight, segments, positions), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_blockwise_at_its_real_block_sizes():
    rng = np.random.default_rng(0)
    qkv, weight = _inputs(rng, 2, 1100, 4, 2, 16)
    _, positions, segments = packed(rng, 2, 1100, 900)
    ours = _with_gradients("blockwise", qkv, weight, segments, positions)
    for a, b in zip(ours, _with_gradients("plain", qkv, weight, segments, positions), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("backend", ["plain", "blockwise"])
def test_padding_gives_zero_and_gets_no_gradient(backend):
    rng = np.random.default_rng(0)
    qkv, weight = _inputs(rng, 2, 20, 2, 1, 8)
    segments = np.zeros((2, 20), np.int32)
    segments[0, :7] = 1  # the second row is padding alone
    positions = np.tile(np.arange(20, dtype=np.int32), (2, 1))
    for x in _with_gradients(backend, qkv, weight, segments, positions):
        assert np.isfinite(x).all()
        assert (np.asarray(x)[segments == 0] == 0).all()
        assert (np.asarray(x)[segments == 1] != 0).any()


def test_bfloat16_is_near_float32():
    rng = np.random.default_rng(0)
    qkv, weight = _inputs(rng, 2, 64, 4, 2, 16)
    _, positions, segments = packed(rng, 2, 64, 30)
    exact = _with_gradients("plain", qkv, weight, segments, positions)
    half = [x.astype(jnp.bfloat16) for x in qkv]
    for a, b in zip(_with_gradients("blockwise", half, weight, segments, positions), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b, atol=0.03 * float(jnp.abs(b).max()))


def test_blocks_outside_the_segment_are_skipped():
    # 8 segments of 64 tokens in blocks of 16: each block of queries needs the blocks of its own segment up to itself.
    positions = np.tile(np.arange(64, dtype=np.int32), 8).reshape(1, 1, 32, 1, 16)[0]
    segments = np.repeat(np.arange(1, 9, dtype=np.int32), 64).reshape(1, 1, 32, 1, 16)[0]
    where = blocks.Where(jnp.asarray(segments), jnp.asarray(positions))
    low, high = blocks.bounds(blocks.needed(where, where))
    np.testing.assert_array_equal(low[0], np.arange(32) // 4 * 4)
    np.testing.assert_array_equal(high[0], np.arange(32) + 1)


def _three_rows(t):
    """A row of short segments, one of a single segment, one that is mostly padding."""
    rng = np.random.default_rng(0)
    _, positions, segments = packed(rng, 3, t, 150)
    segments[1], positions[1] = 1, np.arange(t)
    segments[2, 100:] = positions[2, 100:] = 0
    return rng, positions, segments


@pytest.mark.parametrize("backend", ["splash", "splash_static"])
def test_splash_is_the_plain_formula(backend, monkeypatch):
    monkeypatch.setattr(splash, "_LARGEST", 128)  # three blocks a row
    rng, positions, segments = _three_rows(384)
    qkv, weight = _inputs(rng, 3, 384, 4, 2, 32)
    ours = _with_gradients(backend, qkv, weight, segments, positions)
    for a, b in zip(ours, _with_gradients("plain", qkv, weight, segments, positions), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_splash_of_a_part_of_the_row(monkeypatch):
    # What each of three devices of the mesh axis seq computes: its queries against the keys of the whole row.
    monkeypatch.setattr(splash, "_LARGEST", 128)
    rng, positions, segments = _three_rows(384)
    (q, k, v), weight = _inputs(rng, 1, 384, 2, 1, 32)
    where = blocks.Where(jnp.asarray(segments[:1]), jnp.asarray(positions[:1]))

    def total(q, k, v):
        parts = []
        for part in (slice(i, i + 128) for i in (0, 128, 256)):
            at = jax.tree.map(lambda x, part=part: x[0, part], where)
            whole = jax.tree.map(lambda x: x[0], where)
            row = splash._row(q[0, part], k[0], v[0], at, whole, start=part.start, block=128, interpret=True)
            parts.append(row)
        o = jnp.concatenate(parts)[None]
        return (o * weight).sum(), o

    (_, o), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    wanted = _with_gradients("plain", (q, k, v), weight, segments[:1], positions[:1])
    for a, b in zip((o, *gradients), wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_splash_runs_what_is_needed_and_fetches_what_comes_next():
    # Two segments of 3 and 1 blocks, then a block of padding: the causal half of each, and the diagonal.
    segments = np.repeat(np.array([1, 1, 1, 2, 0], np.int32), 8)
    where = blocks.Where(jnp.asarray(segments), jnp.asarray(np.r_[0:24, 0:8, 0:8].astype(np.int32)))
    pairs = splash._pairs(where, where, 0, 8)
    np.testing.assert_array_equal(
        pairs, [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    )
    block, runs = splash._schedule(pairs, following=True)
    assert runs.sum() == pairs.sum()
    np.testing.assert_array_equal(block[0, 2], [0, 1, 2, 3, 3])  # then the first of the next row of blocks
    block, runs = splash._schedule(pairs.T, following=False)
    np.testing.assert_array_equal(block[0, 1], [1, 2, 1, 1, 1])
    np.testing.assert_array_equal(runs[0, 1], [1, 1, 0, 0, 0])


def test_the_backend_follows_the_platform_and_the_length():
    half = jnp.dtype("bfloat16")
    assert module.pick(23040, 128, half) == "blockwise"  # a CPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "platform", lambda: "tpu")
        assert module.pick(23040, 128, half) == "splash"
        assert module.pick(100, 128, half) == "blockwise"
    assert [splash.block_size(t) for t in (23040, 11520, 5760, 128, 130, 64)] == [768, 768, 640, 128, None, None]
