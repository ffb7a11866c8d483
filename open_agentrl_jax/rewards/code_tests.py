"""Reads the tests of a coding problem: stdin/stdout pairs, function calls, asserts, or a `check(candidate)` function.

`read_tests` accepts the three schemas of docs/graders.md as an object, as JSON or as a Python literal, and raises
ValueError with the reason for anything else, so that a bad row is found when the data is read.
"""

from __future__ import annotations

import ast
import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from open_agentrl_jax.text import parse, read_literal, read_object

_CONSTRUCTORS = {"set": set, "frozenset": frozenset, "float": float, "tuple": tuple, "list": list, "dict": dict}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Standard input and expected standard output of each run."""

    inputs: list[str]
    outputs: list[str]


@dataclasses.dataclass(frozen=True)
class Calls:
    """Calls of the function or `Solution` method `name`.

    Each element of `arguments` is a list of values, or text with one value per line.
    """

    name: str
    arguments: Sequence[list[Any] | str]
    expected: list[Any]


@dataclasses.dataclass(frozen=True)
class Check:
    """One assert, or one block of statements that contains asserts.

    `setup` runs before `statement`, both at module level. Where `parameter` is set, `inner_setup` and `statement` run
    inside a function that binds it to `argument`. An assert that compares with literals has `values`, (expression,
    expected value) pairs; of those only the expressions enter the sandbox.
    """

    setup: str
    statement: str
    values: tuple[tuple[str, Any], ...] = ()
    parameter: str = ""
    argument: str = ""
    inner_setup: str = ""


@dataclasses.dataclass(frozen=True)
class Asserts:
    """Asserts, each with what must run before it. `prefix` runs before the program."""

    prefix: str
    checks: list[Check]


Tests = Pairs | Calls | Asserts


def read_tests(tests: Any) -> Tests:
    """Reads one problem's tests.

    Args:
        tests: {"inputs", "outputs", "fn_name"?}, {"assert_case": [lines], "import_prefix"?} or
            {"test_code", "entry_point", "import_prefix"?}; an object, JSON, or a Python literal.

    Raises:
        ValueError: the tests follow none of the schemas, or there are none. The message gives the reason.
    """
    spec = read_object(tests)
    try:
        if spec.get("assert_case") or spec.get("test_code"):
            return _read_asserts(spec)
        if spec.get("inputs") is None or spec.get("outputs") is None:
            keys = ", ".join(sorted(map(str, spec))) or "none"
            raise ValueError(
                f"the tests must hold inputs and outputs, assert_case, or test_code; their keys are {keys}"
            )
        return _read_pairs(spec)
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"the tests cannot be read ({type(error).__name__}: {error})") from error


def _read_pairs(spec: dict[str, Any]) -> Pairs | Calls:
    inputs, outputs = _list(spec["inputs"], "inputs"), _list(spec["outputs"], "outputs")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs")
    if not inputs:
        raise ValueError("there are no tests")
    name = spec.get("fn_name")
    if not name:
        return Pairs([_lines(i) for i in inputs], [_lines(o) for o in outputs])
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"fn_name {name!r} is not the name of a function")
    arguments = [i if isinstance(i, list | str) else [i] for i in inputs]
    return Calls(name, arguments, [read_literal(o) if isinstance(o, str) else o for o in outputs])


def _list(value: Any, field: str) -> list[Any]:
    value = read_literal(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        raise ValueError(f"{field} must be a list, not {type(value).__name__}")
    return list(value)


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _read_asserts(spec: dict[str, Any]) -> Asserts:
    body, candidate = _statements(spec), str(spec.get("entry_point") or "").strip()
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef) and _tests(node)}
    if functions and not any(_asserts(n) or _called(n, functions) for n in body if not isinstance(n, ast.FunctionDef)):
        if not candidate:
            raise ValueError(f"entry_point is missing: nothing calls {next(reversed(functions))}")
        body += ast.parse(f"{next(reversed(functions))}({candidate})").body
    elif candidate:
        body = [*ast.parse(f"candidate = {candidate}").body, *body]
    setup: list[ast.stmt] = []
    checks: list[Check] = []
    for node in body:
        called = _called(node, functions)
        if called and called[1] and _expandable(called[0]):
            function, argument = called
            place = {"setup": _source(setup), "parameter": function.args.args[0].arg, "argument": argument}
            checks += [dataclasses.replace(c, inner_setup=c.setup, **place) for c in _checks(function.body)]
        elif called or (_asserts(node) and not isinstance(node, ast.FunctionDef | ast.ClassDef)):
            checks.append(_check(setup, node))
            setup.append(_replayed(node)) if _stateful(node, setup) else None
        else:
            setup.append(node)
    if not checks:
        raise ValueError("there is no assert")
    prefix = str(spec.get("import_prefix") or "")
    try:
        parse(prefix)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"import_prefix is not Python ({error})") from error
    return Asserts(prefix, checks)


def _statements(spec: dict[str, Any]) -> list[ast.stmt]:
    """The statements of test_code, or of the lines of assert_case: lines of one text, or texts of their own."""
    if spec.get("assert_case"):
        lines = spec["assert_case"]
        lines = (
            [lines] if isinstance(lines, str) and not lines.lstrip().startswith("[") else _list(lines, "assert_case")
        )
    else:
        lines = [spec["test_code"]]
    if not all(isinstance(line, str) for line in lines):
        raise ValueError("asserts must be text")
    try:
        return parse(textwrap.dedent("\n".join(lines))).body
    except (SyntaxError, ValueError) as whole:
        try:
            return [node for line in lines for node in parse(textwrap.dedent(line).strip()).body]
        except (SyntaxError, ValueError):
            raise ValueError(f"the asserts are not Python ({whole})") from whole


def _checks(body: list[ast.stmt]) -> list[Check]:
    """The asserts of a function body, each with the statements before it."""
    setup: list[ast.stmt] = []
    checks: list[Check] = []
    for node in body:
        if _asserts(node) and not isinstance(node, ast.FunctionDef | ast.ClassDef):
            checks.append(_check(setup, node))
            setup.append(_replayed(node)) if _stateful(node, setup) else None
        else:
            setup.append(node)
    return checks


def _check(setup: list[ast.stmt], node: ast.stmt) -> Check:
    values = _equations(node.test) if isinstance(node, ast.Assert) else ()
    return Check(_source(setup), _source([node]), values)


def _source(nodes: list[ast.stmt]) -> str:
    """Python text of the statements; integers are hexadecimal, which has no limit of digits."""
    return hexadecimal_unparse(ast.Module(nodes, []))


def hexadecimal_unparse(tree: ast.AST) -> str:
    """`ast.unparse` for trees with integers of any length."""
    try:
        return ast.unparse(tree)
    except ValueError:
        return ast.unparse(_Hexadecimal().visit(tree))


class _Hexadecimal(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        long = isinstance(node.value, int) and node.value.bit_length() > 14_000
        return ast.copy_location(ast.Name(hex(node.value)), node) if long else node  # type: ignore[arg-type]


def _asserts(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Assert) for inner in ast.walk(node))


def _tests(function: ast.FunctionDef) -> bool:
    """Whether a function of the tests is one that tests its argument."""
    first = function.args.args[0].arg if function.args.args else ""
    return _asserts(function) or function.name == "check" or first == "candidate"


def _called(node: ast.stmt, functions: dict[str, ast.FunctionDef]) -> tuple[ast.FunctionDef, str] | None:
    """(function, its argument) where the statement calls one of the functions that hold asserts."""
    call = node.value if isinstance(node, ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in functions:
        return None
    simple = len(call.args) == 1 and not call.keywords and not isinstance(call.args[0], ast.Starred)
    return functions[call.func.id], ast.unparse(call.args[0]) if simple else ""


def _expandable(function: ast.FunctionDef) -> bool:
    """Whether the asserts of a function can run one by one: it takes one argument and returns nothing."""
    arguments = function.args
    one = len(arguments.args) == 1 and not (arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg)
    leaves = (ast.Return, ast.Yield, ast.YieldFrom, ast.Global, ast.Nonlocal)
    if not one or function.decorator_list or any(isinstance(inner, leaves) for inner in ast.walk(function)):
        return False
    return _asserts(function.body[-1])  # statements after the last assert would never run


def _stateful(node: ast.stmt, setup: list[ast.stmt]) -> bool:
    """Whether an assert uses a variable of the setup, whose state it may change for the asserts after it."""
    assigned = {
        inner.id
        for statement in setup
        for inner in ast.walk(statement)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
    } - {"candidate"}
    return any(isinstance(inner, ast.Name) and inner.id in assigned for inner in ast.walk(node))


def _replayed(node: ast.stmt) -> ast.stmt:
    """The statement as setup of later asserts: run for its effects, whatever it raises."""
    node = ast.Expr(node.test) if isinstance(node, ast.Assert) else node
    handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
    return ast.fix_missing_locations(ast.copy_location(ast.Try([node], [handler], [], []), node))


def _equations(test: ast.expr) -> tuple[tuple[str, Any], ...]:
    """An assertion as (expression, expected value) pairs; empty where it is anything but comparisons with literals."""
    waiting, pairs = [test], []
    try:
        while waiting:
            test = waiting.pop(0)
            if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
                waiting = [*test.values, *waiting]
                continue
            if not isinstance(test, ast.Compare) or len(test.ops) != 1:
                return ()
            left, right = test.left, test.comparators[0]
            if isinstance(test.ops[0], ast.Is) and isinstance(right, ast.Constant):
                pairs.append((hexadecimal_unparse(test), True))
            elif isinstance(test.ops[0], ast.Eq):
                if _is_literal(left):
                    left, right = right, left
                pairs.append((hexadecimal_unparse(left), _constant(right)))
            else:
                return ()
        return tuple(pairs)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return ()


def _is_literal(node: ast.expr) -> bool:
    return not any(isinstance(inner, ast.Name | ast.Call) for inner in ast.walk(node))


def _constant(node: ast.expr) -> Any:
    """The value of a literal, or of a built-in type called with one. Raises ValueError or TypeError for others."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CONSTRUCTORS:
        if node.keywords:
            raise ValueError("keyword arguments")
        return _CONSTRUCTORS[node.func.id](*map(ast.literal_eval, node.args))
    return ast.literal_eval(node)
