"""The quickstart with somebody else's agent: a script with the `openai` package, its own loop and its own tool.

    pip install -e '.[servers]' openai
    python -m launch.train --config=configs/quickstart_harness.py

The agent (configs/agents/calculator.py) is a function of this process, because starting Python 19,200 times takes
longer than the training. As a command of its own per episode, confined to a directory:

    ... --config.agent.harness.function= --config.agent.harness.command="python configs/agents/calculator.py"

Hardware: a laptop, two CPU cores, no download.
Expected: as configs/quickstart.py.
"""

from configs import quickstart
from open_agentrl_jax.config import Config


def get_config() -> Config:
    """The experiment."""
    config = quickstart.get_config()
    config.name = "quickstart_harness"
    config.agent.harness.function = "configs.agents.calculator:agent"
    return config
