"""A 0.5 M parameter agent learns, from nothing, to answer word problems with a Python tool.

    python -m launch.train --config=configs/quickstart.py

Hardware: a laptop, two CPU cores, no download.
Expected: held-out accuracy at most 0.5 after SFT (most demonstrations are wrong on purpose), at least 0.9 after RL.
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
    NewModel,
    Optim,
    Packing,
    Reward,
    Rollout,
    Sandbox,
)


def get_config() -> Config:
    """The experiment."""
    return Config(
        name="quickstart",
        # Larger initial weights and faster rotary angles than a big model has: copying is learned in half the steps.
        model=Model(new=NewModel(initializer_range=0.08, rope_theta=1e4)),
        data=Data(train="arithmetic", eval="arithmetic", sft="arithmetic"),
        sft=SFT(
            steps=320,
            batch_size=32,
            max_length=128,
            optim=Optim(lr=3e-3, b2=0.95, schedule="cosine", warmup=20),
        ),
        rl=RL(
            steps=75,
            prompts=16,
            samples=8,
            mini_batches=2,
            min_accuracy=0.1,
            loss=Loss(old_logprobs="rollout"),
            optim=Optim(lr=3e-4, b2=0.99, schedule="cosine"),
        ),
        packing=Packing(rows=4, length=192),  # two trajectories a row
        agent=Agent(max_turns=3, max_prompt=64, max_response=112, max_tool_tokens=24, seconds=60.0),
        reward=Reward(overlong_buffer=0),
        sandbox=Sandbox(timeout=5.0, memory_mb=512),
        rollout=Rollout(slots=128, decode_chunk=8),
        eval=Eval(samples=2),
        checkpoint=Checkpoint(every=20, keep=2),
    )
