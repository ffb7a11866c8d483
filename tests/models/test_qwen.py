import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.models import hf, qwen
from open_agentrl_jax.models.config import REMAT, ModelConfig

from .rows import packed
from .tiny import torch_model

TINY = ModelConfig("qwen3", 64, 32, 48, 2, 4, 2, 16, eos_ids=(1,))
forward = jax.jit(qwen.forward, static_argnums=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("model_type", "head_dim"), [("qwen3", 32), ("qwen2", None)])
def test_logits_are_those_of_transformers(tmp_path, model_type, head_dim, tied):
    torch = pytest.importorskip("torch")

    # hidden 48, 4 heads: a head_dim of 32 is not 48 / 4; none is. Thetas of Qwen3-Instruct-2507 and of Qwen2.5.
    theta = 5e6 if model_type == "qwen3" else 1e6
    model = torch_model(model_type, head_dim=head_dim, tie_word_embeddings=tied, rope_theta=theta)
    model.save_pretrained(tmp_path)
    config, params = hf.load_pretrained(tmp_path)
    assert config.rope_theta == theta
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 41))
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    positions = np.tile(np.arange(41), (2, 1))
    got = qwen.logits(params, config, forward(params, config, tokens, positions, np.ones_like(positions)))
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(got, wanted, atol=2e-5)  # asked for: 2e-4


def test_packed_rows_are_their_unpacked_rows():
    tokens, positions, segments = packed(np.random.default_rng(0), 2, 60, 20)
    params = qwen.init(TINY, 0)
    hidden = np.asarray(forward(params, TINY, tokens, positions, segments))
    for row in range(2):
        for segment in range(1, segments[row].max() + 1):
            mine = segments[row] == segment
            n = mine.sum()
            alone = np.zeros((1, 60), np.int32), np.zeros((1, 60), np.int32), np.zeros((1, 60), np.int32)
            alone[0][0, :n], alone[1][0, :n], alone[2][0, :n] = tokens[row, mine], np.arange(n), 1
            np.testing.assert_allclose(forward(params, TINY, *alone)[0, :n], hidden[row, mine], atol=2e-5)


def _loss(params, config, batch):
    hidden = qwen.forward(params, config, *batch)
    return (jax.nn.logsumexp(qwen.logits(params, config, hidden), -1) * (batch[2] > 0)).mean()


@pytest.fixture(scope="module")
def exact():
    """Parameters, a batch, and the float32 gradient without rematerialisation."""
    params = qwen.init(TINY, 0)
    batch = tuple(jnp.asarray(x) for x in packed(np.random.default_rng(0), 2, 24, 9))
    return params, batch, gradient(params, TINY, batch)


gradient = jax.jit(jax.grad(_loss), static_argnums=1)


@pytest.mark.parametrize("remat", ["full", "attention", "offload"])
def test_remat_does_not_change_the_gradient(exact, remat):
    params, batch, wanted = exact
    got = gradient(params, dataclasses.replace(TINY, remat=remat), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, wanted)


def test_remat_saves_what_it_says():
    batch = tuple(jnp.asarray(x) for x in packed(np.random.default_rng(0), 2, 24, 9))

    def saved(remat):
        config = dataclasses.replace(TINY, remat=remat)
        forward = functools.partial(
            qwen.forward, model_config=config, tokens=batch[0], positions=batch[1], segment_ids=batch[2]
        )
        _, back = jax.eval_shape(lambda p: jax.vjp(forward, p), qwen.abstract_params(config))
        return sum(x.size for x in jax.tree.leaves(back))

    assert saved("full") < saved("attention") < saved("dots") < saved("none")


def test_every_remat_name_has_its_policy():
    assert set(qwen._POLICIES) == set(REMAT) - {"none"}


def test_bfloat16_compute_keeps_float32_gradients(exact):
    params, batch, wanted = exact
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    assert jax.eval_shape(lambda p: qwen.forward(p, config, *batch), params).dtype == jnp.bfloat16

    def near(a, b):
        assert a.dtype == jnp.float32
        assert float(jnp.linalg.norm(a - b)) < 0.03 * float(jnp.linalg.norm(b))

    jax.tree.map(near, gradient(params, config, batch), wanted)


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    # 4,096 gradients of 1 for one token: a bfloat16 sum stops at 256.
    config = dataclasses.replace(TINY, compute_dtype="bfloat16", num_layers=1)
    params = qwen.init(config, 0)
    params["layers"] = jax.tree.map(jnp.zeros_like, params["layers"])  # the stream alone: hidden = norm(embedding)
    zeros, ones = np.zeros((1, 4096), np.int32), np.ones((1, 4096), np.int32)
    positions = np.arange(4096, dtype=np.int32)[None]

    def first(hidden):
        return hidden.astype(jnp.float32)[..., 0].sum()

    def total(embed):
        return first(qwen.forward(params | {"embed": embed}, config, zeros, positions, ones))

    many = jax.jit(jax.grad(total))(params["embed"])[0]
    row = params["embed"][0].astype(jnp.bfloat16).astype(jnp.float32)
    one = jax.grad(lambda x: first(qwen.rms_norm(x, params["norm"], config.rms_norm_eps)))(row)
    np.testing.assert_allclose(many, 4096 * one, rtol=0.02, atol=0.02 * 4096 * float(jnp.abs(one).max()))


def test_run_layers_gives_each_layer_its_cache_and_stacks_what_comes_back():
    params = qwen.init(TINY, 0)
    tokens, positions, _ = packed(np.random.default_rng(0), 2, 8, 8)

    def attend(q, k, v, cache):
        assert (q.shape, k.shape, v.shape) == ((2, 8, 4, 16), (2, 8, 2, 16), (2, 8, 2, 16))
        return q, {"number": cache["number"] + 10, "k": k}

    cache = {"number": jnp.arange(2)}
    hidden, new = qwen.run_layers(params, TINY, tokens, positions, attend, cache)
    assert hidden.shape == (2, 8, 32)
    np.testing.assert_array_equal(new["number"], [10, 11])
    assert new["k"].shape == (2, 2, 8, 2, 16)


def test_init_depends_on_the_seed_alone():
    first, again, other = (qwen.init(TINY, seed) for seed in (3, 3, 4))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
    assert not (first["layers"]["q"] == other["layers"]["q"]).any()
    assert not (first["layers"]["q"][0] == first["layers"]["q"][1]).any()
    assert abs(float(first["layers"]["q"].std()) - 0.02) < 1e-3


def test_tied_head_is_the_embedding():
    tied = dataclasses.replace(TINY, tie_word_embeddings=True)
    params = qwen.init(tied, 0)
    assert "head" not in params
    np.testing.assert_array_equal(qwen.unembedding(params, tied), params["embed"].T)
