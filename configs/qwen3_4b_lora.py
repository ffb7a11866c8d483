"""GRPO-TCR on Qwen3-4B by LoRA at 8k tokens, training and generation on one chip of 16 GB.

    python -m launch.train --config=configs/qwen3_4b_lora.py --config.data.train=rl.parquet

Hardware: one TPU v5e chip. With `--config.model.lora.base=int8` update and cache fit by every count; without it they
  fit by the update's peak only (docs/models.md).
Expected: nothing is promised; the step was compiled for the chip, not run on it.
"""

from open_agentrl_jax.config import (
    RL,
    Agent,
    Checkpoint,
    Config,
    Data,
    Eval,
    LoRA,
    Loss,
    Model,
    Optim,
    Packing,
    Reward,
    Rollout,
)


def get_config() -> Config:
    """The experiment."""
    return Config(
        name="qwen3_4b_lora",
        # The learning rate is ten times that of full fine-tuning (docs/models.md).
        model=Model(path="Qwen/Qwen3-4B", remat="full", lora=LoRA(rank=32)),
        data=Data(train="rl.parquet", eval="aime_2024.jsonl"),
        rl=RL(
            steps=200,
            prompts=8,
            samples=8,
            mini_batches=2,
            loss=Loss(clip_low=0.2, clip_high=0.28, dual_clip=10.0, aggregate="token-mean"),
            optim=Optim(lr=1e-5, weight_decay=0.0),
        ),
        packing=Packing(rows=1),
        agent=Agent(max_turns=8, max_prompt=1024, max_response=7168, max_tool_tokens=1024),
        reward=Reward(overlong_buffer=1024),
        rollout=Rollout(slots=2),
        eval=Eval(every=50, samples=4),
        checkpoint=Checkpoint(every=10, keep=2),
    )
