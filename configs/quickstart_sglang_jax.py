"""The quickstart with rollouts from two sglang-jax servers, SGLang for TPUs, which the run starts and stops itself.

    third_party/sglang_jax/install.sh                # Python 3.12
    python -m launch.train --config=configs/quickstart_sglang_jax.py

Hardware: two CPU cores and 6 GB; on a TPU VM: third_party/sglang_jax/README.md.
Expected: the quickstart's accuracies. The first minutes go to compilation in the servers.
"""

from configs import quickstart_sglang
from open_agentrl_jax.config import Config


def get_config() -> Config:
    """The quickstart on SGLang servers, with what differs."""
    config = quickstart_sglang.get_config()
    config.name = "quickstart_sglang_jax"
    config.rollout.server_kind = "sglang_jax"
    config.model.new.head_dim = 128  # the CPU attention of sglang-jax supports no smaller one
    config.model.new.num_heads = 1
    config.model.new.num_kv_heads = 1
    return config
