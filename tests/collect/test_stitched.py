"""GSM8K's calculator annotations as tool calls."""

import pathlib
from fractions import Fraction

import pytest

from open_agentrl_jax.collect.stitched import NotStitchable, evaluate, stitch
from open_agentrl_jax.data import synthetic
from open_agentrl_jax.data.prompts import read_tasks
from open_agentrl_jax.types import Message, Task

SAMPLE = pathlib.Path(__file__).parents[1] / "launch" / "problems.jsonl"
REAL = pathlib.Path(__file__).parents[3] / "shared" / "data" / "problems" / "gsm8k_train.jsonl"


def task(solution, answer="72"):
    return Task("t", [Message("user", "q")], answer, "gsm8k", {"problem": "q", "solution": solution})


def test_each_annotation_becomes_a_call_and_nothing_else_changes():
    s = stitch(task("In April 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72 clips."))
    said = [(m.role, m.content, [c.arguments["code"] for c in m.tool_calls]) for m in s.conversation.messages]
    assert said == [
        ("user", "q", []),
        ("assistant", "In April 48/2 =", ["print(48/2)"]),
        ("tool", "24", []),
        ("assistant", "24 clips.\nIn all 48+24 =", ["print(48+24)"]),
        ("tool", "72", []),
        ("assistant", "72 clips.\nThe answer is \\boxed{72}.", []),
    ]
    assert s.calls == s.succeeded == 2 and s.columns["tool_calls"] == 2


@pytest.mark.parametrize(
    ("expression", "code"),
    [
        ("$1,200*.05=60", "print(1200*.05)"),
        ("3x4=12", "print(3*4)"),
        ("05+2=7", "print(5+2)"),
        ("6÷4=1.5", "print(6/4)"),
    ],
)
def test_notation_becomes_python(expression, code):
    assert stitch(task(f"so <<{expression}>>")).conversation.messages[1].tool_calls[0].arguments["code"] == code


@pytest.mark.parametrize(
    ("solution", "reason"),
    [
        ("", "no_solution"),
        ("plain words", "no_annotation"),
        ("<<2a=4>>4", "no_arithmetic"),
        ("<<__import__('os')=1>>1", "no_arithmetic"),
        ("<<9**9**9=1>>1", "no_arithmetic"),
        ("<<1/0=1>>1", "no_arithmetic"),
        ("<<" + "(" * 5000 + "=1>>1", "no_arithmetic"),
        ("<<2+2=5>>5", "wrong_annotation"),
    ],
)
def test_what_cannot_be_stitched_is_named(solution, reason):
    with pytest.raises(NotStitchable, match=reason):
        stitch(task(solution))


def test_arithmetic_is_exact():
    assert evaluate("0.1+0.2") == Fraction(3, 10) and evaluate("-(2-5)*4/6") == 2
    assert evaluate("7//2") == 3 and evaluate("1_0") is not None and evaluate("True") is None


def test_rows_of_a_file_and_generated_problems_can_be_stitched():
    for source in (read_tasks(SAMPLE), synthetic.problems(0, 50)):
        for problem in source:
            final = stitch(problem).conversation.messages[-1].content
            assert final.endswith(f"\\boxed{{{problem.answer}}}.")


@pytest.mark.skipif(not REAL.exists(), reason="GSM8K is not part of the project")
def test_nearly_all_of_gsm8k_can_be_stitched():
    made = failed = 0
    for problem in read_tasks(REAL):
        try:
            stitch(problem)
            made += 1
        except NotStitchable:
            failed += 1
    assert made > 0.98 * (made + failed)
