import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.models import hf, qwen
from open_agentrl_jax.models.config import REMAT, ModelConfig
from open_agentrl_jax.models.params import TABLE
from open_agentrl_jax.parallel import sharding

from .rows import packed
from .tiny import torch_model

TINY = ModelConfig("qwen3", 64, 32, 48, 2, 4, 2, 16, eos_ids=(1,))
forward = jax.jit(qwen.forward, static_argnums=1)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
FAMILIES = {
    # hidden 48, 4 heads: a head_dim of 32 is not 48 / 4. Thetas of Qwen3-Instruct-2507 and Qwen2.5.
    "qwen3": {"head_dim": 32, "rope_theta": 5e6},
    "qwen3 yarn bias": {"head_dim": 16, "rope_parameters": {"rope_theta": 1e6, **YARN}, "attention_bias": True},
    "qwen2": {"rope_theta": 1e6},
    "qwen2 yarn": {"rope_parameters": {"rope_theta": 1e6, **YARN, "beta_fast": 3.0, "truncate": False}},
    "llama": {"rope_theta": 1e5},
    "llama 3 bias": {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}, "attention_bias": True, "head_dim": 16},
    "llama linear": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
    "mistral": {"head_dim": 32, "rope_theta": 1e6},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(tmp_path, family, tied):
    """Two packed sequences in one row, against each alone in torch."""
    torch = pytest.importorskip("torch")

    model = torch_model(family.split()[0], tie_word_embeddings=tied, **FAMILIES[family])
    model.save_pretrained(tmp_path)
    config, params = hf.load_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 41 + 23))
    positions = np.concatenate([np.arange(41), np.arange(23)])[None]
    segments = np.repeat([[1, 2]], [41, 23], axis=1)
    parts = [model(torch.tensor(part)).logits for part in (tokens[:, :41], tokens[:, 41:])]
    wanted = torch.cat(parts, 1)
    wanted.logsumexp(-1).square().mean().backward()

    def loss(params):
        got = qwen.logits(params, config, qwen.forward(params, config, tokens, positions, segments))
        return jnp.square(jax.nn.logsumexp(got, -1)).mean(), got

    gradient, got = jax.jit(jax.grad(loss, has_aux=True))(params)
    wanted = wanted.detach().numpy()
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(got, wanted, atol=5e-5)  # required: 2e-4
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        for tensor in hf.tensors_of(sharding.path_name(path), leaf.shape):
            ours = np.asarray(leaf[tensor.index])
            ours = ours.T if TABLE[tensor.path].transposed else ours
            scale = np.abs(theirs[tensor.name]).max()
            np.testing.assert_allclose(ours, theirs[tensor.name], atol=1e-3 * scale, err_msg=tensor.name)


def test_yarn_in_rope_scaling_beside_default_rope_parameters(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    torch_model("qwen3", head_dim=16).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(theirs | {"rope_theta": 1e6, "rope_scaling": YARN}))
    config, params = hf.load_pretrained(tmp_path)
    hf.save_pretrained(tmp_path / "again", config, params)
    assert hf.load_pretrained(tmp_path / "again")[0] == config
    tokens, ones = np.arange(60)[None] % 97, np.ones((1, 60), np.int32)
    got = qwen.logits(params, config, forward(params, config, tokens, np.arange(60)[None], ones))
    for folder in (tmp_path, tmp_path / "again"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            np.testing.assert_allclose(got, model(torch.tensor(tokens)).logits.numpy(), atol=5e-5)


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
    hidden, new, _ = qwen.run_layers(params, TINY, tokens, positions, attend, cache)
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
