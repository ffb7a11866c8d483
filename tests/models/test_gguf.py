import jax
import numpy as np
import pytest

from open_agentrl_jax.models import convert, gguf, hf, qwen
from open_agentrl_jax.types import UserError

from .tiny import torch_model

library = pytest.importorskip("gguf")
TEXTS = ["What is 123 + 4567?", "It's naïve, don't you THINK?", "  two  spaces\n\nand\tlines\r\n", "你好 <|im_end|>ok"]
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}
TYPES = ("Q8_0", "Q4_0", "Q4_1", "F16", "BF16", "F32", "Q4_K", "Q6_K")


def trained_tokenizer(pre):
    """Byte-level BPE that splits text as `pre` of llama.cpp does, and the special tokens of ChatML."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    split = {
        "smollm": pre_tokenizers.Digits(individual_digits=True),
        "qwen2": pre_tokenizers.Split(tokenizers.Regex(gguf._WORDS % ""), "isolated"),
    }[pre]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return made


def write(path, model, tokenizer=None, pre="smollm", types=TYPES, **fields):
    """A GGUF file of a torch model, its matrices in `types` by turns."""
    import json

    c = model.config
    writer = library.GGUFWriter(path, c.model_type)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if c.model_type == "qwen3":
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    if tokenizer is not None:
        made = json.loads(tokenizer.to_str())["model"]
        tokens = sorted(made["vocab"], key=made["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in made["merges"]])
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages }}")
    number = 0
    for name, value in {**model.state_dict(), **fields}.items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        value = np.asarray(value, np.float32)
        if c.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            value = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        for theirs, short in NAMES.items():
            name = name.replace(theirs, short)
        if value.ndim < 2:
            writer.add_tensor(name, value)
            continue
        kind = library.GGMLQuantizationType[types[number % len(types)]]
        number += 1
        if kind.name.endswith("_K"):  # the package dequantises these only: any bytes that are finite numbers
            shape = library.quant_shape_to_byte_shape(value.shape, kind)
            data = np.full(shape, 0x11, np.uint8) + np.arange(shape[-1], dtype=np.uint8) % 3
        else:
            data = library.quants.quantize(value, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_and_logits_are_those_of_transformers(tmp_path, family):
    torch = pytest.importorskip("torch")
    import transformers

    tied = family != "qwen2"
    head_dim = 128 if family == "qwen3" else None  # transformers assumes 128 for a GGUF of Qwen3
    model = torch_model(
        family, hidden_size=256, intermediate_size=256, num_hidden_layers=2, tie_word_embeddings=tied,
        head_dim=head_dim, rms_norm_eps=1e-5, vocab_size=300,
    )  # fmt: skip
    write(tmp_path / "model.gguf", model, trained_tokenizer("smollm"))
    convert.convert("gguf", str(tmp_path / "model.gguf"), "hf", tmp_path / "out")
    config, params = hf.load_pretrained(tmp_path / "out")
    assert (config.model_type, config.rms_norm_eps, config.eos_ids) == (family, 1e-5, (2,))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name]), name
    tokens = np.arange(40)[None] % 128
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    positions = np.arange(40)[None]
    hidden = jax.jit(qwen.forward, static_argnums=1)(params, config, tokens, positions, np.ones_like(positions))
    np.testing.assert_allclose(qwen.logits(params, config, hidden), wanted, atol=2e-4, rtol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"


@pytest.mark.parametrize("pre", ["smollm", "qwen2"])
def test_the_tokenizer_encodes_as_the_original(tmp_path, pre):
    import transformers

    original = trained_tokenizer(pre)
    write(tmp_path / "model.gguf", torch_model("llama", hidden_size=256), original, pre, types=("F16",))
    gguf.save_tokenizer(tmp_path / "model.gguf", tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert loaded(text).input_ids == original.encode(text).ids
        assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.eos_token == "<|im_end|>" and len(loaded) == original.get_vocab_size()


def test_the_scaling_of_llama_3_is_found(tmp_path):
    from open_agentrl_jax.models.rope import frequencies

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    pairs = tuple(sorted(scaling.items()))
    model = torch_model("llama", hidden_size=256, rope_theta=5e5)
    factors = frequencies(64, 5e5, ())[0] / frequencies(64, 5e5, pairs)[0]
    write(tmp_path / "model.gguf", model, types=("F16",), **{"rope_freqs.weight": factors})
    assert gguf.describe(tmp_path / "model.gguf")[0].rope_scaling == pairs
    write(tmp_path / "other.gguf", model, types=("F16",), **{"rope_freqs.weight": factors + 1})
    with pytest.raises(UserError, match=r"rope_freqs\.weight: not the scaling of Llama 3"):
        gguf.describe(tmp_path / "other.gguf")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "text.gguf").write_text("not a GGUF file at all")
    with pytest.raises(UserError, match="no readable GGUF file"):
        gguf.load(tmp_path / "text.gguf")
    with pytest.raises(UserError, match=r"none\.gguf: missing"):
        gguf.load(tmp_path / "none.gguf")
    model = torch_model("llama", hidden_size=256)
    write(tmp_path / "more.gguf", model, types=("F16",), **{"blk.0.extra": np.ones(3)})
    with pytest.raises(UserError, match=r"blk\.0\.extra: unknown to a llama model"):
        gguf.load(tmp_path / "more.gguf")
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.model 'default'"):
        gguf.save_tokenizer(tmp_path / "more.gguf", tmp_path / "out")
    writer = library.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"general\.architecture: 'mamba' is not supported"):
        gguf.load(tmp_path / "other.gguf")
