# ruff: noqa: E501
"""The code grader on canonical solutions and their mutants, and on the reference's fault 10."""

import asyncio
import json
import logging
import time

import pytest

from open_agentrl_jax.rewards import code
from open_agentrl_jax.rewards.code import extract, grade, same_output, same_value
from open_agentrl_jax.sandbox import batch
from open_agentrl_jax.sandbox.client import Result, open_sandbox


def fenced(program):
    return f"Plan first.\n```python\nprint('a draft')\n```\nFinal:\n```python\n{program}\n```\nDone."


SUM = "a, b = map(int, input().split())\nprint(a + b)"
PALINDROME = "class Solution:\n    def isPalindrome(self, s: str) -> bool:\n        return s == s[::-1]"
TWO_SUM = (
    "class Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n        seen = {}\n"
    "        for i, x in enumerate(nums):\n            if target - x in seen:\n"
    "                return [seen[target - x], i]\n            seen[x] = i"
)
MEAN = "n = int(input())\nxs = list(map(float, input().split()))\nprint(sum(xs) / n)"
PRIMES = "def primes(n):\n    return [p for p in range(2, n + 1) if all(p % q for q in range(2, int(p**0.5) + 1))]"
WORDS = "from collections import Counter\nfor w, c in sorted(Counter(input().split()).items()):\n    print(w, c)"

