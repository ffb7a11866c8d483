"""Generated word problems of one or two operations, and imperfect demonstrations that always call the tool.

The level of a problem is its number of operations. A hash of its numbers and operations decides whether a problem is
held out, so evaluation never meets a training problem. Some demonstrations write the right program; others skip an
operation, omit parentheses or do not parse. RL discovers which of these habits pays.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence

from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.types import Message, Task, ToolCall

ACTIONS = {
    "+": ("finds {b} more", "buys {b} more", "wins {b}"),
    "-": ("loses {b}", "gives away {b}", "sells {b}"),
    "*": ("makes {b} times as many", "multiplies them by {b}"),
}
NAMES = ("Ada", "Ben", "Cleo", "Dev", "Eva", "Finn")
THINGS = ("apples", "shells", "cards", "coins", "beads", "pens")
LEVELS = (1, 2)
HABITS = {"right": 0.5, "skip": 0.2, "no_parentheses": 0.15, "bad_syntax": 0.15}
HELD_OUT = 8  # one of so many problems is held out
LIMIT = 2000
TRAIN_PROBLEMS, EVAL_PROBLEMS, DEMONSTRATIONS = 4096, 256, 1536

Step = tuple[str, int]  # an operation and its second operand


def expression(first: int, steps: Sequence[Step], *, parentheses: bool = True) -> str:
    """The steps from left to right as one Python expression, with the parentheses that precedence needs."""
    text, is_sum = str(first), False
    for operation, number in steps:
        if operation == "*" and is_sum and parentheses:
            text, is_sum = f"({text})", False
        text = f"{text} {operation} {number}"
        is_sum = is_sum or operation != "*"
    return text


def problem(rng: random.Random, level: int, *, evaluation: bool) -> Task:
    """A problem with `level` operations of the given side of the split."""
    while True:
        first, steps = rng.randint(10, 99), []
        value, values = first, [first]
        for _ in range(level):
            operation = rng.choice(list(ACTIONS))
            number = rng.randint(2, 9) if operation == "*" else rng.randint(10, 99)
            value = {"+": value + number, "-": value - number, "*": value * number}[operation]
            steps.append((operation, number))
            values.append(value)
        key = expression(first, steps).replace(" ", "")
        side = hashlib.sha256(key.encode()).digest()[0] % HELD_OUT == 0
        if side == evaluation and all(0 < v < LIMIT for v in values):
            break
    told = [rng.choice(ACTIONS[operation]).format(b=number) for operation, number in steps]
    story = f"{rng.choice(NAMES)} has {first} {rng.choice(THINGS)}, then {', then '.join(told)}. How many now?"
    return Task(
        id=key,
        messages=[Message("user", story)],
        answer=str(value),
        source="multistep",
        extra={"first": first, "steps": steps, "level": level},
    )


def problems(seed: int, count: int, *, evaluation: bool = False) -> list[Task]:
    """`count` different problems; the levels take turns."""
    rng = random.Random(f"multistep:{seed}:{evaluation}")
    found: dict[str, Task] = {}
    while len(found) < count:
        task = problem(rng, LEVELS[len(found) % len(LEVELS)], evaluation=evaluation)
        found.setdefault(task.id, task)
    return list(found.values())


async def demonstrations(seed: int, count: int, run_tool: Callable[[ToolCall], Awaitable[str]]) -> list[list[Message]]:
    """Conversations about training problems, with the habits of HABITS; every tool output is a real one.

    Args:
        seed: determines everything but the outputs.
        count: number of conversations.
        run_tool: runs a call and returns the text that the model sees.
    """
    rng = random.Random(f"multistep:{seed}:demonstrations")

    async def one(draw: random.Random, level: int) -> list[Message]:
        task = problem(draw, level, evaluation=False)
        habit = draw.choices(list(HABITS), list(HABITS.values()))[0]
        call = ToolCall(PythonTool.name, {"code": program(draw, task, habit)})
        output = await run_tool(call)
        said = str(task.extra["first"]) if habit == "bad_syntax" else output.strip()
        answer = Message("assistant", f"\\boxed{{{said}}}")
        return [*task.messages, Message("assistant", "", [call]), Message("tool", output), answer]

    made = [one(random.Random(rng.random()), LEVELS[i % len(LEVELS)]) for i in range(count)]
    return list(await asyncio.gather(*made))


def program(rng: random.Random, task: Task, habit: str) -> str:
    """The program that a demonstration with this habit runs."""
    steps = list(task.extra["steps"])
    if habit == "skip":
        del steps[rng.randrange(len(steps))]
    text = f"print({expression(task.extra['first'], steps, parentheses=habit != 'no_parentheses')}"
    return text if habit == "bad_syntax" else text + ")"
