# ruff: noqa: E501
"""Programs and tests as people have them: long outputs, unimported names, setup lines, numpy values, long integers."""

import asyncio
import json

import pytest

from open_agentrl_jax.rewards.code import extract, grade
from open_agentrl_jax.rewards.code_tests import read_tests
from open_agentrl_jax.sandbox.client import Result, open_sandbox

ASYNC = 8  # programs at once


def fenced(program):
    return f"```python\n{program}\n```"


def function(body, inputs, outputs, name="f"):
    return body, {"fn_name": name, "inputs": inputs, "outputs": outputs}


def stdin(body, given, output):
    return body, {"inputs": [given], "outputs": [output]}


def asserts(body, *lines, **more):
    return body, {"assert_case": list(lines), **more}


def check(body, test_code, entry_point, **more):
    return body, {"test_code": test_code, "entry_point": entry_point, **more}


METHOD = "class Solution:\n    def f(self, n):\n        return "
NODE = "class Node:\n    def __init__(s, v): s.v = v\n"
STACK = (
    "class Stack:\n    def __init__(s): s.x = []\n    def push(s, v): s.x.append(v)\n    def pop(s): return s.x.pop()"
)
HUMAN_EVAL = (
    "\n\nMETADATA = {'author': 'jt'}\n\n\ndef check(candidate):\n    # a comment\n    assert candidate(1) == 2\n"
    "    x = [3]\n    assert candidate(x[0]) == 4, 'next'\n    for i in range(3):\n        assert candidate(i) == i + 1\n"
)
LCB_PREFIX = "from typing import *\nfrom bisect import *\nfrom operator import *\nfrom math import *\n"
SOLVED = {
    # long outputs
    "64 KiB of output": stdin("print('1'*65536)", "", "1" * 65536),
    "300 KB of lines": stdin("for i in range(50000): print(i)", "", "\n".join(map(str, range(50000)))),
    "20,000 integers returned": function("def f(n): return list(range(n))", ["20000"], [json.dumps([*range(20000)])]),
    "noise before the value": function("def f(n):\n    print('x' * 100000)\n    return n", ["1"], ["1"]),
    "a long text returned": function("def f(n): return 'é' * n", ["30000"], [json.dumps("é" * 30000)]),
    # names that LeetCode offers, none of which replaces a built-in
    "pow of three": function(METHOD + "pow(2, n, 10**9+7)", ["10"], ["1024"]),
    "pow is exact": function(METHOD + "pow(3, n)", ["50"], [str(3**50)]),
    "pow after a prefix": asserts("def f(n): return pow(3, n, 7)", "assert f(50) == 2", import_prefix=LCB_PREFIX),
    "bisect as a module": function(METHOD + "bisect.bisect_left([1, 3], n)", ["2"], ["1"]),
    "bisect as a module after a prefix": asserts(
        "def f(n): return bisect.bisect_left([1, 3], n)", "assert f(2) == 1", import_prefix=LCB_PREFIX
    ),
    "bisect as a function": function(METHOD + "bisect([1, 3], n)", ["2"], ["1"]),
    "the type Counter": function(METHOD + "type(Counter('aa')) == Counter", ["1"], ["true"]),
    "annotations": function("class Solution:\n    def f(self, a: List[int]) -> Optional[int]: return a[0]", ["[4]"], ["4"]),
    "names of many modules": function(
        METHOD + "[gcd(n, 4), heapq.nlargest(1, [n]), reduce(lambda a, b: a * b, [n, 2]), deepcopy([n]), inf > n, "
        "datetime.date(2020, 1, n).day, string.ascii_lowercase[n], len(list(permutations(range(3)))), math.isqrt(n)]",
        ["2"],
        ['[2, [2], 4, [2], true, 2, "c", 6, 1]'],
    ),
    "round, abs, min and sum stay built in": function(METHOD + "[round(2.5), abs(-n), min(n, 3), sum([n])]", ["2"], ["[2, 2, 2, 2]"]),
    "deep recursion": function("def f(n): return 0 if n == 0 else 1 + f(n - 1)", ["5000"], ["5000"]),
    # values
    "a numpy scalar": function("import numpy as np\ndef f(a): return np.sum(a)", ["[1,2]"], ["3"]),
    "a numpy array": function("import numpy as np\ndef f(a): return np.array(a) * 2", ["[[1,2],[3,4]]"], ["[[2,4],[6,8]]"]),
    "numpy inside containers": function(
        "import numpy as np\ndef f(n): return {'a': [np.float64(n)], np.int64(3): (np.bool_(True), None)}",
        ["2"],
        ['{"a": [2.0], "3": [true, null]}'],
    ),
    "numpy in an assert": asserts("import numpy as np\ndef f(a): return np.max(a)", "assert f([1, 5]) == 5"),
    "a generator": function("def f(n): yield from range(n)", ["3"], ["[0, 1, 2]"]),
    "a set in any order": function("def f(n): return {'x', 'y', 'z'}", ["3"], ['["z", "x", "y"]']),
    "keys as JSON": function("def f(n): return {1: 'a', True and (1, 2): 'b'}", ["3"], ['{"1": "a", "(1, 2)": "b"}']),
    "an integer of 5,000 digits": stdin("print(10**5000)", "", "1" + "0" * 5000),
    "digits read and summed": stdin("print(sum(map(int, str(2**20000))), int(input()) % 7)", "9" * 5000, "26995 1"),
    "5,000 digits returned": function("def f(n): return 10**n", ["5000"], ["1" + "0" * 5000]),
    "5,000 digits given": function("def f(n): return n % 10", ["1" * 5000], ["1"]),
    "5,000 digits in an assert": asserts("def f(n): return n + 1", f"assert f({'1' * 5000}) == {'1' * 4999}2"),
    "5,000 digits in the program": stdin(f"print({'1' * 5000} % 10)", "", "1"),
    "a tuple is a list": function("def f(n): return (n, [n])", ["1"], ["[1, [1]]"]),
    "arguments as Python": function("def f(a, b): return sorted(a)[0] if b is None else 0", ["(3, 1)\nNone"], ["1"]),
    # how modules behave
    "a dataclass under future annotations": function(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
        "def f(n): return P(n).x",
        ["3"],
        ["3"],
    ),
    "future annotations on stdin": stdin(
        '"""Doc."""\nfrom __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n'
        "    x: int\nprint(P(int(input())).x)",
        "3",
        "3",
    ),
    "a main guard sleeps": function("def f(n): return n\nif __name__ == '__main__': f(input())", ["3"], ["3"]),
    "writes to the buffer": function("import sys\ndef f(n):\n    sys.stdout.buffer.write(b'x')\n    return n", ["3"], ["3"]),
    # asserts
    "setup uses the program": asserts(NODE + "def f(n): return n.v", "root = Node(5)", "assert f(root) == 5"),
    "a class that the annotations need": asserts(
        "def f(n: Node) -> int: return n.v", NODE.strip(), "root = Node(5)", "assert f(root) == 5"
    ),
    "a helper that the program calls": asserts(
        "def f(n): return next(i for i in range(n) if is_bad(i))", "def is_bad(v): return v >= 4", "assert f(9) == 4"
    ),
    "check blocks among the asserts": asserts(
        "def f(a): return a", "def check(candidate):\n    assert candidate(1)==1", "check(f)", "assert f(2)==2"
    ),
    "check as lines": asserts("def f(a): return a", "def check(candidate):", "    assert candidate(1) == 1", "check(f)"),
    "comments": asserts("def f(a): return a", "# first", "# second\nassert f(1) == 1", "", "assert f(2) == 2  # end"),
    "indented asserts": asserts("def f(a): return a", "    assert f(1) == 1", "  assert f(2) == 2"),
    "a block of lines": asserts("def f(a): return a", "for i in range(3):\n    assert f(i) == i"),
    "asserts in order on one object": asserts(
        STACK, "s = Stack()", "assert s.push(1) is None", "assert s.push(2) is None", "assert s.pop() == 2", "assert s.pop() == 1"
    ),
    "an import among the asserts": asserts("def f(a): return a / 3", "import math", "assert math.isclose(f(1), 1 / 3)"),
    "text in place of a list": ("def f(a): return a", {"assert_case": "assert f(1) == 1\nassert f(2) == 2"}),
    # check functions
    "test_code with an entry point": check(
        "class Solution:\n    def inc(self, a):\n        return a+1",
        "def check(candidate):\n    assert candidate(a = 1) == 2\n",
        "Solution().inc",
        import_prefix="from typing import *\n",
    ),
    "HumanEval": check("def inc(n): return n + 1", HUMAN_EVAL, "inc"),
    "a check that returns": check("def inc(n): return n + 1", "def check(c):\n    assert c(1) == 2\n    return True", "inc"),
    "a check that calls numpy": check(
        "def f(n): return [n, n]",
        "import numpy as np\ndef check(candidate):\n    np.testing.assert_allclose(candidate(1), [1, 1])",
        "f",
    ),
    "asserts on candidate": check("def inc(n): return n + 1", "assert candidate(1) == 2", "inc"),
    "a line break in a string": check(
        "def f(): return 'a\\n    b'", 'def check(candidate):\n    """Doc\n    more"""\n    assert candidate() == """a\n    b"""', "f"
    ),
    "null columns of a table": (
        "def inc(n): return n + 1",
        {"inputs": None, "outputs": None, "fn_name": None, "assert_case": None, "test_code": HUMAN_EVAL, "entry_point": "inc"},
    ),
    # how tests are written down
    "a Python literal": ("a, b = map(int, input().split())\nprint(a + b)", "{'inputs': ['1 2\\n'], 'outputs': ['3\\n']}"),
    "JSON": ("print(input())", '{"inputs": ["x"], "outputs": ["x"], "fn_name": null}'),
    "lists as text": ("print(input())", {"inputs": '["x"]', "outputs": "['x']"}),
    "5,000 digits in JSON": ("def f(n): return 10**n", f'{{"fn_name": "f", "inputs": [[5000]], "outputs": [1{"0" * 5000}]}}'),
}  # fmt: skip
UNSOLVED = {
    "one more than 64 KiB": stdin("print('1'*65537)", "", "1" * 65536),
    "a flood": stdin("while True: print('1' * 1000)", "", "1"),
    "one digit of 5,000": function("def f(n): return 10**n + 1", ["5000"], ["1" + "0" * 5000]),
    "asserts on one object, the wrong way round": asserts(
        STACK, "s = Stack()", "assert s.push(1) is None", "assert s.push(2) is None", "assert s.pop() == 1"
    ),
    "another set": function("def f(n): return {'x', 'y'}", ["3"], ['["z", "x"]']),
    "a check that the program replaces": check(
        "def check(c): pass\ndef inc(n): return n", "def check(candidate):\n    assert candidate(1) == 2\n", "inc"
    ),
    "a later assert of a check": check("def inc(n): return n + 1 if n < 2 else 0", HUMAN_EVAL, "inc"),
    "an object named as the answer": asserts("class A: pass\ndef f(): return A()", "assert f() == 'A'"),
    "a nested loop in a check": check(
        "def f(n): return 0", "def check(candidate):\n    for i in [0, 1]:\n        assert candidate(i) == i", "f"
    ),
    "the type of the key": asserts("def f(): return {'1': 2}", "assert f() == {1: 2}"),
    "a number for a text": function("def f(n): return '5'", ["1"], ["5"]),
}  # fmt: skip


