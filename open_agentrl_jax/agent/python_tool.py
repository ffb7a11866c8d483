"""The Python tool: runs the model's code in the sandbox and returns a text that the model can act on."""

from __future__ import annotations

import ast
import re
import signal
from collections.abc import Callable
from typing import Any

from open_agentrl_jax.agent.environment import ToolResult
from open_agentrl_jax.reference import python_tool as published
from open_agentrl_jax.sandbox.client import Result, Sandbox, Session
from open_agentrl_jax.types import ToolCall

FENCE = re.compile(
    r"^[ \t]*+```[ \t]*+(?:python3?|py)?[ \t]*+\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
SHOW = "__import__('sys').displayhook(("
LIMIT = 262_144  # characters of code that are parsed here; longer code runs as it is
HEADER = "Traceback (most recent call last):\n"
FRAME = re.compile(r'  File "([^"\n]*)", line \d+.*\n(?:    .*\n?)*')
CELL = re.compile(r"<cell \d+>")

NAME = "code_interpreter"
DESCRIPTION = (
    "Runs a Python program and returns what it printed and the value of its last expression. NumPy, SymPy and SciPy "
    "may be imported. "
)
FRESH = "Every call starts afresh: nothing is left of earlier ones."
KEPT = "Variables of earlier calls are still there."
LOST = "The session ended with this call: its variables are gone, and the next call starts afresh."


def prepare_code(code: str, *, mode: str = "robust") -> str:
    """Makes a program of the model's code.

    Args:
        code: the model's code, perhaps in Markdown fences.
        mode: "robust" removes fences and prints the value of a last expression as a notebook does, by the syntax tree,
            so that code that runs without it still runs. "reference": `reference.python_tool`.

    Returns:
        The program. Line numbers are those of the code inside the fences.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in PREPARE:
        raise ValueError(f"mode {mode!r} of prepare_code must be one of {', '.join(PREPARE)}")
    return PREPARE[mode](code)


def _robust(code: str) -> str:
    return _with_last_value_shown(_without_fences(code))


def _parse(code: str) -> ast.Module | None:
    if len(code) > LIMIT:
        return None
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _without_fences(code: str) -> str:
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    if "```" not in code or _parse(code) is not None:  # a fence inside a string is not a fence
        return code
    blocks = [match[1].rstrip("\n") for match in FENCE.finditer(code)]
    return "\n".join(blocks) + "\n" if blocks else code


def _with_last_value_shown(code: str) -> str:
    module = _parse(code)
    if module is None or not module.body or not isinstance(module.body[-1], ast.Expr):
        return code
    last = module.body[-1]
    if last.end_lineno is None or last.end_col_offset is None:
        return code
    lines = [line.encode() for line in code.split("\n")]  # ast counts bytes
    start, end = last.lineno - 1, last.end_lineno - 1
    if end >= len(lines) or lines[end][last.end_col_offset :].lstrip().startswith(b";"):
        return code  # a notebook prints nothing after a semicolon either
    lines[end] = lines[end][: last.end_col_offset] + b"))" + lines[end][last.end_col_offset :]
    lines[start] = lines[start][: last.col_offset] + SHOW.encode() + lines[start][last.col_offset :]
    shown = b"\n".join(lines).decode()
    return shown if _parse(shown) is not None else code


def shorten_tracebacks(text: str) -> str:
    """Leaves of each traceback the frames in the program's own file: that of its first frame, or a session's cells.

    Args:
        text: what the program wrote to stderr.
    """
    return HEADER.join(map(_own_frames, text.split(HEADER)))


def _own_frames(text: str) -> str:
    files = [frame[1] for frame in FRAME.finditer(text)]
    if not files:
        return text
    own = {file for file in files if CELL.fullmatch(file)} or {files[0]}
    return FRAME.sub(lambda frame: _unwrapped(frame[0]) if frame[1] in own else "", text)


def _unwrapped(frame: str) -> str:
    """A frame without what `prepare_code` inserted, and without the markers below its source, which would be off."""
    if SHOW not in frame:
        return frame
    lines = [line for line in frame.split("\n") if line.isspace() or line.strip(" \t~^") or not line]
    for place, line in enumerate(lines):
        if SHOW in line:
            line = line.replace(SHOW, "")
            lines[place] = line[:-2] if line.endswith("))") and line.count(")") > line.count("(") else line
    return "\n".join(lines)


def _schema(state: str) -> dict[str, Any]:
    code = {"type": "string", "description": "The Python program."}
    parameters = {"type": "object", "properties": {"code": code}, "required": ["code"]}
    return {
        "type": "function",
        "function": {"name": NAME, "description": DESCRIPTION + state, "parameters": parameters},
    }


PREPARE: dict[str, Callable[[str], str]] = {"robust": _robust, "reference": published.prepare_code}
ERRORS: dict[str, Callable[[str], str]] = {"robust": shorten_tracebacks, "reference": str}


class PythonTool:
    """A tool that runs the model's Python.

    Args:
        sandbox: where it runs; the caller closes it.
        timeout: seconds per call.
        memory_mb: MiB per call.
        mode: of `prepare_code`; "reference" also leaves tracebacks long.
        persistent: keep variables across the calls of an episode, in one process that `release` ends. A call that runs
            over its time limit is interrupted and keeps them; one that does not end then loses them.
    """

    name: str = NAME
    schema: dict[str, Any] = _schema(FRESH)

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        timeout: float = 30.0,
        memory_mb: int = 2048,
        mode: str = "robust",
        persistent: bool = False,
    ):
        self.sandbox, self.timeout, self.memory_mb, self.mode, self.persistent = (
            sandbox,
            timeout,
            memory_mb,
            mode,
            persistent,
        )
        if persistent:
            self.schema = _schema(KEPT)
        self._sessions: dict[str, Session] = {}

    async def __call__(self, call: ToolCall, *, session: str = "") -> ToolResult:
        """Runs one call."""
        code = call.arguments.get("code")
        if call.error or not isinstance(code, str):
            return ToolResult(call.error or 'The call needs the argument "code", a string of Python.', "error")
        prepared = prepare_code(code, mode=self.mode)
        if self.persistent and session:
            result, lost = await self._in_session(prepared, session)
        else:
            result, lost = await self.sandbox.run(prepared, timeout=self.timeout, memory_mb=self.memory_mb), False
        answer = self._reply(result)
        if lost and answer.status != "infrastructure":
            answer.text += f"\n{LOST}"
        return answer

    async def _in_session(self, code: str, name: str) -> tuple[Result, bool]:
        """The result of one cell, and whether the variables are lost."""
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = self.sandbox.session(memory_mb=self.memory_mb)
        result = await session.run(code, timeout=self.timeout)
        return result, not session.alive

    async def release(self, session: str) -> None:
        """Ends an episode's session."""
        if (ended := self._sessions.pop(session, None)) is not None:
            await ended.close()

    def _reply(self, result: Result) -> ToolResult:
        if result.status == "infrastructure":
            return ToolResult("The tool could not be reached.", "infrastructure", result.seconds)
        errors = ERRORS[self.mode](result.stderr)
        parts = [text.rstrip("\n") for text in (result.stdout, errors) if text.strip()]
        code = result.return_code
        if result.status == "timeout":
            parts.append(
                f"Stopped: the program ran longer than {self.timeout:g} seconds. Use a faster method or a smaller "
                "case, and print what you have on the way."
            )
        elif result.status == "memory":
            parts.append(f"Stopped: the program needed more than {self.memory_mb} MiB of memory. Keep less at a time.")
        elif code is not None and code < 0:
            parts.append(f"Stopped by signal {_signal_name(-code)}.")
        elif not parts:
            parts.append(
                "It ended without output; use print(...) to see a value." if code == 0 else f"Exit code {code}."
            )
        good = result.status == "finished" and code == 0
        return ToolResult("\n".join(parts), "ok" if good else "error", result.seconds)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
