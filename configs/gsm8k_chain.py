"""Collect, SFT, curate, RL, evaluate on real problem files with the quickstart's model: the chain of docs/data.md.

    python -m launch.collect --config=configs/gsm8k_chain.py --config.data.train=gsm8k_train.jsonl \
        --config.data.eval=gsm8k=gsm8k_test.jsonl

Hardware: a laptop, two CPU cores, a quarter of an hour for all five; runs/quickstart/export is where it begins.
Expected: every stage runs and its files are those of a large model; the accuracy of so small a one on GSM8K is that of
guessing (docs/data.md has the figures).
"""

from configs import quickstart
from open_agentrl_jax.config import Config


def get_config() -> Config:
    """The quickstart with room for real problems; paths of data are flags."""
    config = quickstart.get_config()
    config.name = "gsm8k_chain"
    config.model.path = "runs/quickstart/export"
    config.data.train, config.data.eval = "gsm8k_train.jsonl", "gsm8k=gsm8k_test.jsonl"
    config.data.sft, config.data.eval_limit = "runs/gsm8k_chain/collected/sft.parquet", 64
    # In the quickstart's 444 tokens half of the problems are longer than 340, half of the solutions longer than 300.
    config.agent.max_turns, config.agent.max_prompt, config.agent.max_response = 9, 512, 512
    config.sft.steps, config.sft.batch_size, config.sft.max_length = 200, 16, 1024
    config.rl.steps, config.rl.min_accuracy = 3, 0.0
    config.packing.rows, config.packing.length = 4, 0
    config.rollout.slots = 64
    return config
