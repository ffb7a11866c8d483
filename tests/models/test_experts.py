"""Mixtures of experts: routing, products, load and export, training and decoding on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.models import experts, hf, qwen
from open_agentrl_jax.models.config import ModelConfig

from .rows import packed
from .tiny import torch_model

MOE = ModelConfig(
    "qwen3_moe",
    97,
    48,
    64,
    2,
    4,
    2,
    16,
    num_experts=8,
    experts_per_token=3,
    expert_size=24,
    norm_topk_prob=True,
    initializer_range=0.2,
)


def _torch(tmp_path, **changes):
    sizes = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16} | changes
    model = torch_model("qwen3_moe", **sizes)
    model.save_pretrained(tmp_path / "theirs")
    return model


@pytest.mark.parametrize("changes", [{"norm_topk_prob": True}, {"tie_word_embeddings": True}])
def test_logits_and_gradients_equal_those_of_transformers(tmp_path, changes):
    torch = pytest.importorskip("torch")
    model = _torch(tmp_path, **changes)
    config, params = hf.load_pretrained(tmp_path / "theirs")
    assert (config.num_experts, config.experts_per_token, config.expert_size) == (8, 3, 24)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 20)).astype(np.int32)
    theirs = model(torch.tensor(tokens).long()).logits
    places = np.broadcast_to(np.arange(20), (2, 20)), np.ones((2, 20), np.int32)

    def loss(params):
        logits = qwen.logits(params, config, qwen.forward(params, config, tokens, *places))
        return jnp.square(logits).mean(), logits

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(ours, theirs.detach(), atol=2e-4)
    theirs.square().mean().backward()
    wanted = {name: p.grad.numpy() for name, p in model.named_parameters()}
    gate_up = np.stack([wanted[f"model.layers.{i}.mlp.experts.gate_up_proj"] for i in range(3)])  # [l e 2f d]
    found = grads["layers"]
    pairs = [
        (jnp.concatenate([found["expert_gate"], found["expert_up"]], -1).swapaxes(-1, -2), gate_up),
        *(
            (found[ours].swapaxes(-1, -2), np.stack([wanted[f"model.layers.{i}.{name}"] for i in range(3)]))
            for ours, name in {
                "expert_down": "mlp.experts.down_proj",
                "router": "mlp.gate.weight",
                "q": "self_attn.q_proj.weight",
            }.items()
        ),
        (grads["embed"], wanted["model.embed_tokens.weight"]),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())


def test_transformers_loads_the_export_and_computes_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = _torch(tmp_path)
    config, params = hf.load_pretrained(tmp_path / "theirs")
    hf.save_pretrained(tmp_path / "ours", config, params, max_shard_bytes=100_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    reloaded_config, reloaded = hf.load_pretrained(tmp_path / "ours")
    assert reloaded_config == config
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), params, reloaded))


def test_packed_rows_equal_rows_apart():
    params = qwen.init(MOE, 0)
    tokens, positions, segments = packed(np.random.default_rng(0), 2, 48, 20, 97)
    hidden = qwen.forward(params, MOE, tokens, positions, segments)
    for row in range(2):
        for segment in range(1, segments[row].max() + 1):
            at = np.flatnonzero(segments[row] == segment)
            alone = qwen.forward(
                params, MOE, tokens[row : row + 1, at], positions[row : row + 1, at], jnp.ones((1, len(at)), int)
            )
            np.testing.assert_allclose(hidden[row, at], alone[0], atol=2e-5)


def test_ragged_products_equal_computing_every_expert():
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(0.5 * random.standard_normal(shape), jnp.float32)

    w = experts.Weights(draw(12, 4), draw(4, 12, 6), draw(4, 12, 6), draw(4, 6, 12))
    x, share = draw(40, 12), jnp.abs(draw(40, 3))
    chosen = jnp.asarray(random.permuted(np.tile(np.arange(-2, 6), (40, 1)), axis=1)[:, :3])  # 4 of 8 are held here

    def run(mix):
        return jax.value_and_grad(lambda x, share, w: jnp.sin(mix(x, chosen, share, w)).sum(), argnums=(0, 1, 2))(
            x, share, w
        )

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), run(experts.chosen_experts), run(experts.every_expert)
    )
    wanted = jnp.zeros_like(x)
    for token in range(40):
        for expert, weight in zip(chosen[token].tolist(), share[token], strict=True):
            if 0 <= expert < 4:
                hidden = jax.nn.silu(x[token] @ w.gate[expert]) * (x[token] @ w.up[expert])
                wanted = wanted.at[token].add(weight * (hidden @ w.down[expert]))
    np.testing.assert_allclose(experts.chosen_experts(x, chosen, share, w), wanted, atol=1e-5)


def test_given_choices_replace_the_best_ones():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 8)), jnp.float32)
    free = experts.route(logits, MOE)
    assert (np.sort(free.experts, -1) == np.sort(np.argsort(-logits, -1)[..., :3], -1)).all()
    np.testing.assert_allclose(free.weights.sum(-1), 1, rtol=1e-6)
    given = jnp.asarray([[[0, 1, 2], [-1, -1, -1], [7, 6, 5], [3, 0, 4], [1, 2, 3]]])
    replayed = experts.route(logits, MOE, given)
    assert (replayed.experts[0, [0, 2, 3, 4]] == given[0, [0, 2, 3, 4]]).all()
    assert (replayed.experts[0, 1] == free.experts[0, 1]).all()
    chosen = jnp.take_along_axis(jax.nn.softmax(logits), replayed.experts, -1)
    np.testing.assert_allclose(replayed.weights, chosen / chosen.sum(-1, keepdims=True), rtol=1e-6)


def test_load_and_balance_loss_against_numpy():
    random = np.random.default_rng(0)
    real = random.random((2, 9)) < 0.7
    loads, wanted = [], []
    for _ in range(3):
        routing = experts.route(jnp.asarray(random.standard_normal((2, 9, 8)), jnp.float32), MOE)
        loads.append(experts.load(routing, real))
        chosen = np.bincount(np.asarray(routing.experts)[real].ravel(), minlength=8) / real.sum()
        wanted.append(8 * (chosen * np.asarray(routing.probs)[real].mean(0)).sum())
    loss, metrics = experts.balance(jax.tree.map(lambda *x: jnp.stack(x), *loads))
    np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-6)
    assert 1 < metrics["router/busiest_expert"] <= 8 / 3
