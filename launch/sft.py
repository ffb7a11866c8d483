"""SFT alone, exported as a Hugging Face folder.

    python -m launch.sft --config=configs/qwen3_4b_sft.py

It is the first phase of launch.train: it stops, continues and writes its run directory in the same way.
"""

from __future__ import annotations

from launch import command, train
from open_agentrl_jax.config import Config
from open_agentrl_jax.types import UserError


def only_sft(config: Config) -> Config:
    """The config without its RL phase."""
    if not (config.sft.steps or config.sft.epochs):
        raise UserError(f"config {config.name!r}: sft.steps and sft.epochs are both 0; set one of them")
    config.rl.steps = config.rl.epochs = 0
    return config


if __name__ == "__main__":
    load = command.config_flag()
    profile = command.profile_flag()
    command.run(lambda: train.main(only_sft(load()), profile=profile.value))