# (canonical solution, tests, mutants: each must fail)
PROBLEMS = {
    "stdin": (
        SUM,
        {"inputs": ["1 2\n", "-5 5\n", "1000000000000 1\n"], "outputs": ["3", "0\n", "1000000000001"]},
        [
            SUM.replace("+", "-"),
            SUM.replace("+", "*"),
            SUM.replace("print(a + b)", "a + b"),
            SUM + "\nprint()\nprint(1)",
        ],
    ),
    "float": (
        MEAN,
        {"inputs": ["3\n1 2 2\n", "1\n0.5\n"], "outputs": ["1.666666667", "0.5"]},
        [MEAN.replace("/ n", "// n"), MEAN.replace("sum(xs)", "max(xs)"), MEAN.replace("/ n", "/ (n + 1)")],
    ),
    "lines": (
        WORDS,
        {"inputs": ["b a b\n", "x\n"], "outputs": ["a 1\nb 2\n", "x 1"]},
        [
            WORDS.replace("sorted", "list"),
            WORDS.replace("print(w, c)", "print(w, c + 1)"),
            WORDS.replace("w, c)", "w, c, '.')"),
        ],
    ),
    "method": (
        PALINDROME,
        {"inputs": ['"abba"', '"ab"', '""'], "outputs": ["true", "false", "true"], "fn_name": "isPalindrome"},
        [PALINDROME.replace("==", "!="), PALINDROME.replace("s[::-1]", "s[1:]"), PALINDROME.replace("return", "print")],
    ),
    "arguments": (
        TWO_SUM,
        {"inputs": ["[2,7,11,15]\n9", "[3,3]\n6"], "outputs": ["[0,1]", "[0, 1]"], "fn_name": "twoSum"},
        [TWO_SUM.replace("seen[target - x], i", "i, seen[target - x]"), TWO_SUM.replace("seen[x] = i", "pass")],
    ),
    "asserts": (
        PRIMES,
        {
            "assert_case": ["assert primes(11) == [2, 3, 5, 7, 11]", "assert primes(1) == []"],
            "import_prefix": "import math",
        },
        [PRIMES.replace("n + 1", "n"), PRIMES.replace("range(2, n", "range(1, n"), PRIMES.replace("0.5) + 1", "0.5)")],
    ),
    "function": (
        PRIMES,
        {"inputs": [[10], [1]], "outputs": [[[2, 3, 5, 7]], [[]]], "fn_name": "primes"},
        [PRIMES.replace("range(2, n", "range(3, n"), "def primes(n):\n    import sys\n    sys.exit(0)"],
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("as_json", [False, True])
async def test_canonical_solutions_pass_and_all_mutants_fail(name, as_json):
    canonical, tests, mutants = PROBLEMS[name]
    given = json.dumps(tests) if as_json else tests
    async with open_sandbox() as sandbox:
        score = await grade(fenced(canonical), given, sandbox=sandbox)
        assert (score.score, score.accuracy, score.status) == (1.0, 1.0, "graded")
        assert score.prediction.strip() == canonical
        for mutant in mutants:
            assert mutant != canonical
            score = await grade(fenced(mutant), given, sandbox=sandbox)
            assert score.accuracy == 0 and score.score < 1 and score.status == "graded", mutant


async def test_fault_10_fails_in_reference_and_is_mended_in_robust():
    async with open_sandbox() as sandbox:
        text, tests = fenced(PALINDROME), PROBLEMS["method"][1]
        assert (await grade(text, tests, sandbox=sandbox, mode="reference")).score == -1  # fn_name
        assert (await grade(text, tests, sandbox=sandbox)).score == 1
        literals = '{"inputs": ["1 2"], "outputs": ["3"], "fn_name": null}'  # JSON null
        assert (await grade(fenced(SUM), literals, sandbox=sandbox, mode="reference")).score == -1
        assert (await grade(fenced(SUM), literals, sandbox=sandbox)).score == 1
        for mode in ("robust", "reference"):  # no tests: no division by zero, and no verdict
            assert (
                await grade(fenced(SUM), {"inputs": [], "outputs": []}, sandbox=sandbox, mode=mode)
            ).status == "failed"


class Scripted:
    """A sandbox that answers from a list, and counts."""

    def __init__(self, *results):
        self.results, self.programs, self.most, self.now = list(results), [], 0, 0

    async def run(self, program, *, stdin="", timeout=30.0, memory_mb=2048, max_output=65_536):
        self.programs.append(program)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        status, out = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        return Result(status, 0, out, "", 0.0)


def pairs(n):
    return {"inputs": [str(i) for i in range(n)], "outputs": ["1"] * n}


@pytest.mark.parametrize("mode", ["robust", "reference"])
async def test_the_score_is_the_share_of_tests_passed(mode):
    sandbox = Scripted(("finished", "1"), ("finished", "2"), ("finished", "1"), ("finished", "1"))
    score = await grade(fenced(SUM), pairs(4), sandbox=sandbox, mode=mode)
    assert (score.score, score.accuracy) == (0.75, 0.0)


async def test_a_program_that_does_not_parse_never_reaches_the_sandbox():
    sandbox = Scripted(("finished", "1"))
    for text in (
        "no program",
        fenced("print("),
        "```python\n\n```",
        fenced("x = " + "-" * 300_000 + "1"),
        "```sql\nSELECT\n```",
    ):
        score = await grade(text, pairs(1), sandbox=sandbox)
        assert (score.score, score.accuracy, score.status) == (-1.0, 0.0, "graded")
    assert not sandbox.programs


async def test_a_fault_of_the_sandbox_is_tried_twice_and_then_a_failure():
    sandbox = Scripted(("infrastructure", ""), ("finished", "1"))
    assert (await grade(fenced(SUM), pairs(1), sandbox=sandbox)).score == 1
    score = await grade(fenced(SUM), pairs(3), sandbox=Scripted(("infrastructure", "")))
    assert (score.status, score.accuracy, score.score) == ("failed", 0.0, 0.0)
    assert (await grade(fenced(SUM), pairs(3), sandbox=Scripted(("refused", "")))).status == "failed"


async def test_tests_run_in_parallel_and_stop_early():
    sandbox = Scripted(("finished", "1"))
    assert (await grade(fenced(SUM), pairs(40), sandbox=sandbox)).score == 1
    assert 1 < sandbox.most <= batch.PARALLEL and len(sandbox.programs) == 40
    endless = Scripted(("timeout", ""))
    score = await grade(fenced(SUM), pairs(40), sandbox=endless)
    assert (score.score, score.status) == (0.0, "graded") and len(endless.programs) <= batch.PARALLEL


async def test_a_program_that_never_ends_is_wrong_not_failed(monkeypatch):
    monkeypatch.setattr(code, "TIMEOUT", 0.5)
    async with open_sandbox() as sandbox:
        for program in ("while True: pass", "while True: print('x' * 100)"):
            score = await grade(fenced(program), pairs(2), sandbox=sandbox)
            assert (score.score, score.accuracy, score.status) == (0.0, 0.0, "graded")


async def test_printing_and_exiting_do_not_pass_for_an_answer():
    async with open_sandbox() as sandbox:
        tests = {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}
        chatty = (
            "def f(x):\n    print('<0> 2')\n    return x\nprint(f(5))\nif __name__ == '__main__':\n    raise SystemExit"
        )
        assert (await grade(fenced(chatty), tests, sandbox=sandbox)).accuracy == 1
        quitter = "import os\ndef f(x):\n    os._exit(0)"
        assert (await grade(fenced(quitter), tests, sandbox=sandbox)).accuracy == 0
        assert (await grade(fenced(quitter), {"assert_case": ["assert f(1) == 2"]}, sandbox=sandbox)).accuracy == 0


CHEATS = {
    "equal to everything": "class A(int):\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x): return A()",
    "a list equal to everything": "class A(list):\n    def __eq__(self, o): return True\ndef f(x): return A()",
    "ends early": "import sys\nsys.exit(0)",
    "ends at the call": "import os\ndef f(x): os._exit(0)",
    "reads the test": (
        "import ast, linecache, re, sys\ndef f(x):\n    text = ''.join(linecache.getlines('main.py'))\n"
        "    return ast.literal_eval(re.search(r'f.2. == (.*?)[\\'\"]', text)[1])"
    ),
    "writes the mark": (
        "import os, sys\nframe = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\n"
        "for c in frame.f_code.co_consts:\n    if isinstance(c, str) and c.startswith('<'):\n"
        "        for said in ('true', '[true]', '[[\"int\", \"0\"]]'): os.write(1, f'\\n{c}{said}\\n'.encode())\nos._exit(0)"
    ),
    "swallows errors": "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\ndef f(x): return 0",
    "spoils the harness": "import builtins, json\njson.dumps = lambda *a, **k: 'true'\nbuiltins.eval = lambda *a: 0\ndef f(x): return 0",
    "spoils the harness again": "import builtins\nbuiltins.isinstance = lambda *a: True\ndef f(x): return 0",
}


@pytest.mark.parametrize("cheat", CHEATS)
async def test_cheats_pass_no_test(cheat):
    tests = [
        {"assert_case": ["assert f(2) == [4, 5]"]},
        {"assert_case": ["assert f(2) == 4 and f(3) == 9, 'squares'"]},
        {"assert_case": ["assert f(2) == float('inf')"]},
        {"inputs": [[2]], "outputs": [4], "fn_name": "f"},
        {"inputs": ["2"], "outputs": ["4"]},
    ]
    async with open_sandbox() as sandbox:
        scores = await asyncio.gather(*(grade(fenced(CHEATS[cheat]), t, sandbox=sandbox) for t in tests))
    assert [score.accuracy for score in scores] == [0.0] * len(tests)


@pytest.mark.parametrize(
    ("value", "line", "right"),
    [
        (
            "(1, [2, {3: None}], 'a', b'b', True, 1.5, 2j)",
            "assert f() == (1, [2, {3: None}], 'a', b'b', True, 1.5, 2j)",
            1,
        ),
        ("[1]", "assert f() == (1,)", 0),
        ("{1, 2}", "assert f() == {2, 1}", 1),
        ("frozenset()", "assert f() == set()", 1),
        ("__import__('collections').Counter('aab')", "assert f() == {'a': 2, 'b': 1}", 1),
        ("__import__('numpy').int64(3)", "assert f() == 3", 1),
        ("float('nan')", "assert f() == float('nan')", 0),
        ("1", "assert f() == 1.0; assert True == f()", 1),
        ("1", "assert f() is True", 0),
        ("2", "assert 1 == f()", 0),
        ("1", "assert f() == 1; assert f() == 2", 0),
        ("None", "assert f() is None", 1),
        ("10**50", "assert f() == 1" + "0" * 50, 1),
        ("'\\n<x>'", "assert f() == '\\n<x>'", 1),
        ("0.5", "assert abs(f() - 0.5) < 1e-9", 1),
        ("0.6", "assert abs(f() - 0.5) < 1e-9", 0),
        ("[2, 1]", "assert sorted(f()) == [1, 2]", 1),
        ("object()", "assert f() == 1", 0),
    ],
)
async def test_values_of_asserts(value, line, right):
    async with open_sandbox() as sandbox:
        score = await grade(fenced(f"def f():\n    return {value}"), {"assert_case": [line]}, sandbox=sandbox)
    assert (score.accuracy, score.status) == (right, "graded")


@pytest.mark.parametrize(
    "tests", ["nonsense", "[]", {}, {"inputs": ["1"]}, {"inputs": ["1"], "outputs": []}, {"assert_case": []}, "3"]
)
async def test_tests_that_cannot_be_read_are_a_failure(tests):
    assert (await grade(fenced(SUM), tests, sandbox=Scripted(("finished", "1")))).status == "failed"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```", "x = 1\n"),
        ("inline ```python\nx = 1```", "x = 1"),
        ("```python\nx = 1\n```\n```\ny = 2\n```", "x = 1\n"),
        ("```\ny = 2\n```", "y = 2\n"),
        ("```python\nx = 1\n```\n```python\ny = 2\n```", "y = 2\n"),
        ("```python\ns = '```'\nx = 1\n```", "s = '```'\nx = 1\n"),
        ("```python\nx = 1\n", "x = 1\n"),
        ("<think>```python\nx = 1\n```</think> nothing", None),
        ("```python\nx = \n```", None),
        ("```json\n{}\n```", None),
    ],
)
def test_where_the_program_is_found(text, program):
    assert extract(text) == program


