"""The synthetic baseline ("stitched" in the paper): worked solutions with calculator annotations as tool calls.

GSM8K writes `48/2 = <<48/2=24>>24 clips`. The text before each annotation becomes an assistant turn that ends with a
call `print(48/2)`, and `24` becomes the tool's output. Nothing is executed, and no model decides where to call: the
calls are where the annotator used a calculator.
"""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction
from typing import Any

from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.collect.collection import Sample, problem_of
from open_agentrl_jax.data.conversations import Conversation
from open_agentrl_jax.types import Message, Task, ToolCall

ANNOTATION = re.compile(r"<<([^<>]*?)=([^<>=]*)>>")
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_ROUNDED = Fraction(1, 100)  # annotators round to cents


class NotStitchable(ValueError):
    """The reason why a solution cannot be stitched; a heading of the counts."""


def stitch(task: Task) -> Sample:
    """Converts the annotated solution of a problem to a conversation with tool calls.

    Args:
        task: `extra["solution"]` contains the annotated solution.

    Raises:
        NotStitchable: there is no solution or annotation, or an annotation is not arithmetic.
    """
    solution = str(task.extra.get("solution") or "")
    if not solution:
        raise NotStitchable("no_solution")
    pieces = ANNOTATION.split(solution)
    if len(pieces) == 1:
        raise NotStitchable("no_annotation")
    messages = list(task.messages)
    for before, expression, result in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=False):
        code = _tidy(expression)
        if (value := evaluate(code)) is None:
            raise NotStitchable("no_arithmetic")
        annotated = evaluate(_tidy(result))
        if annotated is None or abs(value - annotated) > _ROUNDED * max(1, abs(value)):
            raise NotStitchable("wrong_annotation")
        call = ToolCall(PythonTool.name, {"code": f"print({code})"})
        messages += [Message("assistant", before.strip(), [call]), Message("tool", _tidy(result))]
    messages.append(Message("assistant", f"{pieces[-1].strip()}\nThe answer is \\boxed{{{task.answer}}}.".strip()))
    calls = len(pieces) // 3
    columns: dict[str, Any] = {"problem_id": task.id, "try": 0, "tool_calls": calls, "tool_success": calls}
    conversation = Conversation(f"{task.id}/stitched", messages, [PythonTool.schema], task.source)
    return Sample(conversation, problem_of(task), calls, calls, columns)


def _tidy(expression: str) -> str:
    """Arithmetic in Python syntax: without currency, commas in numbers and leading zeros."""
    plain = re.sub(r"[$,\s]", "", expression).translate(str.maketrans("×÷−", "*/-"))
    plain = re.sub(r"(\d)[xX](?=[\d.(])", r"\1*", plain)
    return re.sub(r"(?<![\d.])0+(?=\d)", "", plain)


def evaluate(expression: str) -> Fraction | None:
    """The exact value of plain arithmetic; None for anything else. Nothing is executed."""

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return Fraction(_OPERATIONS[type(node.op)](value(node.left), value(node.right)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            return value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Fraction(ast.get_source_segment(expression, node) or "")  # 0.1 is a tenth
        raise ValueError("no arithmetic")

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
