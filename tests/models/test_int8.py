import asyncio
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.models import int8, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.params import TABLE
from open_agentrl_jax.rollout.local import LocalEngine
from open_agentrl_jax.types import Sampling

SHAPE = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_layers": 2, "num_heads": 4}
TIED = ModelConfig("qwen3", num_kv_heads=2, head_dim=16, tie_word_embeddings=True, initializer_range=0.2, **SHAPE)  # type: ignore[arg-type]
UNTIED = ModelConfig("qwen2", num_kv_heads=2, head_dim=12, initializer_range=0.2, **SHAPE)  # type: ignore[arg-type]
PROMPT = np.random.default_rng(0).integers(0, 97, 21).tolist()


def widened(made):
    """Float32 parameters of the numbers and scales that `made` holds."""

    def put_together(part):
        out = {}
        for name, w in part.items():
            if name.endswith(int8.SCALE):
                continue
            scale = part.get(name + int8.SCALE)
            if scale is not None:
                w = w.astype(jnp.float32) * (scale[:, None] if name == "embed" else jnp.expand_dims(scale, -2))
            out[name] = w
        return out

    return put_together({**made, "layers": put_together(made["layers"])})


def sampled(params, config, weights="same", dtype=None, n=24):
    engine = LocalEngine(
        params, config, slots=2, max_length=64, decode_chunk=4, prefill_chunks=(16,), weights=weights, dtype=dtype
    )
    done = asyncio.run(engine.generate(PROMPT, Sampling(n, seed=5)))
    engine.close()
    return done


@functools.partial(jax.jit, static_argnums=1)
def forward(params, config, tokens):
    hidden = qwen.forward(params, config, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
    return jax.nn.log_softmax(qwen.logits(params, config, hidden)[0])


def logprobs(params, config, ids):
    """Of the tokens after PROMPT, by the training forward."""
    tokens = jnp.asarray([[*PROMPT, *ids]])
    every = forward(params, config, tokens)
    return np.asarray(every[np.arange(len(PROMPT) - 1, tokens.shape[1] - 1), np.asarray(ids)])


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_number_is_at_most_half_a_step_off(config):
    params = qwen.init(config, 0)
    params["layers"]["q"] = params["layers"]["q"].at[0, :, 3].set(0.0)  # a channel of zeros
    made = int8.quantize(params)
    names = [
        *(path for path, row in TABLE.items() if row.int8 is not None),
        "embed" if config.tie_word_embeddings else "head",
    ]
    for name in names:
        part, was = (made["layers"], params["layers"]) if "/" in name else (made, params)
        name = name.removeprefix("layers/")
        w, values, scale = was[name], part[name], part[name + int8.SCALE]
        assert values.dtype == jnp.int8 and scale.shape == (
            w.shape[:1] if name == "embed" else (*w.shape[:-2], w.shape[-1])
        )
        scale = scale[:, None] if name == "embed" else jnp.expand_dims(scale, -2)
        assert (jnp.abs(values * scale - w) <= scale * 0.5001).all()
        axis = 1 if name == "embed" else -2
        top = jnp.abs(values).max(axis)
        assert ((top == 127) | (top == 0)).all() and (top == 0).sum() == (name == "q")
    left = [name for name in made["layers"] if name.endswith(("norm", "bias"))]
    assert left and all(made["layers"][name] is params["layers"][name] for name in left)
    assert "embed" in names or made["embed"] is params["embed"]


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_it_samples_from_the_rounded_model_and_says_so(config):
    """Its log-probs are exactly those of the 8-bit numbers, and not those of the trainer's."""
    params = qwen.init(config, 0)
    done = sampled(params, config, "int8")
    np.testing.assert_allclose(done.logprobs, logprobs(widened(int8.quantize(params)), config, done.ids), atol=2e-5)
    gap = np.abs(done.logprobs - logprobs(params, config, done.ids))
    assert 1e-3 < gap.mean() < 0.1 and np.ptp(done.logprobs) > 1


def test_in_bfloat16_too():
    params = qwen.init(TIED, 0)
    done = sampled(params, TIED, "int8", "bfloat16")
    gap = np.abs(done.logprobs - logprobs(params, TIED, done.ids))
    assert gap.mean() < 0.1
