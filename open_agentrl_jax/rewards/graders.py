"""The graders by name, as `task.extra["grader"]` names them, behind one signature.

math    a value in a box                rewards.math, in a thread
choice  a letter                        rewards.choice
code    a program, run on its tests     rewards.code, in the sandbox
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from open_agentrl_jax.rewards import choice, code, math
from open_agentrl_jax.rewards.code_tests import read_tests
from open_agentrl_jax.sandbox.client import Sandbox
from open_agentrl_jax.types import Score, Task, UserError


async def _math(task: Task, text: str, sandbox: Sandbox, mode: str) -> Score:
    truth = task.answer if isinstance(task.answer, list) else str(task.answer)
    return await asyncio.to_thread(math.grade, text, truth, mode=mode)  # a hard expression may take seconds


async def _choice(task: Task, text: str, sandbox: Sandbox, mode: str) -> Score:
    return choice.grade(text, str(task.answer), mode=mode)


async def _code(task: Task, text: str, sandbox: Sandbox, mode: str) -> Score:
    tests = task.answer
    if mode == "reference" and task.extra.get("tests_are_text") and isinstance(tests, dict):
        tests = json.dumps(tests)  # the published code treats tests that are text differently from an object
    return await code.grade(text, tests, sandbox=sandbox, mode=mode)


GRADERS: dict[str, Callable[[Task, str, Sandbox, str], Awaitable[Score]]] = {
    "math": _math,
    "choice": _choice,
    "code": _code,
}


async def grade(task: Task, text: str, *, sandbox: Sandbox, mode: str = "robust") -> Score:
    """Grades the final message of an episode with the grader of its problem, `math` by default.

    Args:
        task: `answer` holds the truth (math: text or a list of alternatives; choice: a letter; code: the tests).
        text: the final message.
        sandbox: where programs run.
        mode: "robust" | "reference".

    Raises:
        UserError: the task names no known grader.
    """
    kind = task.extra.get("grader", "math")
    if kind not in GRADERS:
        raise UserError(f"problem {task.id}: its grader {kind!r} is unknown; use one of {', '.join(GRADERS)}")
    return await GRADERS[kind](task, text, sandbox, mode)


def check_truth(grader: str, truth: Any) -> str:
    """Why a grader cannot grade against `truth`; "" where it can.

    Args:
        grader: a name of GRADERS.
        truth: the right answer as the row holds it.
    """
    if grader == "code":
        try:
            read_tests(truth)
        except ValueError as error:
            return str(error)
        return ""
    alternatives = truth if isinstance(truth, list) else [truth]
    if odd := next((t for t in alternatives if not isinstance(t, str | int | float) or isinstance(t, bool)), None):
        keys = f" with {', '.join(map(str, odd))}" if isinstance(odd, dict) else ""
        return f"the {grader} grader needs text, not {_name_of(odd)}{keys}; name a grader of your own in reward.grader"
    if not alternatives or not all(str(t).strip() for t in alternatives):
        return "the answer is empty"
    if grader == "choice" and not choice.letter(str(truth)):
        return f"the choice grader needs a letter, not {str(truth)[:80]!r}"
    return ""


def _name_of(value: Any) -> str:
    return "an object" if isinstance(value, dict) else f"a value of type {type(value).__name__}"
