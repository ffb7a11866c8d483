"""GRPO-TCR on Qwen3-30B-A3B, a mixture of 128 experts; the numbers are those of the 4B model.

    python -m launch.train --config=configs/qwen3_30b_a3b_grpo_tcr.py (with the paths of qwen3_4b_grpo_tcr.py)

Hardware: a TPU v5p-64 slice or larger for training; see docs/scaling.md. SGLang servers for rollouts.
Expected: not run here.
"""

from configs import qwen3_4b_grpo_tcr
from open_agentrl_jax.config import Config


def get_config() -> Config:
    """GRPO-TCR with what differs."""
    config = qwen3_4b_grpo_tcr.get_config()
    config.name = "qwen3_30b_a3b_grpo_tcr"
    config.model.path = "Qwen/Qwen3-30B-A3B-Instruct-2507"
    config.mesh.expert = 8
    return config
