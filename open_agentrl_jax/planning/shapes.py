"""Shapes of the models that the configs train, for machines that do not hold the model itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from open_agentrl_jax.config import Config
from open_agentrl_jax.models import peft
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.types import UserError

# As in the config.json of each model.
_QWEN = {"head_dim": 128, "rms_norm_eps": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_4b": _QWEN
    | {"model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_layers": 36, "num_heads": 32}
    | {"num_kv_heads": 8, "vocab_size": 151936, "rope_theta": 5e6, "tie_word_embeddings": True},
    "qwen3_30b_a3b": _QWEN
    | {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_layers": 48, "num_heads": 32}
    | {"num_kv_heads": 4, "vocab_size": 151936, "rope_theta": 1e7, "tie_word_embeddings": False}
    | {"num_experts": 128, "experts_per_token": 8, "expert_size": 768, "norm_topk_prob": True},
    "qwen2_5_7b": _QWEN
    | {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_layers": 28, "num_heads": 28}
    | {"num_kv_heads": 4, "vocab_size": 152064, "rope_theta": 1e6, "tie_word_embeddings": False},
    "qwen3_0_6b": _QWEN
    | {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_layers": 28, "num_heads": 16}
    | {"num_kv_heads": 8, "vocab_size": 151936, "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3_1_7b": _QWEN
    | {"model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_layers": 28, "num_heads": 16}
    | {"num_kv_heads": 8, "vocab_size": 151936, "rope_theta": 1e6, "tie_word_embeddings": True},
}


def shape_of(config: Config, layers: int = 0) -> ModelConfig:
    """The model's shape: from the folder `model.path` if it exists, else from SHAPES by the config's name.

    Args:
      config: the experiment.
      layers: replaces the number of layers if positive.

    Raises:
      UserError: there is no such folder and no shape for the name.
    """
    dtype = config.model.compute_dtype
    runtime: dict[str, Any] = {
        name: getattr(config.model, name) for name in ("reduce_dtype", "remat", "attention", "balance")
    }
    runtime["compute_dtype"] = "bfloat16" if dtype == "auto" else dtype
    runtime["lora"] = peft.adapters_of(config.model.lora)
    if (Path(config.model.path) / "config.json").exists():
        model = ModelConfig.from_hf(config.model.path, **runtime)
    else:
        known = [shape for name, shape in SHAPES.items() if config.name.startswith(name)]
        if not known:
            raise UserError(
                f"model.path={config.model.path}: no config.json there, and no known shape for the config name "
                f"{config.name!r}; give the model's folder, or a name that starts with one of {', '.join(SHAPES)}"
            )
        model = ModelConfig(**known[0], **runtime)
    return dataclasses.replace(model, num_layers=layers) if layers else model
