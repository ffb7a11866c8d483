"""Grades a program by its tests, in the sandbox: stdin/stdout pairs, calls of a function, or assert lines.

The score is the share of tests passed, -1 where there is no program that parses; accuracy is 1 if all pass. What the
sandbox could not run says nothing about the program: the status is then "failed".
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import json
import logging
import math
import re
import secrets
from typing import TYPE_CHECKING, Any

from open_agentrl_jax.types import Score

if TYPE_CHECKING:
    from open_agentrl_jax.sandbox.client import Result, Sandbox

log = logging.getLogger(__name__)
TIMEOUT = 30.0  # seconds a test
PARALLEL = 8  # tests of one program in the sandbox at once
MAX_CODE = 200_000  # characters of a program
TOLERANCE = 1e-6  # absolute and relative, where a number with a decimal point is compared
# a program may hold ``` in a string, so first only a fence that begins a line closes a block, then any
_FENCES = (
    re.compile(r"```[ \t]*+(\w*+)[^\n`]*+\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE),
    re.compile(r"```[ \t]*+(\w*+)[^\n`]*+\n(.*?)(?:```|\Z)", re.DOTALL),
)
_COMMON = (  # what LeetCode gives every solution
    "import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys\n"
    "from collections import *\nfrom functools import *\nfrom heapq import *\nfrom itertools import *\n"
    "from math import *\nfrom typing import *\nfrom bisect import *\n"
)
# runs a solution as a module, so that its `if __name__ == "__main__"` stays asleep, then hands over to `tail`
_HARNESS = """
import json, sys
space = {{"__name__": "solution", "__builtins__": __builtins__}}
exec(compile({common!r}, "common", "exec"), space)
exec(compile({code!r}, "solution.py", "exec"), space)
{tail}
"""
_CALL = """
solution = space.get("Solution")
target = getattr(solution(), {name!r}) if hasattr(solution, {name!r}) else space[{name!r}]
def plain(x):
    return list(x) if hasattr(x, "__iter__") else repr(x)
answer = json.dumps(target(*json.loads({arguments!r})), default=plain)
sys.stdout.write("\\n" + {mark!r} + answer + "\\n")
"""
_ASSERT = """
exec(compile({line!r}, "test", "exec"), space)
sys.stdout.write("\\n" + {mark!r} + "true\\n")
"""
# of `assert f(1) == 2` only `f(1)` goes to the sandbox, and its value comes out to be compared: a program that knows
# what is expected, or whose objects call themselves equal to everything, could pass by that
_VALUES = """
def spell(x):
    if x is None or isinstance(x, (bool, str)):
        return x if x is None or isinstance(x, bool) else str.__str__(x)
    for kind in (int, float, complex, bytes):
        if isinstance(x, kind):
            return [kind.__name__, kind.__repr__(x)]
    for kind in (tuple, list):
        if isinstance(x, kind):
            return [kind.__name__, list(map(spell, x))]
    if isinstance(x, (set, frozenset)):
        return ["set", list(map(spell, x))]
    if isinstance(x, dict):
        return ["dict", [[spell(k), spell(v)] for k, v in x.items()]]
    return spell(x.item()) if hasattr(x, "item") and hasattr(x, "dtype") else ["other", type(x).__name__]
answer = json.dumps([spell(eval(compile(line, "test", "eval"), space)) for line in {lines!r}])
sys.stdout.write("\\n" + {mark!r} + answer + "\\n")
"""
_MADE = {"set": set, "frozenset": frozenset, "float": float, "tuple": tuple, "list": list, "dict": dict}


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to run, and how its output is judged: as text, or after `mark` as JSON or as values spelled out."""

    program: str
    stdin: str
    expected: Any
    mark: str = ""
    spelled: bool = False


