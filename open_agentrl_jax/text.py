"""Text of models, tools and data sets: reading values, shortening output."""

from __future__ import annotations

import ast
import decimal
import json
import re
from typing import Any

MAX_DIGITS = 1_000_000  # digits of one integer in a test
_LONG_INTEGER = re.compile(r"(?<![\w.])\d{4301,}(?![\w.])")
# Models and tools write escape sequences: they would move the cursor, retitle the window or fill the clipboard. Without
# their control characters they are harmless text. Bidirectional overrides disguise code.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_HARMLESS = dict.fromkeys(set(_CONTROLS) - {ord("\n"), ord("\t")})
NOTICE = "\n[... {} characters cut from the middle ...]\n"


def printable(text: str) -> str:
    """Text without control characters, except line breaks and tabs."""
    return text.translate(_HARMLESS)


def cut_middle(text: str, characters: int, notice: str = NOTICE) -> str:
    """Text whose middle is replaced by a notice where it is longer than `characters`.

    Args:
        text: the output of a tool.
        characters: characters that are kept, half from each end. The notice comes on top of them.
        notice: replaces the middle; "{}" in it becomes the number of characters that were cut.
    """
    half = characters // 2
    if len(text) <= characters:
        return text
    return text[:half] + notice.format(len(text) - 2 * half) + text[len(text) - half :]


def read_object(tests: Any) -> dict[str, Any]:
    """An object given as itself, as JSON or as a Python literal. Raises ValueError for anything else."""
    spec = read_literal(tests) if isinstance(tests, str) else tests
    if not isinstance(spec, dict):
        raise ValueError(f"the tests must be an object, not {type(spec).__name__}")
    return spec


def read_literal(text: str) -> Any:
    """The value of JSON or of a Python literal; text that is neither is returned as it is."""
    for read in (_json, lambda text: ast.literal_eval(hexadecimal(text))):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def parse(source: str) -> ast.Module:
    """The syntax tree of `source`, integers of any length included. Raises SyntaxError or ValueError."""
    try:
        return ast.parse(hexadecimal(source))
    except (RecursionError, MemoryError) as error:
        raise SyntaxError(f"too deeply nested ({type(error).__name__})") from error


def hexadecimal(source: str) -> str:
    """`source` with decimal integers beyond Python's limit of 4,300 digits as hexadecimal ones, which have no limit."""
    if len(source) <= 4300 or not _LONG_INTEGER.search(source):
        return source
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _LONG_INTEGER.sub(lambda digits: hex(_integer(digits[0])), source)
    return source  # the digits are part of a string or a comment


def _json(text: str) -> Any:
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits) if len(digits) <= 4300 else int(decimal.Decimal(digits))
