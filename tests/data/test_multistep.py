import asyncio
import collections
import random

from open_agentrl_jax.data import multistep
from open_agentrl_jax.types import ToolCall


async def run(call: ToolCall) -> str:
    try:
        return str(eval(call.arguments["code"].removeprefix("print"))) + "\n"
    except SyntaxError:
        return "SyntaxError"


def test_problems_are_reproducible_graded_and_held_out():
    tasks, held_out = multistep.problems(7, 400), multistep.problems(0, 128, evaluation=True)
    assert tasks == multistep.problems(7, 400)
    for part in (tasks, held_out):
        assert all(str(eval(multistep.expression(t.extra["first"], t.extra["steps"]))) == t.answer for t in part)
        levels = collections.Counter(t.extra["level"] for t in part)
        assert len(levels) == 2 and len(set(levels.values())) == 1
    assert not {t.id for t in tasks} & {t.id for t in held_out}


def test_the_expression_has_only_the_parentheses_that_it_needs():
    steps = [("*", 2), ("-", 10), ("*", 3), ("*", 4), ("+", 11)]
    assert multistep.expression(40, steps) == "(40 * 2 - 10) * 3 * 4 + 11"
    assert multistep.expression(40, steps, parentheses=False) == "40 * 2 - 10 * 3 * 4 + 11"


def test_demonstrations_always_call_and_answer_with_the_output():
    shown = asyncio.run(multistep.demonstrations(1, 1200, run))
    held_out = {t.messages[0].content for t in multistep.problems(0, 256, evaluation=True)}
    broken = 0
    for user, turn, output, answer in shown:
        assert [m.role for m in (user, turn, output, answer)] == ["user", "assistant", "tool", "assistant"]
        assert turn.tool_calls[0].arguments["code"].startswith("print(") and user.content not in held_out
        if output.content == "SyntaxError":
            broken += 1
        else:
            assert answer.content == f"\\boxed{{{output.content.strip()}}}"
    assert abs(broken / 1200 - multistep.HABITS["bad_syntax"]) < 0.03


def test_each_habit_makes_the_error_it_is_named_for():
    task = next(t for t in multistep.problems(0, 400) if [s[0] for s in t.extra["steps"]] == ["+", "*"])
    rng = random.Random(0)
    made = {habit: multistep.program(rng, task, habit) for habit in multistep.HABITS}
    values = {habit: asyncio.run(run(ToolCall("python", {"code": code}))).strip() for habit, code in made.items()}
    assert values["right"] == task.answer and values["bad_syntax"] == "SyntaxError"
    for habit in ("skip", "no_parentheses"):
        assert values[habit] not in (task.answer, "SyntaxError"), made
