"""The published code grader, its faults included, beside the robust one."""

import json

import pytest

from open_agentrl_jax.rewards.code import grade
from open_agentrl_jax.sandbox.client import open_sandbox


def fenced(program, fence="python", close="\n```"):
    return f"```{fence}\n{program}{close}"


ADD = "def add(a, b): return a + b"
METHOD = "class Solution:\n    def add(self, a, b): return a + b"
CALLS = {"fn_name": "add", "inputs": ["1\n2"], "outputs": ["3"]}
PAIRS = {"inputs": [""], "outputs": ["3\n"]}
CHECK = {
    "import_prefix": "from math import *\n",
    "test_code": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 1",
    "entry_point": "Solution().add",
}
# (text, tests, published score, robust score)
VECTORS = {
    "a function, tests as text": (fenced(ADD), json.dumps(CALLS), 1, 1),
    "a method, tests as text": (fenced(METHOD), json.dumps(CALLS), 1, 1),
    "a function, tests as an object": (fenced(ADD), CALLS, -1, 1),
    "a method, tests as an object": (fenced(METHOD), CALLS, -1, 1),
    "a function that calls itself": (
        fenced("def f(n): return n and f(n - 1)"),
        json.dumps({"fn_name": "f", "inputs": ["1"], "outputs": ["0"]}),
        0,
        1,
    ),
    "no such function": (fenced("x = 1"), json.dumps(CALLS), -1, 0),
    "true is JSON and no Python": (
        fenced("def f(n): return n > 0"),
        '{"fn_name": "f", "inputs": ["1"], "outputs": [true]}',
        -1,
        1,
    ),
    "null is JSON and no Python": (fenced("print(3)"), '{"inputs": [""], "outputs": ["3"], "fn_name": null}', -1, 1),
    "a value that prints otherwise": (
        fenced("def f(n): return n / 2"),
        json.dumps({"fn_name": "f", "inputs": ["2"], "outputs": ["1"]}),
        0,
        1,
    ),
    "a Python literal": (fenced("print(3)"), str(PAIRS), 1, 1),
    "a line break at the end": (fenced("print(3)\nprint()"), PAIRS, 1, 1),
    "a space at the end": (fenced("print('3 ')"), PAIRS, 0, 1),
    "a line break at the beginning": (fenced("print()\nprint(3)"), PAIRS, 0, 1),
    "a float for an integer": (fenced("print(3.0)"), PAIRS, 0, 1),
    "another spelling of the fence": (fenced("print(3)", "py"), PAIRS, -1, 1),
    "a fence without a language": (fenced("print(3)", ""), PAIRS, -1, 1),
    "a fence that is not closed": (fenced("print(3)", close=""), PAIRS, -1, 1),
    "words after the language": (fenced("print(3)", "python title"), PAIRS, -1, 1),
    "a second end of thinking": (f"a</think>{fenced('print(3)')}</think>{fenced('print(4)')}", PAIRS, 1, 0),
    "each line of test_code is a test": (fenced(METHOD), json.dumps(CHECK), 0.5, 0.5),
    "test_code as an object": (fenced(METHOD), CHECK, -1, 0.5),
    "assert lines": (fenced(ADD), {"assert_case": ["assert add(1, 2) == 3", "assert add(1, 1) == 3"]}, 0.5, 0.5),
    "an output that is null": (fenced("print(7)"), {"inputs": [""], "outputs": [None]}, 1, 0),
    "pow is the built-in one": (
        fenced("def f(n): return pow(2, n, 7)"),
        json.dumps({"fn_name": "f", "inputs": ["3"], "outputs": ["1"]}),
        1,
        1,
    ),
}


async def test_the_published_scores_beside_the_robust_ones():
    async with open_sandbox() as sandbox:
        for name, (text, tests, published, robust) in VECTORS.items():
            for mode, expected in (("reference", published), ("robust", robust)):
                score = await grade(text, tests, sandbox=sandbox, mode=mode)
                assert (score.score, score.accuracy, score.status) == (expected, float(expected == 1), "graded"), (
                    name,
                    mode,
                )


@pytest.mark.parametrize("tests", [{"inputs": [], "outputs": []}, "nonsense", {"target": 1}])
async def test_no_tests_are_a_failure_and_not_a_division_by_zero(tests):
    async with open_sandbox() as sandbox:
        assert (await grade(fenced(ADD), tests, sandbox=sandbox, mode="reference")).status == "failed"
