"""The data sets that are generated instead of read from a file, by the name that a config gives them.

Each module has `problems`, `demonstrations`, and the sizes TRAIN_PROBLEMS, EVAL_PROBLEMS and DEMONSTRATIONS.
"""

from typing import Any

from open_agentrl_jax.data import multistep, synthetic

GENERATED: dict[str, Any] = {"arithmetic": synthetic, "multistep": multistep}
