"""The whole recipe: SFT warm start, GRPO-TCR, evaluation, export.

    python -m launch.train --config=configs/quickstart.py

The same command continues a run that was stopped or killed; open_agentrl_jax/run/experiment.py says how.
"""

from __future__ import annotations

from launch import command
from open_agentrl_jax.run.experiment import run_experiment

if __name__ == "__main__":
    load = command.config_flag()
    profile = command.profile_flag()
    command.run(lambda: run_experiment(load(), profile=profile.value))
