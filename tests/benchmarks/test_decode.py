import json

import jax
import pytest

from benchmarks import decode as module
from open_agentrl_jax.models import qwen
from open_agentrl_jax.models.config import ModelConfig

TINY = {"model_type": "qwen3", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_layers": 2}
TINY |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "tie_word_embeddings": True}


def test_the_command_measures_both_sides(monkeypatch, tmp_path, capsys):
    small = module.open_machine("float32", read_bytes=2**20, square=64)
    monkeypatch.setitem(module.MODELS, "small", TINY)
    monkeypatch.setattr(module, "open_machine", lambda dtype: small)
    out = tmp_path / "lines.json"
    module.main(["--batches=1,2", "--lengths=24", "--tokens=4", "--rounds=1", f"--out={out}"])
    lines = json.loads(out.read_text())["rows"]
    assert [(line["batch"], line["length"]) for line in lines] == [(1, 24), (2, 24)]
    for line in lines:
        assert all(value > 0 for value in line.values())
        assert line["of the bound"] == pytest.approx(line["decode tokens/s"] / line["bound tokens/s"])
    assert "of the bound" in capsys.readouterr().out


def test_what_a_step_reads_is_counted_from_the_shapes():
    config = ModelConfig(**TINY)
    attention, mlp, norms = 16 * (32 + 2 * 16 + 32), 3 * 16 * 32, 2 * 16 + 2 * 8
    layers = 2 * (attention + mlp + norms) + 16
    tied = module.random_params(config)
    assert module.weight_bytes(tied, config) == 4 * (64 * 16 + layers)
    apart = ModelConfig(**TINY | {"tie_word_embeddings": False}, compute_dtype="bfloat16")
    assert module.weight_bytes(module.random_params(apart), apart) == 2 * (64 * 16 + layers)  # the head, no embedding
    scales = 2 * (32 + 2 * 16 + 16 + 2 * 32 + 16) + 64  # q, k and v, o, gate and up, down; the embedding's rows
    matrices = 64 * 16 + 2 * (attention + mlp)
    assert module.weight_bytes(tied, config, "int8") == matrices + 4 * (scales + layers - 2 * (attention + mlp))
    assert module.cache_bytes(config, 3) == 3 * 2 * 2 * 2 * 8 * 4
    jax.tree.map(lambda x, y: x.shape == y.shape or pytest.fail(), tied, qwen.abstract_params(config))


def test_operations_of_prefill_are_those_that_jax_traces():
    """Against a count of the traced products of one chunk, whose scores are a whole square and not a triangle."""
    from open_agentrl_jax.models import decode, kv
    from open_agentrl_jax.planning import flops

    config, n = ModelConfig(**TINY), 8
    at = [jax.ShapeDtypeStruct((1,), "int32")] * 3
    cache = jax.eval_shape(lambda: kv.init_cache(config, 1, n))
    tokens = jax.ShapeDtypeStruct((1, n), "int32")
    traced = jax.make_jaxpr(decode.extend, static_argnums=1)(qwen.abstract_params(config), config, cache, tokens, *at)
    square, triangle = n * n, n * (n + 1) / 2
    # extend's loop over blocks of the cache is counted once by flops.count, and is not run from position 0
    block = cache.k.shape[-1]
    extra = 2 * 4.0 * 32 * (square - triangle + n * block)
    assert flops.count(traced).products == module.prefill_flops(config, n) + extra
