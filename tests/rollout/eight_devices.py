"""Run in a process of its own with eight fake devices: the same requests on meshes (by number) and on one device."""

import asyncio
import json
import sys
from typing import Any

import jax
import numpy as np

from open_agentrl_jax.models import qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel.mesh import make_mesh
from open_agentrl_jax.rollout.local import LocalEngine
from open_agentrl_jax.types import Sampling

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
}
MODELS = {
    "tied": ModelConfig("qwen3", num_kv_heads=2, tie_word_embeddings=True, initializer_range=0.2, **SHAPE),
    "untied": ModelConfig("qwen2", num_kv_heads=4, initializer_range=0.2, **SHAPE),
}
MODELS["mixture"] = ModelConfig(
    "qwen3_moe",
    num_kv_heads=2,
    num_experts=8,
    experts_per_token=3,
    expert_size=16,
    initializer_range=0.2,
    **SHAPE,
)
CASES = [
    ("tied", (2, 2, 1, 2), "same"),
    ("tied", (1, 2, 2, 2), "same"),
    ("untied", (1, 8, 1, 1), "same"),
    ("untied", (1, 1, 2, 4), "same"),
    ("tied", (2, 1, 2, 2), "int8"),
    ("untied", (1, 4, 1, 2), "int8"),
    ("mixture", (1, 2, 1, 2, 2), "same"),
]
SHARED = np.random.default_rng(9).integers(0, 96, 21).tolist()


async def talk(engine, name, prompt, temperature, delay=0.0):
    """Two turns of one session; its tokens and log-probs."""
    await asyncio.sleep(delay)
    ids, logprobs = list(prompt), []
    for tool in ([1, 2, 3], []):
        how = Sampling(7, temperature, seed=len(prompt))
        done = await engine.generate(ids, how, session=name)
        logprobs += done.logprobs.tolist()
        ids += [*done.ids.tolist(), *tool]
    await engine.release(name)
    return ids, logprobs


async def play(engine, slow=0.0):
    """A group of one prompt and others, more than there are slots; every other one is greedy."""
    draw = np.random.default_rng(1)
    prompts = [SHARED] * 6 + [draw.integers(0, 96, n).tolist() for n in (1, 5, 30, 17, 33, 9)]
    return await asyncio.gather(
        *(talk(engine, str(i), p, float(i % 2), slow * draw.random()) for i, p in enumerate(prompts))
    )


def played(params, config, mesh, weights, slow=0.0):
    """What the requests got, whether arrays are shared with `params`, and the engine's counts."""
    engine = LocalEngine(
        params, config, slots=6, max_length=64, decode_chunk=4, prefill_chunks=(8, 16), mesh=mesh, weights=weights
    )
    engine.warmup()
    shared = mesh is not None and all(
        a.data.unsafe_buffer_pointer() == b.data.unsafe_buffer_pointer()
        for ours, theirs in zip(jax.tree.leaves(engine._params), jax.tree.leaves(params), strict=weights == "same")
        for a, b in zip(ours.addressable_shards, theirs.addressable_shards, strict=True)
    )
    held = engine._cache.k.addressable_shards[0].data.size / engine._cache.k.size
    result = asyncio.run(play(engine, slow))
    stats = engine.stats()
    engine.close()
    return result, {"shared": shared, "held": held, "slots": engine.slots, **stats}


def main():
    cases = []
    for name, sizes, weights in [CASES[int(number)] for number in sys.argv[1:]]:
        config = MODELS[name]
        params = jax.tree.map(lambda x: x + 0.03 * np.cos(np.arange(x.size)).reshape(x.shape), qwen.init(config, 0))
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
        alone, _ = played(jax.device_put(params, jax.devices()[0]), config, None, weights)
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, qwen.param_shardings(config, mesh))
            got, stats = played(placed, config, mesh, weights)
            again, _ = played(placed, config, mesh, weights, slow=0.05)
        cases.append(
            {
                "model": name,
                "mesh": sizes,
                "weights": weights,
                "tokens": [a[0] == b[0] for a, b in zip(got, alone, strict=True)],
                "logprobs": max(np.abs(np.subtract(a[1], b[1])).max() for a, b in zip(got, alone, strict=True)),
                "bits": got == again,
                **stats,
            }
        )
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
