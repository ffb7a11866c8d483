"""SFT alone, exported as a Hugging Face folder.

    python -m launch.sft --config=configs/qwen3_4b_sft.py

It is the first phase of launch.train, with the same run directory, and stops and continues in the same way.
"""

from __future__ import annotations

from launch import command
from open_agentrl_jax.config import Config
from open_agentrl_jax.run.experiment import run_experiment


def only_sft(config: Config) -> None:
    """Removes the RL phase from a config."""
    if not (config.sft.steps or config.sft.epochs):
        command.refuse(f"config {config.name!r}: sft.steps and sft.epochs are both 0; set one of them")
    config.rl.steps = config.rl.epochs = 0


if __name__ == "__main__":
    load = command.config_flag(only_sft)
    profile = command.profile_flag()
    command.run(lambda: run_experiment(load(), profile=profile.value))
