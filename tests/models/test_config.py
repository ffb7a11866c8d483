import json

import pytest

from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.types import UserError

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rope_theta": 5000000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 36,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
QWEN25 = {key: value for key, value in QWEN3.items() if key != "head_dim"} | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "sliding_window": 131072,  # present but disabled
}


LLAMA = QWEN25 | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
MISTRAL = QWEN25 | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}


def test_reads_the_config_of_qwen3_4b():
    c = ModelConfig.from_hf(QWEN3, compute_dtype="bfloat16", remat="full")
    assert (c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.rope_theta) == (36, 32, 8, 128, 5e6)
    assert (c.qk_norm, c.qkv_bias, c.tie_word_embeddings, c.eos_ids, c.bos_id) == (True, False, True, (151645,), 151643)
    assert (c.compute_dtype, c.remat) == ("bfloat16", "full")
    assert hash(c) == hash(ModelConfig.from_hf(QWEN3, compute_dtype="bfloat16", remat="full"))


def test_default_head_dim():
    assert ModelConfig.from_hf(QWEN25).head_dim == 2560 // 32
    assert ModelConfig.from_hf({key: value for key, value in QWEN3.items() if key != "head_dim"}).head_dim == 128


@pytest.mark.parametrize(
    "hf", [QWEN3, QWEN25, QWEN3 | {"eos_token_id": [3, 4]}, QWEN3 | {"eos_token_id": None}, LLAMA, MISTRAL]
)
def test_to_hf_is_the_inverse(hf):
    c = ModelConfig.from_hf(hf)
    assert ModelConfig.from_hf(json.loads(json.dumps(c.to_hf()))) == c


def test_rope_theta_under_both_names():
    nested = QWEN3 | {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}
    assert ModelConfig.from_hf(nested).rope_theta == 7e5
    assert ModelConfig.from_hf({k: v for k, v in QWEN3.items() if k != "rope_theta"}).rope_theta == 1e4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma3_text"}, "model_type: 'gemma3_text'"),
        ({"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}, "model_type: 'qwen2_moe'"),
        (
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]},
            "mlp_only_layers: dense layers",
        ),
        (
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts_per_tok": 200},
            "num_experts_per_tok: 200 must be from 1 to num_experts 128",
        ),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures: Qwen3ForSequenceClassification"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling: rope type 'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope_scaling: factor: '4'"),
        ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, "rope_scaling: low_freq_factor: None"),
        (
            {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling: contradicts rope_parameters",
        ),
        (
            {
                "rope_theta": None,
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_theta": 1e6},
            },
            "rope_theta: missing beside rope_scaling",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}}, "rope_parameters: rope type 'longrope'"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_bias": True},
            "attention_bias: True",
        ),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096},
            "sliding_window: 4096",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}, "use_sliding_window"),
        (
            {"use_sliding_window": True, "sliding_window": 4096, "layer_types": ["sliding_attention"] * 36},
            "use_sliding_window",
        ),
        ({"num_hidden_layers": None}, "num_hidden_layers: missing"),
        ({"num_hidden_layers": "36"}, "num_layers: '36'"),
        ({"hidden_size": 0}, "hidden_size: 0"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps: 'tiny'"),
        ({"num_key_value_heads": 5}, "num_kv_heads: 5 must divide num_heads 32"),
        ({"head_dim": 127}, "head_dim: 127"),
    ],
)
def test_refuses_unsupported_fields_by_name(change, named):
    with pytest.raises(UserError) as raised:
        ModelConfig.from_hf(QWEN3 | change)
    assert named in str(raised.value)
    assert "config.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_window_that_no_layer_uses_is_accepted():
    unused = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 36}
    assert ModelConfig.from_hf(QWEN3 | unused).num_layers == 36


def test_run_time_fields_are_checked():
    with pytest.raises(UserError, match="remat: 'most' is unknown"):
        ModelConfig.from_hf(QWEN3, remat="most")
    with pytest.raises(UserError, match="compute_dtype: 'float16' is unknown"):
        ModelConfig.from_hf(QWEN3, compute_dtype="float16")


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_bad_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: "):
        ModelConfig.from_hf(tmp_path)
