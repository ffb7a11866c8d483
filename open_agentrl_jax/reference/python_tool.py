"""The published Python tool: code of the first ```python block, and print(<line>) around the last line whatever it is.

Assignments, indented lines, imports, comments and `a;b` break by it. Tracebacks are not shortened.
"""

from __future__ import annotations

import re

from open_agentrl_jax.text import cut_middle

_FENCE = re.compile(r"```python(.*?)```", re.DOTALL)


def prepare_code(code: str) -> str:
    """The program that the published tool makes of the model's code."""
    fenced = _FENCE.search(code)
    lines = (fenced[1].strip() if fenced else code).split("\n")
    last = max((number for number, line in enumerate(lines) if line), default=None)
    if last is not None and not lines[last].startswith("print"):
        lines[last] = f"print({lines[last]})"
    return "\n".join(lines)


def shorten_output(text: str, characters: int) -> str:
    """Tool output of at most `characters` characters, its middle replaced by the published notice."""
    return cut_middle(text, characters, "...(truncated)...")
