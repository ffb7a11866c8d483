"""Tiny random models of transformers."""

from typing import Any


def torch_model(model_type: str, *, rope_theta: float = 1e6, head_dim: int | None = None, **changes: Any):
    """A causal language model whose every parameter, norms and biases too, is random."""
    import torch
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},  # changes may replace it
        "eos_token_id": 3,
        **({"head_dim": head_dim} if head_dim else {}),
        **changes,
    }
    if model_type == "mistral":
        shape["sliding_window"] = None
    name = "".join(part.capitalize() for part in model_type.split("_"))
    config = getattr(transformers, f"{name}Config")(**shape)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