@pytest.mark.parametrize(("table", "accuracy"), [(SOLVED, 1.0), (UNSOLVED, 0.0)])
async def test_programs_and_tests_as_people_have_them(table, accuracy):
    gate = asyncio.Semaphore(ASYNC)
    async with open_sandbox() as sandbox:

        async def graded(name):
            program, tests = table[name]
            async with gate:
                return name, await grade(fenced(program), tests, sandbox=sandbox)

        scores = await asyncio.gather(*map(graded, table))
    assert {name: (s.accuracy, s.status) for name, s in scores} == {name: (accuracy, "graded") for name in table}


async def test_a_check_scores_the_share_of_its_asserts():
    program, tests = UNSOLVED["a later assert of a check"]
    async with open_sandbox() as sandbox:
        assert (await grade(fenced(program), tests, sandbox=sandbox)).score == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ({"target": ["Ada"]}, "inputs and outputs, assert_case, or test_code; their keys are target"),
        ({"target": 24, "numbers": [1, 2]}, "keys are numbers, target"),
        ("42", "must be an object, not int"),
        ("hello", "must be an object, not str"),
        ({"inputs": ["1"]}, "must hold inputs and outputs"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs but 0 outputs"),
        ({"inputs": [], "outputs": []}, "there are no tests"),
        ({"inputs": 5, "outputs": [1]}, "inputs must be a list, not int"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "a b"}, "fn_name 'a b' is not the name of a function"),
        ({"assert_case": ["x = 1"]}, "there is no assert"),
        ({"assert_case": ["assert f( == 1"]}, "the asserts are not Python"),
        ({"assert_case": [1]}, "asserts must be text"),
        ({"test_code": "def check(candidate):\n    assert candidate(1)"}, "entry_point is missing"),
        ({"test_code": 5, "entry_point": "f"}, "asserts must be text"),
        ({"assert_case": ["assert f()"], "import_prefix": "import ("}, "import_prefix is not Python"),
        ([{"input": "1", "output": "2"}], "must be an object, not list"),
        (None, "must be an object, not NoneType"),
    ],
)
def test_tests_of_no_schema_are_refused_with_the_reason(tests, reason):
    with pytest.raises(ValueError, match=reason):
        read_tests(tests)


