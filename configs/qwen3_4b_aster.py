"""ASTER on Qwen3-4B: cold start on dense tool use, then GRPO with a stateful tool, 18k and then 32k tokens of context.

    python -m launch.sft --config=configs/qwen3_4b_aster.py --config.data.sft=dense.parquet
    python -m launch.train --config=configs/qwen3_4b_aster.py --config.sft.epochs=0 --config.data.sft= \
        --config.run_dir=runs/aster_18k --config.model.path=runs/qwen3_4b_aster/export
    python -m launch.curate --config=configs/qwen3_4b_aster.py --config.model.path=runs/aster_18k/export ...
    python -m launch.train --config=configs/qwen3_4b_aster.py --config.sft.epochs=0 --config.data.sft= \
        --config.run_dir=runs/aster_32k --config.model.path=runs/aster_18k/export \
        --config.agent.max_response=30720 --config.rl.epochs=6 --config.data.train=hard.parquet

Hardware: a TPU v5p-8 slice or larger for training, SGLang servers for rollouts.
Expected: the paper reports 90.0 on AIME 2025 with a budget of 90k tokens at inference (not run here).

From the paper (arXiv 2602.01204): the two contexts, the tool that keeps its state, a reward for the answer alone, and
4,000 demonstrations with more than nine calls on average. Every other number is from a public reproduction
(github.com/Rainyrou/ASTER), which states that it may differ from the original.
"""

from open_agentrl_jax.config import (
    RL,
    SFT,
    Agent,
    Checkpoint,
    Config,
    Data,
    Eval,
    Loss,
    Model,
    Optim,
    Packing,
    Python,
    Reward,
    Rollout,
)


def get_config() -> Config:
    """Cold start and first stage."""
    return Config(
        name="qwen3_4b_aster",
        model=Model(path="Qwen/Qwen3-4B-Thinking-2507", remat="full"),
        data=Data(train="rl.parquet", eval="aime_2025", sft="dense.parquet"),
        sft=SFT(epochs=6, batch_size=128, max_length=32768, optim=Optim(lr=3e-5, b2=0.95, warmup=0.06)),
        rl=RL(
            epochs=3,
            prompts=128,
            samples=8,
            mini_batches=2,
            loss=Loss(
                clip_low=0.2,
                clip_high=0.28,
                dual_clip=10.0,
                aggregate="token-mean",
                importance_level="token",
                importance_cap=2.0,
            ),
            optim=Optim(lr=1e-6),
        ),
        packing=Packing(rows=0),
        agent=Agent(max_turns=50, max_prompt=2048, max_response=16384, python=Python(persistent=True)),
        reward=Reward(overlong_buffer=0),
        rollout=Rollout(engine="sglang", servers=("http://127.0.0.1:30000",), temperature=1.0, top_p=1.0),
        eval=Eval(every=10, samples=16, temperature=1.0, top_p=1.0),
        checkpoint=Checkpoint(every=10, keep=3, keep_best=True),
    )
