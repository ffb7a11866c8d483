"""Reads GGUF files (llama.cpp): dequantised weights, config and tokenizer of Llama and Qwen models.

Needs the gguf package (extra [gguf]), which dequantises and knows the tensor names.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from open_agentrl_jax.models import qwen, rope
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.export import Tensor, tensors_of
from open_agentrl_jax.models.params import TABLE, Params, abstract_params, rows
from open_agentrl_jax.parallel.sharding import path_name
from open_agentrl_jax.types import UserError

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3: the default frequency of each pair over its scaled one
_CONTROL, _USER_DEFINED = 3, 4  # token types
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> regular expression that splits text; None: GPT-2's own
_SPLITS = {"qwen2": _WORDS % "", "llama-bpe": _WORDS % "{1,3}", "smollm": None, "gpt-2": None, "default": None}


def load(
    path: str | os.PathLike[str], mesh: jax.sharding.Mesh | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, Params]:
    """Read a GGUF file.

    Args:
      path: the file.
      mesh: placement of the parameters; None is the default device.
      dtype: of the parameters in memory.

    Returns:
      The model config and the parameters (see models/qwen.py).

    Raises:
      UserError: no GGUF file, another architecture, or a tensor that is unknown, missing or misshaped.
    """
    reader = _open(path)
    config = _config(reader, path)
    names = _names(reader, config, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(key: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, where: Any = None) -> jax.Array:
        row = TABLE[path_name(key)]
        values = np.empty(leaf.shape, jnp.dtype(dtype))
        for tensor in tensors_of(path_name(key), leaf.shape):
            data = _dequantized(tensors[names[tensor.name]], tensor, config, path)
            values[tensor.index] = data.T if row.transposed else data
        return jax.device_put(values, where)

    places = () if mesh is None else (qwen.param_shardings(config, mesh),)
    return config, jax.tree_util.tree_map_with_path(read, abstract_params(config), *places)


def describe(path: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """Config and parameters as float32 ShapeDtypeStructs; reads no weights."""
    reader = _open(path)
    config = _config(reader, path)
    _names(reader, config, path)
    return config, abstract_params(config)


def _open(path: str | os.PathLike[str]) -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("gguf: not installed; run pip install 'open_agentrl_jax[gguf]'") from None
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path}: missing; give a GGUF file")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path}: no readable GGUF file ({error}); download it again") from None


def _field(reader: Any, name: str, default: Any = None) -> Any:
    field = reader.fields.get(name)
    return default if field is None else field.contents()


def _config(reader: Any, path: Any) -> ModelConfig:
    kind = _field(reader, "general.architecture")
    if kind not in _ARCHITECTURES or _field(reader, f"{kind}.expert_count"):
        raise UserError(
            f"{path}: general.architecture: {kind!r} is not supported; use a dense model of type "
            f"{', '.join(_ARCHITECTURES)}"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(name: str, default: Any = None) -> Any:
        value = _field(reader, f"{kind}.{name}", default)
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.99999975e-06

    heads, width = field("attention.head_count"), field("embedding_length")
    stops = [_field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    hf: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else None,
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", width // heads if width and heads else None),
        "rope_theta": field("rope.freq_base", 10000.0),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon", 1e-5),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": kind != "qwen2" and "blk.0.attn_output.bias" in tensors,
        "max_position_embeddings": field("context_length", 32768),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({stop for stop in stops if stop is not None}) or None,
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }
    scaling = field("rope.scaling.type", "none")
    if _ROPE_FACTORS in tensors:
        hf["rope_scaling"] = _llama3(np.asarray(tensors[_ROPE_FACTORS].data, np.float32), hf, path)
    elif scaling != "none":
        original = field("rope.scaling.original_context_length")
        hf["rope_scaling"] = {"rope_type": scaling, "factor": field("rope.scaling.factor")}
        hf["rope_scaling"] |= {"original_max_position_embeddings": original} if original else {}
    try:
        return ModelConfig.from_hf(hf)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('config.json: ')}") from None


def _llama3(factors: np.ndarray, hf: dict[str, Any], path: Any) -> dict[str, Any]:
    """The scaling that the factors were computed from; the file does not name it."""
    scaling = {
        "factor": float(factors.max()),
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    plain, _ = rope.frequencies(hf["head_dim"], hf["rope_theta"], ())
    scaled, _ = rope.frequencies(hf["head_dim"], hf["rope_theta"], tuple(scaling.items()))
    if not np.allclose(plain / scaled, factors, rtol=1e-3):
        raise UserError(f"{path}: {_ROPE_FACTORS}: not the scaling of Llama 3; use the original Hugging Face folder")
    return scaling


def _names(reader: Any, config: ModelConfig, path: Any) -> dict[str, str]:
    """Hugging Face name -> name in the file, for all parameters."""
    import gguf

    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    table = gguf.get_tensor_name_map(architecture, config.num_layers)
    expected = [tensor.name for p, (_, shape) in rows(config).items() for tensor in tensors_of(p, shape)]
    names = {name: str(table.get_name(name, try_suffixes=(".weight", ".bias"))) for name in expected}
    there = {tensor.name for tensor in reader.tensors}
    if missing := [name for name in names.values() if name not in there]:
        raise UserError(f"{path}: {missing[0]}: missing; download the file again")
    if unknown := sorted(there.difference(names.values(), [_ROPE_FACTORS])):
        raise UserError(f"{path}: {unknown[0]}: unknown to a {config.model_type} model; use a dense text model")
    return names


def _dequantized(stored: Any, tensor: Tensor, config: ModelConfig, path: Any) -> np.ndarray:
    """One tensor as Hugging Face files hold it, float32."""
    import gguf

    try:
        values = gguf.quants.dequantize(stored.data, stored.tensor_type)
    except NotImplementedError:
        kind = stored.tensor_type.name
        raise UserError(f"{path}: {stored.name}: {kind} is not supported; use Q8_0, a K-quant or F16") from None
    if values.shape != tensor.shape:
        raise UserError(f"{path}: {stored.name}: shape {values.shape}, but the metadata imply {tensor.shape}")
    heads = {"layers/q": config.num_heads, "layers/k": config.num_kv_heads}.get(tensor.path.removesuffix("_bias"))
    if config.model_type != "llama" or heads is None:
        return values
    # llama.cpp rotates neighbours (2i, 2i + 1) where transformers rotates (i, i + D/2).
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def save_tokenizer(path: str | os.PathLike[str], folder: pathlib.Path) -> None:
    """Write the tokenizer and chat template of a GGUF file as Hugging Face files.

    Raises:
      UserError: a tokenizer that is not byte-level BPE, or an unknown way of splitting text.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    reader = _open(path)
    kind, split = (_field(reader, f"tokenizer.ggml.{name}", "default") for name in ("model", "pre"))
    if kind != "gpt2" or split not in _SPLITS:
        raise UserError(
            f"{path}: tokenizer.ggml.model {kind!r} with pre {split!r} is not supported; "
            "use the original Hugging Face folder"
        )
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocab = {token: number for number, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split == "llama-bpe"))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_SPLITS[split] is None)
    first: list[Any] = []
    if split == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif _SPLITS[split] is not None:
        first = [pre_tokenizers.Split(tokenizers.Regex(_SPLITS[split]), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*first, bytes_])  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    if split == "qwen2":
        made.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    types = _field(reader, "tokenizer.ggml.token_type", [])
    made.add_tokens(
        [
            tokenizers.AddedToken(token, special=of == _CONTROL, normalized=False)
            for token, of in zip(tokens, types, strict=False)
            if of in (_CONTROL, _USER_DEFINED)
        ]
    )
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: _field(reader, f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    special: dict[str, Any] = {f"{role}_token": tokens[number] for role, number in ids.items() if number is not None}
    if _field(reader, "tokenizer.ggml.add_bos_token", split == "llama-bpe") and ids["bos"] is not None:
        start = special["bos_token"]
        made.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, ids["bos"])]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)
    fast.chat_template = _field(reader, "tokenizer.chat_template")
    fast.save_pretrained(folder)