async def grade(
    text: str, tests: dict[str, Any] | str, *, sandbox: Sandbox, mode: str = "robust", accuracy_only: bool = False
) -> Score:
    """Grades the final message of a programming problem. A coroutine: `await grade(...)`.

    Args:
        text: the final message; the program is its last ```python block after `</think>`.
        tests: {"inputs": [...], "outputs": [...], "fn_name"?: str} or {"assert_case": [lines], "import_prefix"?: str},
            as an object or as JSON. Inputs of a function are a list of arguments, or text with one JSON value a line.
        sandbox: where the tests run, at most PARALLEL at once, TIMEOUT seconds each. After one that ran out of time or
            memory no more are started; those count as not passed.
        mode: "robust" compares numbers with a tolerance; "reference" compares outputs as strings and knows no fn_name.
        accuracy_only: stop at the first test that is not passed (evaluation; the score is then 0 or 1).

    Returns:
        The score, accuracy 1 / 0, and as prediction the program. Status "failed" where the tests cannot be read, are
        none, or the sandbox could not run one of them twice.
    """
    if mode not in ("robust", "reference"):
        raise ValueError(f"code grading mode {mode!r} is neither robust nor reference")
    code = extract(text)
    if code is None:
        return Score(-1.0, 0.0, "")
    try:
        cases = build(code, tests)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        log.warning("the tests of a coding problem cannot be read: %s", e)
        cases = []
    if not cases:
        return Score(0.0, 0.0, code, "failed")
    unreadable = _reference_refuses(tests)
    if mode == "reference" and unreadable:
        return Score(-1.0, 0.0, code)
    outcomes = await _run_all(cases, sandbox, mode if accuracy_only else "")
    if outcomes is None:
        return Score(0.0, 0.0, code, "failed")
    scores = {}
    for i, name in enumerate(("robust", "reference")):
        passed = sum(o[i] for o in outcomes)
        share = float(passed == len(cases)) if accuracy_only else passed / len(cases)
        scores[name] = Score(share, float(passed == len(cases)), code)
    if unreadable:
        scores["reference"] = Score(-1.0, 0.0, code)
    if scores["robust"].accuracy != scores["reference"].accuracy:
        robust, reference = (scores[m].accuracy for m in ("robust", "reference"))
        log.info("code graders disagree: robust %s, reference %s, text ends %r", robust, reference, text[-300:])
    return scores[mode]


def extract(text: str) -> str | None:
    """The last ```python block after the thinking (else the last one without a language) if it parses; else None."""
    body = text.rpartition("</think>")[2]
    for fence in _FENCES:
        blocks = fence.findall(body)
        named = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
        for code in (named or [code for language, code in blocks if not language])[-1:]:
            if len(code) <= MAX_CODE and code.strip() and _parses(code):
                return code
    return None


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _reference_refuses(tests: dict[str, Any] | str) -> bool:
    """The reference scores -1 whatever the program where tests name a function, or are JSON that is not Python."""
    if isinstance(tests, str):
        try:
            ast.literal_eval(tests)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return True
        tests = json.loads(tests)
    return isinstance(tests, dict) and bool(tests.get("fn_name"))


def build(code: str, tests: dict[str, Any] | str) -> list[Case]:
    """The programs to run. Raises ValueError, TypeError or KeyError for tests that cannot be read."""
    spec = json.loads(tests) if isinstance(tests, str) else tests
    mark = f"<{secrets.token_hex(8)}>"  # so that nothing the program prints is taken for its answer
    if "assert_case" in spec:
        prefix, cases = (spec.get("import_prefix") or "") + "\n", []
        for line in _list(spec["assert_case"]):
            if not line.lstrip().startswith("assert"):
                prefix += line + "\n"  # a line of preparation, for all that follow
                continue
            equations = _equations(line)
            if equations:
                tail = _VALUES.format(lines=[left for left, _ in equations], mark=mark)
            else:
                tail = _ASSERT.format(line=line, mark=mark)
            program = _HARNESS.format(common=_COMMON + prefix, code=code, tail=tail)
            expected = [right for _, right in equations] if equations else True
            cases.append(Case(program, "", expected, mark, bool(equations)))
        return cases
    inputs, outputs = _list(spec["inputs"]), _list(spec["outputs"])
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs")
    if not spec.get("fn_name"):
        return [Case(code, _lines(i), _lines(o)) for i, o in zip(inputs, outputs, strict=True)]
    cases = []
    for given, expected in zip(inputs, outputs, strict=True):
        arguments = json.dumps(_arguments(given))
        tail = _CALL.format(name=spec["fn_name"], arguments=arguments, mark=mark)
        program = _HARNESS.format(common=_COMMON, code=code, tail=tail)
        cases.append(Case(program, "", _literal(expected) if isinstance(expected, str) else expected, mark))
    return cases


def _equations(line: str) -> list[tuple[str, Any]]:
    """An assert line as (expression, the value it must have) pairs; empty where it says something else."""
    try:
        waiting: list[ast.AST] = [n.test if isinstance(n, ast.Assert) else n for n in ast.parse(line.strip()).body]
        pairs = []
        while waiting:
            test = waiting.pop(0)
            if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
                waiting = [*test.values, *waiting]
                continue
            if not isinstance(test, ast.Compare) or len(test.ops) != 1:
                return []
            left, right = test.left, test.comparators[0]
            if isinstance(test.ops[0], ast.Is) and isinstance(right, ast.Constant):
                pairs.append((ast.unparse(test), True))
            elif isinstance(test.ops[0], ast.Eq):
                if _is_literal(left):
                    left, right = right, left
                pairs.append((ast.unparse(left), _constant(right)))
            else:
                return []
        return pairs
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return []


def _is_literal(node: ast.expr) -> bool:
    return not any(isinstance(inner, ast.Name | ast.Call) for inner in ast.walk(node))


