"""A small model teaches itself on real problem files: collect, SFT, curate, RL, evaluate; the chain of docs/data.md.

    python -m launch.sft --config=configs/gsm8k_chain.py --config.data.sft=stitched/sft.parquet \
        --config.run_dir=runs/gsm8k_chain/warm

Hardware: a laptop, two CPU cores, no download, a quarter of an hour; runs/quickstart/export is where it begins.
Expected: the teacher is right in one try of a hundred; docs/data.md has the figures.
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
    # Spelled in letters, as the quickstart's tokenizer does it, the template is longer than the problem: 190 tokens.
    config.data.format = "bare"
    config.agent.max_turns, config.agent.max_prompt, config.agent.max_response = 9, 384, 384
    config.sft.steps, config.sft.batch_size, config.sft.max_length = 500, 8, 768
    config.rl.steps, config.rl.min_accuracy = 4, 0.0
    config.packing.rows, config.packing.length = 1, 0
    # A small model errs less where it is surer: one temperature for teacher, policy and evaluation.
    config.rollout.temperature = config.eval.temperature = 0.7
    return config
