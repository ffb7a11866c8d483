"""A conversation in the terminal: questions are typed, answers stream, calls and their outputs are shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax

from open_agentrl_jax.rollout.engine import seed_of
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.serve.streaming import Event, Listener, Responder
from open_agentrl_jax.text import printable
from open_agentrl_jax.types import Message, Sampling, UserError


def printer(console: Console) -> Listener:
    """A listener that prints events."""
    state = {"column": False}

    async def listen(event: Event) -> None:
        text = printable(event.text)
        if event.kind == "text":
            console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
            state["column"] = not text.endswith("\n")
            return
        if state["column"]:
            console.print()
            state["column"] = False
        if event.kind == "call":
            console.print(Syntax(text, "python", background_color="default", word_wrap=True))
        else:
            for line in text.splitlines() or [""]:
                console.print(f"  │ {line}", style="green", markup=False, highlight=False, soft_wrap=True)

    return listen


def talk(agent: Responder, loop: EventLoop, console: Console, sampling: Sampling) -> None:
    """Reads questions and prints answers until the user leaves; draws depend on `sampling.seed` and the history."""
    history: list[Message] = []
    listen = printer(console)
    while True:
        try:
            typed = console.input("[bold]you> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            return console.print()
        name, _, argument = typed.partition(" ")
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
        elif typed:
            seed = seed_of(sampling.seed, len(history))
            asked = [*history, Message("user", typed)]
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
