"""The published code grader, faults included (Gen-Verse/Open-AgentRL, code_math.compute_score).

* Only closed ```python blocks count, the last of what follows the first `</think>`.
* Outputs are compared as text; only line breaks at their end are ignored.
* A function is called through its arguments' text, one JSON value per line; a function outside `Solution` becomes a
  method, so that it cannot call itself.
* Tests given as an object with `fn_name`, or as JSON that is no Python literal (true, false, null), score -1.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from open_agentrl_jax.sandbox.batch import Run, run_all
from open_agentrl_jax.text import read_object
from open_agentrl_jax.types import Score

if TYPE_CHECKING:
    from open_agentrl_jax.sandbox.client import Result, Sandbox

_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json"),
)
_IMPORTS = "\n".join(
    ["import traceback"]
    + [f"from {name} import *" for name in (*_MODULES, "builtins", "typing")]
    + [f"import {name}" for name in _MODULES]
)
_CALL = """
def __call(name):
    text = sys.stdin.read()
    try:
        values = [json.loads(line) for line in text.split("\\n")] if text.strip() else []
        target = globals()[name] if name in globals() else getattr(Solution(), name)
        value = target(*values)
    except Exception:
        sys.stderr.write(traceback.format_exc())
        return
    plain = value is None or isinstance(value, (bool, dict, list, tuple))
    print(json.dumps(value) if plain else str(value))
if __name__ == "__main__":
    __call({name!r})
"""


class Refused(Exception):
    """The published code scores -1 whatever the program does."""


async def grade(text: str, tests: dict[str, Any] | str, sandbox: Sandbox, *, timeout: float) -> Score:
    """Grades a message as the published code does.

    Args:
        text: the final message.
        tests: as in `rewards.code.grade`.
        sandbox: where the tests run.
        timeout: seconds per test.

    Returns:
        The share of tests passed, or -1; status "failed" where there are no tests (the published code divides by zero)
        or the sandbox failed.
    """
    code = extract(text)
    if code is None:
        return Score(-1.0, 0.0, "")
    try:
        runs, expected = plan(code, tests)
    except Refused:
        return Score(-1.0, 0.0, code)
    except ValueError:
        return Score(0.0, 0.0, code, "failed")
    results = await run_all(runs, sandbox, timeout=timeout)
    if results is None:
        return Score(0.0, 0.0, code, "failed")
    passed = [_passes(result, want) for result, want in zip(results, expected, strict=True)]
    return Score(sum(passed) / len(passed), float(all(passed)), code)


def accuracy_of_outputs(text: str, tests: dict[str, Any] | str, results: Sequence[Result | None]) -> float | None:
    """The accuracy by the published rule of stdin/stdout runs that were made already; None for other tests."""
    code = extract(text)
    if code is None:
        return 0.0
    try:
        runs, expected = plan(code, tests)
    except Refused:
        return 0.0
    except ValueError:
        return None
    if len(runs) != len(results) or any(run.program != code for run in runs):
        return None
    return float(all(_passes(result, want) for result, want in zip(results, expected, strict=True)))


def extract(text: str) -> str | None:
    """The last closed ```python block after the first `</think>`, if it parses."""
    parts = text.split("</think>")
    blocks = _BLOCK.findall(parts[1] if len(parts) > 1 else text)
    try:
        ast.parse(blocks[-1])
    except (IndexError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return blocks[-1]


def plan(code: str, tests: dict[str, Any] | str) -> tuple[list[Run], list[str | None]]:
    """The programs to run, and the output expected of each (None: only that it ends well).

    Raises:
        Refused: the published code scores -1.
        ValueError: there are no tests.
    """
    spec, text = read_object(tests), str(tests)
    if "import_prefix" in text:
        return _check_lines(code, tests)
    if "inputs" not in text:
        if lines := spec.get("assert_case"):
            return [Run(f"{code}\n\n{line}") for line in lines], [None] * len(lines)
        raise ValueError("there are no tests")
    if "fn_name" in text:
        code = _with_method(code, tests)
    if isinstance(tests, str) and not _is_python(tests):
        raise Refused
    inputs, outputs = (_python(spec.get(name)) for name in ("inputs", "outputs"))
    if not inputs:
        raise ValueError("there are no tests")
    lines = _python(spec.get("assert_case")) or [""] * len(inputs)
    if not (len(inputs) == len(outputs) == len(lines)):
        raise Refused
    programs = [f"{code}\n\n{line}" if line else code for line in lines]
    if name := spec.get("fn_name"):
        programs = [f"{_IMPORTS}\n{program}\n{_CALL.format(name=name)}" for program in programs]
    expected = [None if output is None else str(output) for output in outputs]
    stdin = ["" if given is None else str(given) for given in inputs]
    runs = [Run(p, i, len((o or "").encode())) for p, i, o in zip(programs, stdin, expected, strict=True)]
    return runs, expected


def _check_lines(code: str, tests: dict[str, Any] | str) -> tuple[list[Run], list[str | None]]:
    """Each line of test_code after the first is a test of its own, appended to the line that defines `check`."""
    try:
        spec = json.loads(tests) if isinstance(tests, str) else None
        assert spec is not None
        head, *lines = [line for line in spec["test_code"].split("\n") if line]
        start, end = spec["import_prefix"] + code, f"check({spec['entry_point']})"
    except (ValueError, AssertionError, KeyError, TypeError, AttributeError) as error:
        raise Refused from error
    if not lines:
        raise ValueError("there are no tests")
    return [Run(f"{start}\n{head}{line}\n{end}", "prefix") for line in lines], [None] * len(lines)


def _with_method(code: str, tests: dict[str, Any] | str) -> str:
    """The program with its function as a method of `Solution`. Raises Refused where there is no such function."""
    if not isinstance(tests, str):
        raise Refused
    if "class Solution" in code:
        return code
    try:
        spec = json.loads(tests)
    except ValueError as error:
        raise Refused from error
    if "fn_name" not in spec:
        return code
    tree = ast.parse(code)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == spec["fn_name"]]
    if not functions:
        raise Refused
    function, arguments = functions[-1], functions[-1].args.args
    if not arguments or arguments[0].arg != "self":
        arguments.insert(0, ast.arg("self"))
    others = [node for node in tree.body if node not in functions]
    tree.body = [*others, ast.ClassDef("Solution", [], [], [function], [], **_TYPE_PARAMETERS)]
    return ast.unparse(tree)


_TYPE_PARAMETERS: dict[str, Any] = {"type_params": []} if "type_params" in ast.ClassDef._fields else {}


def _is_python(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def _python(value: Any) -> Any:
    """A field that may be a Python literal. Raises Refused where it is text of another kind."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise Refused from error


def _passes(result: Result | None, expected: str | None) -> bool:
    if result is None or result.status != "finished" or result.return_code != 0:
        return False
    return expected is None or result.stdout.rstrip("\n") == expected.rstrip("\n")