@pytest.mark.parametrize(
    "text",
    ["1. The program:\n\n   ```python\n   x = 1\n   if x:\n       x = 2\n   ```\n", "- ```python\n  x = 1\n  if x:\n      x = 2\n  ```"],
)  # fmt: skip
def test_a_block_inside_a_list_is_dedented(text):
    assert extract(text) == "x = 1\nif x:\n    x = 2\n"


class Short:
    """A sandbox that returns fewer bytes of output than requested, and says so."""

    def __init__(self, kept):
        self.kept, self.limits = kept, []

    async def run(self, program, *, stdin="", timeout=30.0, memory_mb=2048, max_output=65_536):
        self.limits.append(max_output)
        return Result("finished", 0, "1" * min(self.kept, max_output), "", 0.0, truncated=True)


async def test_output_that_the_sandbox_lost_is_a_failure():
    program, tests = stdin("print('1' * 300_000)", "", "1" * 300_000)
    lost = Short(65_536)
    assert (await grade(fenced(program), tests, sandbox=lost)).status == "failed"
    assert lost.limits == [1_200_000]
    small = Short(65_536)
    assert (await grade(fenced(program), stdin("", "", "1")[1], sandbox=small)).status == "failed"
    assert small.limits == [65_536, 1 << 20]
    flood = Short(1 << 24)
    assert (await grade(fenced(program), stdin("", "", "1")[1], sandbox=flood)).accuracy == 0.0
