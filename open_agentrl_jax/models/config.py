"""The model config: the fields of a Hugging Face config.json that the forward pass needs, validated and hashable."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from open_agentrl_jax.models import rope
from open_agentrl_jax.storage import read_text
from open_agentrl_jax.types import UserError

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "full", "dots", "attention", "offload")
ATTENTION = ("auto", "plain", "blockwise", "splash", "splash_static", "triton", "cudnn")
RUN_TIME = (
    "compute_dtype",
    "reduce_dtype",
    "remat",
    "attention",
    "lora",
    "balance",
)  # how a model is run; not part of config.json

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Features that are not implemented: field -> the values that disable it.
_UNUSED = {
    "hidden_act": (None, "silu", "swish"),
    "mlp_bias": (None, False),
    "attention_dropout": (None, 0, 0.0),
    "quantization_config": (None,),
}
_BIAS_OPTIONAL = ("llama", "qwen3", "qwen3_moe")  # attention_bias adds biases to q, k, v and o
# Fields of mixtures of experts: name in config.json -> ours.
_MIXTURE = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_size",
    "norm_topk_prob": "norm_topk_prob",
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside frozen matrices: y = x W + scale (x A) B, with A [in r] and B [r out].

    `targets` are Hugging Face module names ("q_proj"); empty adapts every matrix of a layer. `rslora` divides by the
    square root of the rank (Kalajdzievski 2023). `int8` holds the frozen matrices of the layers in 8 bits.
    """

    rank: int
    alpha: float = 32.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    int8: bool = False

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def adapts(self, module: str) -> bool:
        """Whether the matrix of the module with this last name has an adapter."""
        return not self.targets or module in self.targets


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder: Qwen2.5, Qwen3, Qwen3-MoE, Llama or Mistral. The fields of RUN_TIME select how it runs.

    `remat` names what the backward pass recomputes: "none"; "full" (everything but each layer's input); "dots"
    (everything but matrix products); "attention" (everything but the attention output); "offload" (as "full", with the
    inputs in host memory). `reduce_dtype` "float32" sums the layers' gradients between devices in float32, "compute" in
    `compute_dtype`. `attention` is a backend of models/attention.py; "auto" chooses one. `rope_scaling` holds
    the non-default part of rope_parameters as sorted pairs, see models/rope.py. `lora` adds adapters to the parameters.
    With `num_experts` above 0 every layer is a mixture of experts of `expert_size` hidden units, `intermediate_size` is
    unused, and `balance` is the weight of the load-balance loss in training.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    attention_bias: bool = False
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    norm_topk_prob: bool = False
    compute_dtype: str = "float32"
    reduce_dtype: str = "compute"
    remat: str = "none"
    attention: str = "auto"
    lora: Lora | None = None
    balance: float = 0.0

    def __post_init__(self):
        _check(self)

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have a bias (always in Qwen2)."""
        return self.model_type == "qwen2" or self.attention_bias

    @property
    def o_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.attention_bias

    @property
    def qk_norm(self) -> bool:
        """Whether q and k are normalised per head (Qwen3)."""
        return self.model_type in ("qwen3", "qwen3_moe")

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | pathlib.Path, **run_time: Any) -> ModelConfig:
        """Read a config.json.

        Args:
          source: its contents, its path, or its folder.
          **run_time: the fields of RUN_TIME.

        Raises:
          UserError: a missing or malformed file or field, or an architecture or feature that is not implemented.
        """
        hf, where = (source, "config.json") if isinstance(source, Mapping) else _read(pathlib.Path(source))
        _refuse_unsupported(hf, where)
        if missing := [name for name in _REQUIRED if hf.get(name) is None]:
            raise UserError(f"{where}: {missing[0]}: missing; copy it from the model's original config.json")
        heads, eos = hf["num_attention_heads"], hf.get("eos_token_id")
        # transformers takes 128 where a Qwen3 config names no head_dim, and hidden / heads where a Qwen2 one does not.
        default_head_dim = 128 if hf["model_type"] == "qwen3" else _divide(hf["hidden_size"], heads, where)
        theta, scaling = rope.read(hf, where)
        fields: dict[str, Any] = {
            "model_type": hf["model_type"],
            "vocab_size": hf["vocab_size"],
            "hidden_size": hf["hidden_size"],
            "intermediate_size": hf["intermediate_size"],
            "num_layers": hf["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": _or(hf.get("num_key_value_heads"), heads),
            "head_dim": _or(hf.get("head_dim"), default_head_dim),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "attention_bias": bool(hf.get("attention_bias", False)),
            "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
            "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
            "max_position_embeddings": hf.get("max_position_embeddings", 32768),
            "initializer_range": hf.get("initializer_range", 0.02),
            "bos_id": hf.get("bos_token_id"),
            "eos_ids": tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
            "pad_id": hf.get("pad_token_id"),
        }
        if hf["model_type"] == "qwen3_moe":
            fields |= _mixture(hf, where)
        try:
            config = cls(**fields, **run_time)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        _refuse_windows(hf, where, config.num_layers)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, for transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
        hf = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta, **dict(self.rope_scaling)},
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_dropout": 0.0,
            "sliding_window": None,
            "use_cache": True,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            "pad_token_id": self.pad_id,
        }
        if self.model_type in _BIAS_OPTIONAL:
            hf["attention_bias"] = self.attention_bias
        if self.model_type.startswith("qwen"):
            hf["use_sliding_window"] = False
        if self.rope_scaling:
            hf["rope_scaling"] = dict(self.rope_scaling)
        if self.num_experts:
            hf |= {name: getattr(self, field) for name, field in _MIXTURE.items()}
            hf |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        return hf


def _read(path: pathlib.Path) -> tuple[dict[str, Any], str]:
    path = path / "config.json" if path.is_dir() else path
    try:
        hf = json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; give the folder of a Hugging Face model") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy the model's config.json again") from None
    if not isinstance(hf, dict):
        raise UserError(f"{path}: must hold one JSON object; copy the model's config.json again")
    return hf, str(path)


def _refuse_unsupported(hf: Mapping[str, Any], where: str) -> None:
    kind, supported = hf.get("model_type"), ", ".join(ARCHITECTURES)
    if kind not in ARCHITECTURES:
        raise UserError(f"{where}: model_type: {kind!r} is not supported; use a model of type {supported}")
    for name in hf.get("architectures") or ():
        if name != ARCHITECTURES[kind]:
            raise UserError(f"{where}: architectures: {name} is not supported; use {ARCHITECTURES[kind]}")
    unused_fields = _UNUSED if kind in _BIAS_OPTIONAL else _UNUSED | {"attention_bias": (None, False)}
    for field, unused in unused_fields.items():
        if hf.get(field) not in unused:
            raise UserError(f"{where}: {field}: {hf[field]!r} is not supported; use a model with {unused[-1]!r}")


def _refuse_windows(hf: Mapping[str, Any], where: str, layers: int) -> None:
    if hf["model_type"] == "mistral":
        # transformers assumes a window of 4096 where the field is missing.
        window = hf.get("sliding_window", 4096)
        if window is not None and window < hf.get("max_position_embeddings", 32768):
            raise UserError(f"{where}: sliding_window: {window} is not supported; use a model without windows (null)")
    by_layer = hf.get("layer_types")
    slides = "sliding_attention" in by_layer if by_layer else hf.get("max_window_layers", 28) < layers
    if hf.get("use_sliding_window") and hf.get("sliding_window") is not None and slides:
        raise UserError(f"{where}: use_sliding_window: sliding windows are not supported; set it to false")


def _mixture(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
        field = "mlp_only_layers" if hf.get("mlp_only_layers") else "decoder_sparse_step"
        raise UserError(f"{where}: {field}: dense layers between mixtures are not supported; use another model")
    # transformers writes num_local_experts, and leaves out what equals its defaults.
    count = _or(hf.get("num_experts"), _or(hf.get("num_local_experts"), 128))
    sizes = {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False}
    given = {"num_experts": count} | {name: _or(hf.get(name), default) for name, default in sizes.items()}
    return {field: given[name] for name, field in _MIXTURE.items()}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _divide(hidden: int, heads: int, where: str) -> int:
    if hidden % heads:
        raise UserError(f"{where}: hidden_size: {hidden} does not divide by num_attention_heads {heads}; add head_dim")
    return hidden // heads


def _check(c: ModelConfig) -> None:
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    ):
        value = getattr(c, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{field}: {value!r} must be a positive whole number")
    if c.model_type == "qwen3_moe" and not 0 < c.experts_per_token <= c.num_experts:
        raise UserError(f"num_experts_per_tok: {c.experts_per_token} must be from 1 to num_experts {c.num_experts}")
    if c.num_experts and c.expert_size < 1:
        raise UserError(f"moe_intermediate_size: {c.expert_size} must be a positive whole number")
    for field in ("rope_theta", "rms_norm_eps"):
        value = getattr(c, field)
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{field}: {value!r} must be a positive number")
    if c.num_heads % c.num_kv_heads:
        raise UserError(f"num_kv_heads: {c.num_kv_heads} must divide num_heads {c.num_heads}")
    if c.head_dim % 2:
        raise UserError(f"head_dim: {c.head_dim} must be even: rotary embeddings rotate pairs")
    kinds = {"model_type": tuple(ARCHITECTURES), "compute_dtype": DTYPES, "remat": REMAT, "attention": ATTENTION}
    for field, allowed in kinds.items():
        if getattr(c, field) not in allowed:
            raise UserError(f"{field}: {getattr(c, field)!r} is unknown; use one of {', '.join(allowed)}")
