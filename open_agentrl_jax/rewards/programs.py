"""Builds the programs that run a solution on its tests, and reads the values that they report.

Expected values stay outside wherever a test compares with a literal: the sandbox evaluates an expression and reports
its value after a random mark, so that a solution can neither read what is expected nor forge equality with `__eq__`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import json
import math
import secrets
from typing import Any

from open_agentrl_jax.rewards.code_tests import Asserts, Calls, Check, Pairs, Tests
from open_agentrl_jax.text import hexadecimal, parse

# What LeetCode offers without an import. A name of several modules is taken from the last one.
_MODULES = (
    *("typing", "operator", "re", "string", "statistics", "datetime", "io", "copy", "random", "math", "bisect"),
    *("functools", "heapq", "itertools", "collections", "json", "sys", "os", "time", "decimal", "fractions"),
)
_OFFERED = _MODULES[: _MODULES.index("json")]  # modules whose names are offered too
_BUILTINS = frozenset(dir(__import__("builtins")))
# The limits of LiveCodeBench's grader; integers print and parse at any length.
_LIMITS = (
    "__import__('sys').setrecursionlimit(50_000), getattr(__import__('sys'), 'set_int_max_str_digits', int)(0)  # noqa"
)
# The solution is imported as a module, so that `if __name__ == "__main__"` does not run and dataclasses find their
# module. What it prints is discarded.
_HARNESS = """
import io, json, sys, types
class _Nowhere(io.RawIOBase):
    def writable(self):
        return True
    def write(self, data):
        return len(data)
_out, sys.stdout = sys.stdout, io.TextIOWrapper(io.BufferedWriter(_Nowhere()))
def _spell(x, loose):
    if x is None or isinstance(x, (bool, str)):
        return x if x is None or isinstance(x, bool) else str.__str__(x)
    if isinstance(x, int):
        return int(x) if -(10**15) < x < 10**15 else ["int", int.__format__(x, "x")]
    if isinstance(x, float):
        return ["float", float.__repr__(x)]
    for kind in (complex, bytes):
        if isinstance(x, kind):
            return [kind.__name__, kind.__repr__(x)]
    for kind in (tuple, list):
        if isinstance(x, kind):
            return [kind.__name__, [_spell(i, loose) for i in x]]
    if isinstance(x, (set, frozenset)):
        return ["set", [_spell(i, loose) for i in x]]
    if isinstance(x, dict):
        return ["dict", [[_spell(k, loose), _spell(v, loose)] for k, v in x.items()]]
    if hasattr(x, "dtype") and (hasattr(x, "item") or hasattr(x, "tolist")):
        return _spell(x.tolist() if loose else x.item(), loose)
    if loose and hasattr(x, "__iter__"):
        return ["list", [_spell(i, loose) for i in x]]
    return ["text", repr(x)] if loose else ["other", type(x).__name__]
def _report(x, loose=False):
    _out.write("\\n" + {mark!r} + json.dumps(_spell(x, loose)) + "\\n")
    _out.flush()
_module = sys.modules["solution"] = types.ModuleType("solution")
_space = vars(_module)
exec(compile({prefix!r}, "prefix", "exec"), _space)
for _name in dir(__import__("builtins")):  # `from math import *` of a prefix must not replace pow
    if isinstance(_space.get(_name), types.BuiltinFunctionType):
        del _space[_name]
for _name, _statement, _attributes in {prelude!r}:
    if _name not in _space or any(not hasattr(_space[_name], a) for a in _attributes):
        try:
            exec(_statement, _space)
        except ImportError:
            pass
for _type in {types!r}:
    try:
        exec(_type, _space)
    except Exception:
        pass
