"""The embedded engine on every family and rope type."""

import asyncio

import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.models import qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.rollout.local import LocalEngine
from open_agentrl_jax.types import Sampling

from .test_experts import MOE
from .test_int8 import PROMPT, logprobs

LLAMA3 = (
    ("factor", 8.0),
    ("high_freq_factor", 4.0),
    ("low_freq_factor", 1.0),
    ("original_max_position_embeddings", 16),
    ("rope_type", "llama3"),
)
YARN = (("factor", 4.0), ("original_max_position_embeddings", 16), ("rope_type", "yarn"))


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig("llama", 97, 48, 64, 2, 4, 2, 12, attention_bias=True, rope_scaling=LLAMA3, initializer_range=0.2),
        ModelConfig(
            "qwen3", 97, 48, 64, 2, 4, 2, 16, tie_word_embeddings=True, rope_scaling=YARN, initializer_range=0.2
        ),
        MOE,
    ],
    ids=["llama", "qwen3 yarn", "qwen3 moe"],
)
def test_engine_logprobs_equal_the_forward(config):
    params = qwen.init(config, 0)
    for name in params["layers"]:
        if name.endswith("bias"):
            params["layers"][name] += 0.1 * jnp.cos(jnp.arange(params["layers"][name].shape[1]))
    engine = LocalEngine(params, config, slots=2, max_length=64, decode_chunk=4, prefill_chunks=(16,))
    done = asyncio.run(engine.generate(PROMPT, Sampling(24, seed=5)))
    engine.close()
    assert np.ptp(done.logprobs) > 1
    np.testing.assert_allclose(done.logprobs, logprobs(params, config, done.ids), atol=1e-4)
