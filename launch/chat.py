"""Talk to a trained agent: its answer streams, its tool calls run in the sandbox and are shown.

    python -m launch.chat --model=runs/quickstart/export
    python -m launch.chat --model=runs/quickstart/export --serve=8009      # an OpenAI-compatible endpoint

In the conversation: /reset forgets it, /save FILE writes it as JSON, /quit (or Ctrl-D) leaves; Ctrl-C stops an answer.
Budgets and sandbox are those of the run that the model lies in, else the defaults of config.py; --max_response and
--max_turns change the budgets.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.syntax import Syntax

from launch import command
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run.players import seed_of
from open_agentrl_jax.serve.agent import Agent, open_agent
from open_agentrl_jax.serve.streaming import Event, Listener
from open_agentrl_jax.types import Message, Sampling, UserError

MODEL = flags.DEFINE_string("model", "", "a Hugging Face folder, e.g. runs/quickstart/export, or a Hub id")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "of sampling; 0: the likeliest token", lower_bound=0.0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "of sampling", lower_bound=0.0, upper_bound=1.0)
SEED = flags.DEFINE_integer("seed", 0, "of sampling")
SLOTS = flags.DEFINE_integer("slots", 8, "answers generated at once (--serve)")
SERVE = flags.DEFINE_integer(
    "serve", -1, "serve an OpenAI-compatible endpoint on this port (0: any free one)", lower_bound=-1, upper_bound=65535
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "with --serve; beyond loopback CHAT_TOKEN must be set")
MAX_RESPONSE = flags.DEFINE_integer("max_response", 0, "tokens of an answer, tool outputs included; 0: the run's")
MAX_TURNS = flags.DEFINE_integer("max_turns", 0, "assistant turns of an answer; 0: the run's")


def printer(console: Console) -> Listener:
    """Shows events in the terminal."""
    state = {"column": False}

    async def listen(event: Event) -> None:
        if event.kind == "text":
            console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
            state["column"] = not event.text.endswith("\n")
            return
        if state["column"]:
            console.print()
            state["column"] = False
        if event.kind == "call":
            console.print(Syntax(event.text, "python", background_color="default", word_wrap=True))
        else:
            for line in event.text.splitlines() or [""]:
                console.print(f"  │ {line}", style="green", markup=False, highlight=False, soft_wrap=True)

    return listen


def talk(agent: Agent, loop: EventLoop, console: Console) -> None:
    """The conversation, until its end."""
    history: list[Message] = []
    sampling = Sampling(0, TEMPERATURE.value, TOP_P.value)
    listen = printer(console)
    while True:
        try:
            said = console.input("[bold]you> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            return console.print()
        name, _, argument = said.partition(" ")
        if name == "/quit":
            return
        if name == "/reset":
            history = []
            console.print("forgotten")
        elif name == "/save":
            path = Path(argument.strip() or "chat.json")
            try:
                path.write_text(json.dumps({"messages": [m.to_chat() for m in history]}, ensure_ascii=False, indent=1))
                console.print(f"saved: {path}", markup=False, highlight=False)
            except OSError as error:
                console.print(f"{path}: {error.strerror}; give another file", markup=False)
        elif name.startswith("/"):
            console.print("/reset  /save FILE  /quit")
        elif said:
            seed = seed_of(SEED.value, len(history))
            asked = [*history, Message("user", said)]
            future = loop.submit(agent.answer(asked, dataclasses.replace(sampling, seed=seed), listen))
            try:
                trajectory = future.result()
                history = [*asked, *trajectory.said]
                console.print()
                if trajectory.stop != "answer":
                    console.print(f"[{trajectory.stop}]", style="yellow", markup=False)
            except KeyboardInterrupt:
                future.cancel()
                console.print("\n[stopped; the question is forgotten]", style="yellow", markup=False)
            except UserError as error:
                console.print(str(error), style="yellow", markup=False)


def main() -> int:
    """The command."""
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
            talk(agent, loop, console)
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()
        loop.run(agent.world.close())
        loop.close()
    return 0


if __name__ == "__main__":
    command.run(main)
