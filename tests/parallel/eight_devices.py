"""Run in a process of its own with eight fake devices: loss and gradients on meshes, compared with one device."""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from models.rows import packed

from open_agentrl_jax.algorithms.logprobs import token_logprobs
from open_agentrl_jax.models import experts, linear, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.params import spec
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.parallel.mesh import make_mesh

SHAPE = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2)
TIED = ModelConfig("qwen3", head_dim=32, tie_word_embeddings=True, remat="full", **SHAPE)
UNTIED = ModelConfig("qwen2", head_dim=16, **SHAPE)
LLAMA = ModelConfig("llama", head_dim=16, attention_bias=True, **SHAPE)
MOE = ModelConfig(
    "qwen3_moe", head_dim=16, num_experts=8, experts_per_token=3, expert_size=48, norm_topk_prob=True, **SHAPE
)
CASES = [
    (TIED, (8, 1, 1, 1)),
    (TIED, (1, 2, 2, 2)),
    (TIED, (2, 1, 4, 1)),
    (UNTIED, (1, 8, 1, 1)),
    (LLAMA, (2, 2, 1, 2)),
    (UNTIED, (2, 2, 2, 1)),  # the only one whose parts of a row exchange heads: the others have too few
    (UNTIED, (1, 1, 8, 1)),
    (MOE, (1, 2, 1, 2, 2)),
    (MOE, (1, 1, 2, 1, 4)),
]


def loss(params, config, tokens, positions, segments, targets):
    """By the chunked head, whose chunks do not divide a part of a row."""
    hidden = qwen.forward(params, config, tokens, positions, segments)
    logp, entropy = token_logprobs(hidden, qwen.unembedding(params, config), targets, temperature=0.7, chunk=5)
    return jnp.mean((entropy - logp) * (segments > 0))


def plain_loss(params, config, tokens, positions, segments, targets):
    """The same by its formula, on one device."""
    logp = jax.nn.log_softmax(logits(params, config, tokens, positions, segments) / 0.7)
    chosen = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
    return jnp.mean((-(jnp.exp(logp) * logp).sum(-1) - chosen) * (segments > 0))


def logits(params, config, tokens, positions, segments):
    return qwen.logits(params, config, qwen.forward(params, config, tokens, positions, segments))


def jitter(params):
    """Random norms and biases: with ones and zeros a wrong sharding of them could go unseen."""
    return jax.tree.map(lambda x: x + 0.03 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape), params)


def difference(a, b):
    relative = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max(), a, b
    )
    return float(max(jax.tree.leaves(relative)))


def reductions():
    """Relative error of one matrix's gradient over eight devices, its products in bfloat16, by the dtype of the sum."""
    rng = np.random.default_rng(0)
    half = jnp.bfloat16
    x, dy = (jnp.asarray(rng.standard_normal((8, 32, n)), half) for n in (64, 128))
    w = rng.standard_normal((64, 128)).astype(np.float32)
    wanted = np.einsum("bti,bto->io", np.asarray(x, np.float64), np.asarray(dy, np.float64))
    take, found = functools.partial(linear.TRAINING.take, "layers/up"), {}
    ways = {
        "compute": lambda w: take(w.astype(half)),
        "float32": linear.take_in_float32(take, lambda w: w.astype(half)),
    }
    with jax.set_mesh(make_mesh(1, 4, 2, 1)):
        placed = jax.device_put(w, sharding.P(*spec("layers/up")[1:]))
        x, dy = jax.device_put(x, sharding.HIDDEN), jax.device_put(dy, sharding.WIDE)
        for name, way in ways.items():
            y, back = jax.jit(lambda w, way=way: jax.vjp(lambda w: linear.widen(x, way(w)), w))(placed)
            (dw,) = jax.jit(lambda dy, back=back: back(dy))(dy)
            assert y.dtype == half and dw.dtype == jnp.float32 and dw.sharding == placed.sharding
            found[name] = float(np.abs(np.asarray(dw, np.float64) - wanted).max() / np.abs(wanted).max())
    return found


def main():
    plain, step = (jax.jit(jax.value_and_grad(f), static_argnums=1) for f in (plain_loss, loss))
    batch = packed(np.random.default_rng(0), 8, 32, 12, vocab=96)
    batch += (np.roll(batch[0], -1, 1),)
    wanted = {}
    for config in (TIED, UNTIED, LLAMA, MOE):
        params = jitter(qwen.init(config, 0))
        wanted[config] = params, *plain(params, config, *batch)
    cases = []
    experts.pick = lambda tokens: experts.chosen_experts  # `wanted` was computed with every expert, as on any CPU
    for config, sizes in CASES:
        params, value, gradient = wanted[config]
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, qwen.param_shardings(config, mesh))
            got, got_gradient = step(placed, config, *(jax.device_put(x, sharding.TOKENS) for x in batch))
        where = jax.tree.map(lambda g, p: g.sharding == p.sharding, got_gradient, placed)
        cases.append(
            {
                "mesh": sizes,
                "value": float(got),
                "loss": abs(float(got - value)) / abs(float(value)),
                "gradient": difference(got_gradient, gradient),
                "sharded_like_parameters": jax.tree.all(where),
            }
        )
    mesh, every = make_mesh(1, 2, 2, 2), jax.jit(logits, static_argnums=1)
    made = jitter(jax.device_get(qwen.init(TIED, 0, mesh)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(made, qwen.param_shardings(TIED, mesh))
        got = every(placed, TIED, *(jax.device_put(x, sharding.TOKENS) for x in batch[:3]))
    params = wanted[TIED][0]
    told = {"init": difference(made, params), "logits": difference(got, every(params, TIED, *batch[:3]))}
    print(json.dumps({"cases": cases, **told, "reductions": reductions()}))


if __name__ == "__main__":
    main()
