"""Adapters: the policy starts as its base, merges exactly, is read and written as PEFT does, samples what it scores."""

import asyncio
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.models import hf, lora, peft, qwen
from open_agentrl_jax.models.config import Lora, ModelConfig
from open_agentrl_jax.models.params import LORA_A, SCALE
from open_agentrl_jax.rollout.local import LocalEngine
from open_agentrl_jax.types import Sampling, UserError
from tests.models.tiny import torch_model

BASE = ModelConfig(
    "qwen3",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    initializer_range=0.2,
)
MODEL = dataclasses.replace(BASE, lora=Lora(4))
INT8 = dataclasses.replace(BASE, lora=Lora(4, int8=True))
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 24))


@functools.partial(jax.jit, static_argnums=1)
def scores(params, config, tokens):
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    return qwen.logits(params, config, qwen.forward(params, config, tokens, positions, jnp.ones_like(tokens)))


def trained(config, seed=1):
    """Adapters whose B is not zero."""
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed), x.shape), lora.init(config, seed))


@pytest.fixture(scope="module")
def base():
    return qwen.init(BASE, 0)


def whole(base, config):
    return lora.join(lora.freeze(base, config), trained(config))


def test_new_adapters_change_no_bit(base):
    params = lora.join(base, lora.init(MODEL, 1))
    np.testing.assert_array_equal(scores(params, MODEL, TOKENS), scores(base, BASE, TOKENS))


@pytest.mark.parametrize("config", [MODEL, INT8], ids=["same", "int8"])
def test_a_merged_model_computes_the_same_and_its_export_has_its_bits(base, config, tmp_path):
    params = whole(base, config)
    merged = lora.merge(params, config)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    expected = scores(params, config, TOKENS)
    np.testing.assert_allclose(scores(merged, BASE, TOKENS), expected, atol=1e-4)
    assert np.abs(expected - scores(base, BASE, TOKENS)).max() > 0.1
    hf.save_pretrained(tmp_path / "export", config, params)
    read, back = hf.load_pretrained(tmp_path / "export")
    assert read == BASE
    jax.tree.map(np.testing.assert_array_equal, back, merged)


def test_a_bfloat16_export_is_bit_equal_to_the_merged_copy(base, tmp_path):
    config = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    params = lora.join(jax.tree.map(lambda x: x.astype(jnp.bfloat16), base), trained(config))
    merged = lora.merge(params, config)
    hf.save_pretrained(tmp_path / "export", config, params, dtype="bfloat16")
    back = hf.load_pretrained(tmp_path / "export", dtype="bfloat16")[1]
    jax.tree.map(np.testing.assert_array_equal, back, merged)


@pytest.mark.parametrize("way", ["adapters", "int8 base", "merged"])
def test_the_engine_samples_what_the_forward_scores(base, way):
    config = INT8 if way == "int8 base" else MODEL
    params = whole(base, config)
    expected, engine_config = (params, config) if way != "merged" else (lora.merge(params, config), BASE)
    engine = LocalEngine(expected, engine_config, slots=2, max_length=64, decode_chunk=4, prefill_chunks=(16,))
    done = asyncio.run(engine.generate(TOKENS[0].tolist(), Sampling(12, seed=5)))
    engine.close()
    ids = np.concatenate([TOKENS[0], done.ids])[None]
    logprobs = jax.nn.log_softmax(scores(params, config, ids)[0, len(TOKENS[0]) - 1 : -1])
    np.testing.assert_allclose(done.logprobs, logprobs[np.arange(len(done.ids)), done.ids], atol=1e-4)


@pytest.mark.parametrize("kind", [Lora(4), Lora(3, 8.0, ("q_proj", "down_proj"), rslora=True)], ids=["all", "some"])
def test_peft_loads_an_adapter_and_ours_reads_it_back(kind, tmp_path):
    torch, library = pytest.importorskip("torch"), pytest.importorskip("peft")

    torch_base = torch_model("qwen3", head_dim=16, tie_word_embeddings=True)
    torch_base.save_pretrained(tmp_path / "base")
    found, base = hf.load_pretrained(tmp_path / "base")
    config = dataclasses.replace(found, lora=kind)
    adapters = trained(config)
    peft.save_adapter(tmp_path / "adapter", config, adapters, base=tmp_path / "base")
    with torch.no_grad():
        theirs = library.PeftModel.from_pretrained(torch_base, str(tmp_path / "adapter"))(
            torch.tensor(TOKENS)
        ).logits.numpy()
    np.testing.assert_allclose(scores(lora.join(base, adapters), config, TOKENS), theirs, atol=2e-4)
    read, origin = peft.read_config(tmp_path / "adapter")
    assert origin == str(tmp_path / "base") and dataclasses.replace(read, targets=kind.targets) == kind
    back = peft.load_adapter(tmp_path / "adapter", dataclasses.replace(config, lora=read))
    jax.tree.map(np.testing.assert_array_equal, back, adapters)


def test_adapters_that_peft_made_are_read(tmp_path):
    torch, library = pytest.importorskip("torch"), pytest.importorskip("peft")

    torch_base = torch_model("llama", head_dim=12)
    torch_base.save_pretrained(tmp_path / "base")
    tuned = library.get_peft_model(torch_base, library.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
        theirs = tuned(torch.tensor(TOKENS)).logits.numpy()
    tuned.save_pretrained(tmp_path / "adapter")
    found, base = hf.load_pretrained(tmp_path / "base")
    config = dataclasses.replace(found, lora=peft.read_config(tmp_path / "adapter")[0])
    params = lora.join(base, peft.load_adapter(tmp_path / "adapter", config))
    np.testing.assert_allclose(scores(params, config, TOKENS), theirs, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora: True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "give a LORA adapter"),
        ({"r": None}, "cannot be read"),
        ({"target_modules": ".*_proj"}, "not a list of names"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_by_its_field(change, message, tmp_path):
    peft.save_adapter(tmp_path / "a", MODEL, trained(MODEL), base="base")
    content = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=message):
        peft.read_config(tmp_path / "a")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    peft.save_adapter(tmp_path / "a", MODEL, trained(MODEL), base="base")
    wider = dataclasses.replace(MODEL, intermediate_size=80)
    with pytest.raises(UserError, match=r"down_proj.*shape \(4, 64\).*\(4, 80\); give the base model"):
        peft.load_adapter(tmp_path / "a", wider)
    with pytest.raises(UserError, match=r"layers\.2\.\S+: missing"):
        peft.load_adapter(tmp_path / "a", dataclasses.replace(MODEL, num_layers=3))
    with pytest.raises(UserError, match="not an adapter of"):
        peft.load_adapter(tmp_path / "a", dataclasses.replace(MODEL, num_layers=1))
    with pytest.raises(UserError, match=r"model\.lora\.targets: qproj: no such matrix; choose of down_proj, gate_proj"):
        lora.check(dataclasses.replace(BASE, lora=Lora(4, targets=("qproj",))))


def test_abstract_trees_are_those_of_a_run(base):
    for config in (MODEL, INT8):
        frozen, adapters = lora.freeze(base, config), lora.init(config, 0)
        kinds = jax.tree.map(lambda x: (x.shape, str(x.dtype)), (frozen, adapters))
        assert kinds == jax.tree.map(lambda x: (x.shape, str(x.dtype)), lora.abstract(config))
    assert "q" + SCALE in lora.abstract(INT8)[0]["layers"] and "q" + LORA_A in lora.abstract(INT8)[1]["layers"]
