# ruff: noqa: E501
"""The table of graders: each problem is graded by the grader that its own row names."""

import asyncio
import json

import pytest

from open_agentrl_jax.data.prompts import read_tasks, write_tasks
from open_agentrl_jax.rewards.graders import GRADERS, check_truth, grade
from open_agentrl_jax.sandbox.client import Result
from open_agentrl_jax.text import read_literal
from open_agentrl_jax.types import Task, UserError
from tests.data.test_rows import jsonl


class Doubler:
    """Stands in for a sandbox in which every program prints twice its input, or that is gone."""

    status = "finished"

    async def run(self, code, *, stdin="", timeout=30.0, memory_mb=2048):
        return Result(self.status, 0, f"{2 * int(stdin)}\n" if self.status == "finished" else "", "", 0.0)

    async def close(self):
        pass


def graded(task, text, sandbox=None):
    return asyncio.run(grade(task, text, sandbox=sandbox or Doubler()))


PROGRAM = "```python\nprint(2 * int(input()))\n```"
ROWS = [
    {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    {"problem": "Which?\n(A) x (B) y (C) z (D) w", "domain": "Physics", "solution": "\\boxed{B}"},
    {
        "question_content": "Double it.",
        "question_id": "7",
        "public_test_cases": "[]",
        "private_test_cases": '[{"input": "3", "output": "6"}, {"input": "-1", "output": "-2"}]',
    },
]
GOOD = {"math": "So \\boxed{4.0}.", "choice": "It is \\boxed{(b)}.", "code": PROGRAM}
BAD = {"math": "So \\boxed{5}.", "choice": "It is \\boxed{A}.", "code": "no program"}


def test_a_mixed_file_is_graded_row_by_row(tmp_path):
    tasks = read_tasks(jsonl(tmp_path / "mixed.jsonl", ROWS))
    assert [task.extra["grader"] for task in tasks] == list(GRADERS)
    for task in tasks:
        kind = task.extra["grader"]
        right, wrong = graded(task, GOOD[kind]), graded(task, BAD[kind])
        assert (right.accuracy, wrong.accuracy, right.status) == (1.0, 0.0, "graded"), kind
        assert right.score > wrong.score


def test_a_program_is_judged_by_its_tests_and_a_lost_sandbox_is_no_wrong_answer():
    tests = {"inputs": ["3", "5"], "outputs": ["6", "11"]}
    task = Task("t", [], tests, extra={"grader": "code"})
    half = graded(task, PROGRAM)
    assert (half.score, half.accuracy) == (0.5, 0.0)
    gone = Doubler()
    gone.status = "infrastructure"
    assert graded(task, PROGRAM, gone).status == "failed"


def test_any_of_several_answers_is_right_and_an_unknown_grader_is_named():
    assert graded(Task("t", [], ["1/2", "0.25"]), "\\boxed{0.25}").accuracy == 1.0
    with pytest.raises(UserError, match=r"problem t: its grader 'essay' is unknown; use one of math, choice, code"):
        graded(Task("t", [], "4", extra={"grader": "essay"}), "4")


TRUTHS = {
    '{"import_prefix": "", "test_code": "def check(candidate):\\n    assert candidate(1) == 2", "entry_point": "f"}': "",
    "{'inputs': ['1 2\\n'], 'outputs': ['3\\n']}": "",
    '{"fn_name": "f", "inputs": ["1"], "outputs": ["2"]}': "",
    '{"target": ["Ada"]}': "the math grader needs text, not an object with target; name a grader of your own",
    '{"target": 24, "numbers": [3, 8]}': "not an object with target, numbers",
    '{"inputs": ["1"], "outputs": []}': "1 inputs but 0 outputs",
    '{"test_code": "def check(candidate):\\n    assert candidate(1) == 2"}': "entry_point is missing",
}


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("as_text", [True, False])
def test_a_truth_that_no_grader_understands_is_a_bad_row(tmp_path, truth, as_text):
    answer = truth if as_text else read_literal(truth)
    row = {"data_source": "nq", "prompt": "Who?", "ability": "qa", "reward_model": {"ground_truth": answer}}
    good = {"question": "2+2?", "answer": "#### 4"}
    tasks = read_tasks(jsonl(tmp_path / "rows.jsonl", [good, row]))
    if TRUTHS[truth]:
        assert len(tasks) == 1 and TRUTHS[truth] in tasks.skipped[0] and "row 2" in tasks.skipped[0]
        assert len(read_tasks(tmp_path / "rows.jsonl", check=False)) == 2, "a grader of the user's own takes any truth"
    else:
        assert [task.extra["grader"] for task in tasks] == ["math", "code"]
        assert bool(tasks[1].extra.get("tests_are_text")) is as_text


def test_tests_as_text_stay_text_for_the_published_grader(tmp_path):
    tests = {"fn_name": "f", "inputs": ["1"], "outputs": ["2"]}
    rows = [
        {"data_source": "code", "prompt": "Double.", "reward_model": {"ground_truth": truth}}
        for truth in (json.dumps(tests), tests)
    ]
    tasks = list(read_tasks(jsonl(tmp_path / "rows.jsonl", rows)))
    write_tasks(tmp_path / "rows.parquet", tasks)
    for read in (tasks, list(read_tasks(tmp_path / "rows.parquet"))):
        assert [task.answer for task in read] == [tests, tests]
        scores = [
            asyncio.run(grade(t, "```python\ndef f(n): return n\n```", sandbox=Echo(), mode="reference")) for t in read
        ]
        assert [score.score for score in scores] == [1.0, -1.0]


class Echo(Doubler):
    """Every program prints 2."""

    async def run(self, code, *, stdin="", timeout=30.0, memory_mb=2048):
        return Result("finished", 0, "2\n", "", 0.0)


@pytest.mark.parametrize(
    ("grader", "truth", "reason"),
    [
        ("math", "5", ""),
        ("math", 5, ""),
        ("math", ["1/2", "0.5"], ""),
        ("math", [], "empty"),
        ("math", ["", "5"], "empty"),
        ("math", {"a": 1}, "an object with a"),
        ("math", True, "a value of type bool"),
        ("choice", "(B)", ""),
        ("choice", "42", "needs a letter, not '42'"),
        ("code", "42", "must be an object, not int"),
    ],
)
def test_which_truths_a_grader_takes(grader, truth, reason):
    assert (reason in check_truth(grader, truth)) if reason else check_truth(grader, truth) == ""
