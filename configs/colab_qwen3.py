"""GRPO-TCR on Qwen3-0.6B with GSM8K, for one accelerator of 16 GB: launch/notebooks/colab_qwen3.ipynb runs it.

    python -m launch.train --config=configs/colab_qwen3.py --config.data.train=gsm8k_train.parquet

Hardware: one TPU v5e chip or GPU of 16 GB (float32 weights, gradients and moments take 9 GB of it).
Expected: nothing is promised; it was run with a tiny model on CPU only.
"""

from open_agentrl_jax.config import (
    RL,
    Agent,
    Checkpoint,
    Config,
    Data,
    Eval,
    Loss,
    Model,
    Optim,
    Packing,
    Reward,
    Rollout,
)


def get_config() -> Config:
    """The experiment; the path of the training problems is a flag."""
    return Config(
        name="colab_qwen3",
        model=Model(path="Qwen/Qwen3-0.6B", remat="full"),
        data=Data(train="gsm8k_train.parquet", eval="gsm8k", eval_limit=64),
        rl=RL(
            steps=30,
            prompts=8,
            samples=8,
            mini_batches=2,
            loss=Loss(clip_low=0.2, clip_high=0.28, dual_clip=10.0, aggregate="token-mean"),
            optim=Optim(lr=1e-6, weight_decay=0.01),
        ),
        packing=Packing(rows=1),
        agent=Agent(max_turns=4, max_prompt=512, max_response=1024, max_tool_tokens=256),
        reward=Reward(overlong_buffer=256),
        rollout=Rollout(slots=8),
        eval=Eval(every=15),
        checkpoint=Checkpoint(every=15, keep=1),
    )
