"""Grades a program by its tests, in the sandbox.

The score is the share of tests passed, -1 where there is no program that parses; accuracy is 1 if all pass. Where the
sandbox cannot run a test the status is "failed", because that is no fault of the program.
"""

from __future__ import annotations

import json
import logging
import math
import re
import textwrap
from typing import TYPE_CHECKING, Any

from open_agentrl_jax.reference import code as published
from open_agentrl_jax.rewards.code_tests import read_tests
from open_agentrl_jax.rewards.programs import Case, build, read_report, report_size
from open_agentrl_jax.sandbox.batch import Run, run_all
from open_agentrl_jax.text import parse
from open_agentrl_jax.types import Score

if TYPE_CHECKING:
    from open_agentrl_jax.sandbox.client import Result, Sandbox

log = logging.getLogger(__name__)
TIMEOUT = 30.0  # seconds per test
MAX_CODE = 200_000  # characters of a program
TOLERANCE = 1e-6  # absolute and relative, where a number with a decimal point is compared
# A program may hold ``` in a string, so a fence at the beginning of a line closes a block first, any fence second.
_FENCES = (
    re.compile(r"```[ \t]*+(\w*+)[^\n`]*+\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE),
    re.compile(r"```[ \t]*+(\w*+)[^\n`]*+\n(.*?)(?:```|\Z)", re.DOTALL),
)
_NUMBER = re.compile(r"[+-]?(?:\d{1,300}\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")
_INTEGER = re.compile(r"[+-]?\d+")


async def grade(text: str, tests: dict[str, Any] | str, *, sandbox: Sandbox, mode: str = "robust") -> Score:
    """Grades the final message of a programming problem. A coroutine: `await grade(...)`.

    Args:
        text: the final message; the program is its last ```python block after `</think>`.
        tests: {"inputs": [...], "outputs": [...], "fn_name"?: str}, {"assert_case": [lines], "import_prefix"?: str} or
            {"test_code": str, "entry_point": str, "import_prefix"?: str}; an object, JSON or a Python literal.
        sandbox: where the tests run, at most `running.PARALLEL` at once, TIMEOUT seconds each. After one that ran out
            of time or memory no more are started; those count as not passed.
        mode: "robust" | "reference" (`reference.code`).

    Returns:
        The score, accuracy 1 / 0, and as prediction the program. Status "failed" where the tests cannot be read, are
        none, or the sandbox failed twice on one of them.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in _GRADERS:
        raise ValueError(f"code grading mode {mode!r} must be one of {', '.join(_GRADERS)}")
    return await _GRADERS[mode](text, tests, sandbox)


async def _robust(text: str, tests: dict[str, Any] | str, sandbox: Sandbox) -> Score:
    code = extract(text)
    if code is None:
        return Score(-1.0, 0.0, "")
    try:
        cases = build(code, read_tests(tests))
    except ValueError as error:
        log.warning("a coding problem cannot be graded: %s", error)
        return Score(0.0, 0.0, code, "failed")
    runs = [Run(case.program, case.stdin, _size(case)) for case in cases]
    results = await run_all(runs, sandbox, timeout=TIMEOUT)
    if results is None:
        return Score(0.0, 0.0, code, "failed")
    passed = [result is not None and judge(case, result) for case, result in zip(cases, results, strict=True)]
    score = Score(sum(passed) / len(passed), float(all(passed)), code)
    reference = published.accuracy_of_outputs(text, tests, results)
    if reference is not None and reference != score.accuracy:
        log.info("code graders disagree: robust %s, reference %s, text ends %r", score.accuracy, reference, text[-300:])
    return score


async def _reference(text: str, tests: dict[str, Any] | str, sandbox: Sandbox) -> Score:
    return await published.grade(text, tests, sandbox, timeout=TIMEOUT)


_GRADERS = {"robust": _robust, "reference": _reference}


def extract(text: str) -> str | None:
    """The last ```python block after the thinking (else the last one without a language) if it parses; else None."""
    body = text.rpartition("</think>")[2]
    for fence in _FENCES:
        blocks = fence.findall(body)
        named = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
        for code in (named or [code for language, code in blocks if not language])[-1:]:
            for program in (code, textwrap.dedent(code)):  # a block inside a list is indented
                if len(program) <= MAX_CODE and program.strip() and _parses(program):
                    return program
    return None


def _parses(code: str) -> bool:
    try:
        parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


def _size(case: Case) -> int:
    return report_size(case.expected) if case.mark else len(case.expected.encode())


def judge(case: Case, result: Result) -> bool:
    """Whether one run passed its test."""
    if result.status != "finished" or result.return_code != 0:
        return False
    if not case.mark:
        return same_output(result.stdout, case.expected)
    _, found, report = result.stdout.rpartition("\n" + case.mark)
    if not found:
        return False
    try:
        got = read_report(report)
        if case.exact:
            return got == case.expected
        wrapped = isinstance(case.expected, list) and len(case.expected) == 1 and same_value(got, case.expected[0])
        return same_value(got, case.expected) or wrapped
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError):
        return False


def same_value(got: Any, expected: Any) -> bool:
    """Equality of JSON values: floats within the tolerance, tuples as lists, a set in any order, keys as text."""
    if isinstance(got, float | int) and isinstance(expected, float | int):
        return got == expected or (float in (type(got), type(expected)) and _close(_float(got), _float(expected)))
    if isinstance(got, set | frozenset) and isinstance(expected, list | tuple | set | frozenset):
        left = list(expected)
        for value in got:
            place = next((i for i, other in enumerate(left) if same_value(value, other)), None)
            if place is None:
                return False
            left.pop(place)
        return not left
    if isinstance(got, list | tuple) and isinstance(expected, list | tuple):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, dict) and isinstance(expected, dict):
        named, keyed = ({_key(k): v for k, v in d.items()} for d in (got, expected))
        return named.keys() == keyed.keys() and all(same_value(v, keyed[k]) for k, v in named.items())
    return got == expected


def _key(key: Any) -> str:
    """A dictionary key as JSON writes it."""
    return json.dumps(key) if isinstance(key, bool) or key is None else str(key)


def same_output(got: str, expected: str) -> bool:
    """Equality line by line: white space at the ends is ignored, and numbers are compared as numbers."""
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


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _float(x: float) -> float:
    try:
        return float(x)
    except OverflowError:  # an integer beyond all floats
        return math.inf if x > 0 else -math.inf