def _constant(node: ast.expr) -> Any:
    """The value of a literal, or of a type called with one. Raises ValueError or TypeError for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _MADE and not node.keywords:
        return _MADE[node.func.id](*map(ast.literal_eval, node.args))
    return ast.literal_eval(node)


def _spelled(x: Any) -> Any:
    """The value that `spell` of _VALUES wrote. Raises ValueError, TypeError or KeyError where it is none."""
    if not isinstance(x, list):
        return x
    kind, items = x
    if kind == "dict":
        return {_spelled(k): _spelled(v) for k, v in items}
    if kind in ("list", "tuple", "set"):
        return {"list": list, "tuple": tuple, "set": frozenset}[kind](map(_spelled, items))
    return {"int": int, "float": float, "complex": complex, "bytes": ast.literal_eval}[kind](items)


def _list(value: Any) -> list[Any]:
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        raise ValueError(f"tests must be lists, not {type(value).__name__}")
    return list(value)


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(given: Any) -> list[Any]:
    if isinstance(given, str):
        return [_literal(line) for line in given.strip().split("\n")]
    return given if isinstance(given, list) else [given]


def _literal(text: str) -> Any:
    """A value written as JSON or as Python; other text is a string."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


async def _run_all(cases: list[Case], sandbox: Sandbox, until: str) -> list[tuple[bool, bool]] | None:
    """(passed in robust, in reference mode) of each case; None where the sandbox failed. `until`: the mode whose first
    failure ends it."""
    outcomes = [(False, False)] * len(cases)
    waiting, stop, broken = iter(range(len(cases))), False, False

    async def work() -> None:
        nonlocal stop, broken
        for i in waiting:
            if stop:
                return
            result = await _run(cases[i], sandbox)
            if result.status in ("infrastructure", "refused"):
                stop = broken = True
                return
            outcomes[i] = judge(cases[i], result)
            wrong = until and not outcomes[i][until == "reference"]
            stop = stop or bool(wrong) or result.status in ("timeout", "memory")

    await asyncio.gather(*(work() for _ in range(min(PARALLEL, len(cases)))))
    return None if broken else outcomes


async def _run(case: Case, sandbox: Sandbox) -> Result:
    result = await sandbox.run(case.program, stdin=case.stdin, timeout=TIMEOUT)
    if result.status != "infrastructure":
        return result
    return await sandbox.run(case.program, stdin=case.stdin, timeout=TIMEOUT)  # once more: a server may have gone away


def judge(case: Case, result: Result) -> tuple[bool, bool]:
    """Whether one run passed its test, (robust, reference)."""
    if result.status != "finished" or result.return_code != 0:
        return False, False
    if not case.mark:
        return same_output(result.stdout, case.expected), result.stdout.strip() == case.expected.strip()
    found = result.stdout.rpartition("\n" + case.mark)
    if not found[1]:
        return False, False
    try:
        got = json.loads(found[2])
        if case.spelled:
            right = [_spelled(x) for x in got] == case.expected
        else:
            wrapped = isinstance(case.expected, list) and len(case.expected) == 1 and same_value(got, case.expected[0])
            right = same_value(got, case.expected) or wrapped
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError):
        return False, False
    return right, right


def same_value(got: Any, expected: Any) -> bool:
    """Equality of JSON values, floats within the tolerance."""
    if isinstance(got, float | int) and isinstance(expected, float | int):
        return got == expected or (float in (type(got), type(expected)) and _close(_float(got), _float(expected)))
    if isinstance(got, list) and isinstance(expected, list | tuple):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, dict) and isinstance(expected, dict):
        keyed = {str(k): v for k, v in expected.items()}
        return got.keys() == keyed.keys() and all(same_value(v, keyed[k]) for k, v in got.items())
    return got == expected


def same_output(got: str, expected: str) -> bool:
    """Equality line by line; white space at the ends counts for nothing, and numbers are compared as numbers."""
    a, b = ([line.strip() for line in s.strip().splitlines()] for s in (got, expected))
    return len(a) == len(b) and all(x == y or _same_numbers(x.split(), y.split()) for x, y in zip(a, b, strict=True))


def _same_numbers(a: list[str], b: list[str]) -> bool:
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if x == y:
            continue
        if not (_NUMBER.fullmatch(x) and _NUMBER.fullmatch(y)) or (_INTEGER.fullmatch(x) and _INTEGER.fullmatch(y)):
            return False
        if not _close(float(x), float(y)):
            return False
    return True


_NUMBER = re.compile(r"[+-]?(?:\d{1,300}\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")
_INTEGER = re.compile(r"[+-]?\d+")


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _float(x: float) -> float:
    try:
        return float(x)
    except OverflowError:  # an integer beyond all floats
        return math.inf if x > 0 else -math.inf