exec(compile({code!r}, "solution.py", "exec"), _space)
{tail}
"""
_CALL = """
_solution = _space.get("Solution")
_target = getattr(_solution(), {name!r}) if hasattr(_solution, {name!r}) else _space[{name!r}]
def _value(text):
    import ast
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return text
_report(_target(*{arguments}), loose=True)
"""
_ASSERTED = """
_space["__report__"] = _report
exec(compile({test!r}, "test", "exec"), _space)
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to run, and what is expected of it.

    `mark` is "" where the expected value is the standard output; else the program reports a value after the mark.
    `exact` compares with `==`, as an assert does; otherwise the values compare as JSON does.
    """

    program: str
    stdin: str
    expected: Any
    mark: str = ""
    exact: bool = False


def build(code: str, tests: Tests) -> list[Case]:
    """The program of each test."""
    code, mark = hexadecimal(code), f"<{secrets.token_hex(8)}>"
    if isinstance(tests, Pairs):
        program = with_limits(code)
        return [Case(program, given, expected) for given, expected in zip(tests.inputs, tests.outputs, strict=True)]
    if isinstance(tests, Calls):
        cases = []
        for given, expected in zip(tests.arguments, tests.expected, strict=True):
            tail = _CALL.format(name=tests.name, arguments=_arguments(given))
            cases.append(Case(_program(code, tail, mark), "", expected, mark))
        return cases
    return [_asserted(code, tests, check, mark) for check in tests.checks]


def _asserted(code: str, tests: Asserts, check: Check, mark: str) -> Case:
    values = ", ".join(f"({expression})" for expression, _ in check.values)
    end = f"__report__([{values}])" if values else f"{check.statement}\n__report__(True)"
    test = f"{check.setup}\n{end}"
    if check.parameter:
        body = "\n    ".join(f"{check.inner_setup}\n{end}".split("\n"))
        test = f"{check.setup}\ndef __check__({check.parameter}):\n    {body}\n__check__({check.argument})"
    expected = [value for _, value in check.values] if values else True
    program = _program(code, _ASSERTED.format(test=test), mark, prefix=tests.prefix, test=test, setup=check.setup)
    return Case(program, "", expected, mark, exact=True)


def _program(code: str, tail: str, mark: str, *, prefix: str = "", test: str = "", setup: str = "") -> str:
    packages = [name for name in ("numpy", "sympy", "scipy") if name in f"{prefix}{code}{test}"]
    hints = "".join(f"if False: import {name}\n" for name in packages)  # the sandbox forks a process that has them
    body = _HARNESS.format(
        mark=mark, prefix=prefix, prelude=prelude(f"{code}\n{test}"), types=_types(setup), code=code, tail=tail
    )
    return f"{_LIMITS}\n{hints}{body}"


def _types(setup: str) -> list[str]:
    """The imports and classes of a setup, which annotations of the solution may name."""
    if "class " not in setup and "import " not in setup:
        return []
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef)
    return [ast.unparse(node) for node in parse(setup).body if isinstance(node, kept)]


@functools.lru_cache(maxsize=64)
def prelude(source: str) -> list[tuple[str, str, list[str]]]:
    """(name, import, attributes used of it) of the names that a program uses and LeetCode offers without an import.

    Built-in names stay built in. A name that is both a module and a function in it, such as `bisect`, is the module
    where the program uses attributes of it.
    """
    try:
        nodes = list(ast.walk(parse(source)))
    except (SyntaxError, ValueError):
        return []
    names, functions = {node.id for node in nodes if isinstance(node, ast.Name)}, _offered()
    attributes: dict[str, list[str]] = {}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.setdefault(node.value.id, []).append(node.attr)
    found = [(name, f"from {functions[name]} import {name}", []) for name in sorted(names & functions.keys())]
    for name in (module for module in _MODULES if module in names):
        whole = name in attributes or not hasattr(importlib.import_module(name), name)
        statement = f"import {name}" if whole else f"from {name} import {name}"
        found.append((name, statement, sorted(set(attributes.get(name, ())))))
    return [*found, ("inf", "inf = float('inf')", [])] if "inf" in names else found


@functools.cache
def _offered() -> dict[str, str]:
    """Name -> module of what `from module import *` would bring, built-in names and modules left out."""
    names = {}
    for module in _OFFERED:
        loaded = importlib.import_module(module)
        public = getattr(loaded, "__all__", None) or [name for name in dir(loaded) if not name.startswith("_")]
        names |= dict.fromkeys(public, module)
    return {name: module for name, module in names.items() if name not in _BUILTINS and name not in _MODULES}


def with_limits(code: str) -> str:
    """The program with the recursion limit raised and the limit of integer digits lifted."""
    if "__future__" not in code:
        return f"{_LIMITS}\n{code}"
    try:
        body = parse(code).body
    except (SyntaxError, ValueError):
        return code
    first = next((node for node in body if not _leads(node)), None)
    before = [node.end_lineno or 0 for node in body if first is None or node.lineno < first.lineno]
    if first is None or (before and max(before) >= first.lineno):
        return code
    lines = code.split("\n")
    start = min([first.lineno, *(node.lineno for node in getattr(first, "decorator_list", ()))]) - 1
    return "\n".join([*lines[:start], _LIMITS, *lines[start:]])


def _leads(node: ast.stmt) -> bool:
    """Whether a statement must stay at the head of its file."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return text or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def _arguments(given: list[Any] | str) -> str:
    """A Python expression for the arguments of one call; text is parsed line by line in the sandbox."""
    if isinstance(given, str):
        return f"map(_value, {given.strip().splitlines()!r})" if given.strip() else "[]"
    try:
        return f"json.loads({json.dumps(given)!r})"
    except (TypeError, ValueError):
        return _literal(given)


def _literal(value: Any) -> str:
    """Python source of a value that JSON cannot hold."""
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return f"{type(value).__name__}([{', '.join(map(_literal, value))}])"
    return repr(value)


def read_report(text: str) -> Any:
    """The value that a program reported. Raises ValueError, TypeError or KeyError where it is none."""
    return _value(json.loads(text))


def _value(x: Any) -> Any:
    if not isinstance(x, list):
        return x
    kind, items = x
    if kind == "dict":
        return {_value(k): _value(v) for k, v in items}
    if kind in ("list", "tuple", "set"):
        return {"list": list, "tuple": tuple, "set": frozenset}[kind](map(_value, items))
    if kind == "text":
        return items
    return {"int": _from_hexadecimal, "float": float, "complex": complex, "bytes": ast.literal_eval}[kind](items)


def _from_hexadecimal(digits: str) -> int:
    return int(digits, 16)


def report_size(value: Any) -> int:
    """An upper bound of the bytes in which a program reports `value`."""
    if isinstance(value, str):
        return 12 * len(value) + 2
    if isinstance(value, int):
        return value.bit_length() // 3 + 24
    if isinstance(value, dict):
        return sum(report_size(k) + report_size(v) + 8 for k, v in value.items()) + 12
    if isinstance(value, list | tuple | set | frozenset):
        return sum(report_size(item) + 2 for item in value) + 16
    return 64
