"""The quickstart with rollouts from two real SGLang servers, which the run starts and stops itself.

    third_party/sglang/install.sh
    python -m launch.train --config=configs/quickstart_sglang.py

Hardware: two CPU cores and 6 GB: two servers of about 2 GB each beside the trainer.
Expected: the quickstart's accuracies, in about eight minutes: three processes share the cores.
"""

from configs import quickstart
from open_agentrl_jax.config import Config


def get_config() -> Config:
    """The quickstart with what differs."""
    config = quickstart.get_config()
    config.name = "quickstart_sglang"
    config.rollout.engine = "sglang"
    config.rollout.launch_servers = 2
    # Servers hold bfloat16 weights: the trainer's own log-probs are the old policy, theirs enter as importance weights.
    config.rl.loss.old_logprobs = "trainer"
    config.rl.loss.importance_level = "token"
    return config
