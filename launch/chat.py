"""Talk to a trained agent: its answers stream, its tool calls run in the sandbox and are shown.

    python -m launch.chat --model=runs/quickstart/export
    python -m launch.chat --model=runs/quickstart/export --serve=8009      # an OpenAI-compatible endpoint

In the conversation, /reset forgets the history, /save FILE writes it as JSON, /quit or Ctrl-D leaves, and Ctrl-C stops
an answer. Budgets and sandbox are those of the run that the model lies in, else the defaults of config.py;
--max_response and --max_turns override them. --serve requires CHAT_TOKEN in the environment unless --host is loopback.
"""

from __future__ import annotations

import asyncio
import os

from absl import flags
from rich.console import Console

from launch import command
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run.chat_agent import open_agent
from open_agentrl_jax.serve.terminal import talk
from open_agentrl_jax.types import Sampling, UserError

MODEL = flags.DEFINE_string("model", "", "a Hugging Face folder, e.g. runs/quickstart/export, or a Hub id")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "sampling temperature; 0: greedy", lower_bound=0.0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "nucleus sampling", lower_bound=0.0, upper_bound=1.0)
SEED = flags.DEFINE_integer("seed", 0, "sampling seed")
SLOTS = flags.DEFINE_integer("slots", 8, "concurrent answers (--serve)")
SERVE = flags.DEFINE_integer(
    "serve", -1, "serve an OpenAI-compatible endpoint on this port (0: any free one)", lower_bound=-1, upper_bound=65535
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "with --serve; beyond loopback CHAT_TOKEN must be set")
MAX_RESPONSE = flags.DEFINE_integer("max_response", 0, "tokens per answer, tool outputs included; 0: as in the run")
MAX_TURNS = flags.DEFINE_integer("max_turns", 0, "assistant turns per answer; 0: as in the run")


def main() -> int:
    """Runs the command."""
    if not MODEL.value:
        raise UserError("--model is missing; give a Hugging Face folder, e.g. --model=runs/quickstart/export")
    console = Console(soft_wrap=True)
    slots = SLOTS.value if SERVE.value >= 0 else 1
    agent, engine = open_agent(MODEL.value, slots=slots, max_response=MAX_RESPONSE.value, max_turns=MAX_TURNS.value)
    loop = EventLoop()
    try:
        if SERVE.value >= 0:
            from open_agentrl_jax.serve import endpoint

            spec = endpoint.Spec(HOST.value, SERVE.value, os.environ.get("CHAT_TOKEN", ""), TEMPERATURE.value)
            asyncio.run(endpoint.serve(agent, spec))
        else:
            console.print(f"{agent.name}: /reset, /save FILE, /quit", markup=False, highlight=False)
            talk(agent, loop, console, Sampling(0, TEMPERATURE.value, TOP_P.value, seed=SEED.value))
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()
        loop.run(agent.world.close())
        loop.close()
    return 0


if __name__ == "__main__":
    command.run(main)