@pytest.mark.parametrize(
    "text", ["```python" + "a" * 100_000, "```" + " " * 100_000, "```" * 30_000, "```python " * 10_000]
)
def test_fences_without_end_take_no_time(text):
    started = time.monotonic()
    assert extract(text) is None
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        ("3\n", "3", True),
        ("3.0", "3", True),
        ("0.33333333", "0.333333333333", True),
        ("0.3333", "0.3334", False),
        ("1e3", "1000.0", True),
        ("100000000000000000001", "100000000000000000002", False),
        ("a \nb", "a\nb\n", True),
        ("a b", "b a", False),
        ("1 2", "1  2", True),
        ("", "0", False),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("1\n2", "1", False),
        ("YES", "Yes", False),
    ],
)
def test_outputs(got, expected, same):
    assert same_output(got, expected) is same


def test_values():
    assert same_value([1, 2.0000000001], (1, 2))
    assert same_value({"1": [True]}, {1: [True]})
    assert not same_value([1, 2], [1, 2, 3]) and not same_value("1", 1) and not same_value(None, False)
    assert not same_value(10**20 + 1, 10**20)
    assert not same_value(10**400, 1.5) and not same_value(-(10**400), 1.5)


async def test_disagreements_of_the_modes_are_logged_with_the_text(caplog):
    caplog.set_level(logging.INFO, logger="open_agentrl_jax.rewards.code")
    await grade(fenced(SUM), pairs(1), sandbox=Scripted(("finished", "1.0")))
    assert "robust 1.0, reference 0.0" in caplog.text and "Done." in caplog.text


async def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="mode"):
        await grade("", pairs(1), sandbox=Scripted(("finished", "")), mode="x")
