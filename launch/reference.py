"""The config reference, made from the dataclasses of config.py and their comments.

python -m launch.reference            # writes docs/config.md; tests/test_docs.py sees whether it is up to date
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
from pathlib import Path
from typing import Any

from launch.options import Parser
from open_agentrl_jax import config

TARGET = Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """# Every field of a config

Made by `python -m launch.reference` from `open_agentrl_jax/config.py`: edit that file, not this one. Each field
is a flag of every command that takes `--config`, e.g. `--config.rl.loss.clip_high=0.315`. Lengths are
tokens, times are seconds.
"""


def comments(source: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the comment on the field's line."""
    said = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            said[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found[node.name, field.target.id] = said.get(field.end_lineno or 0, "")
    return found


def sections(made: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, dataclass instance) of the config and all that it holds, itself first."""
    inner = [(f"{prefix}{f.name}", getattr(made, f.name)) for f in dataclasses.fields(made)]
    nested = [
        entry for name, value in inner if dataclasses.is_dataclass(value) for entry in sections(value, f"{name}.")
    ]
    return [(prefix.rstrip("."), made), *nested]


def text() -> str:
    """The page."""
    said = comments(inspect.getsource(config))
    lines = [HEAD]
    for name, section in sections(config.Config()):
        kind = type(section)
        doc = " ".join((inspect.getdoc(kind) or "").split())
        lines += [f"## {name or 'top level'}", "", doc, "", "| field | default | |", "|---|---|---|"]
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            full = f"{name}.{field.name}".lstrip(".")
            if dataclasses.is_dataclass(value):
                continue
            note = said.get((kind.__name__, field.name), "")
            choices = config.CHOICES.get(full)
            if choices and not all(f'"{choice}"' in note for choice in choices):
                note = " | ".join(f'"{choice}"' for choice in choices) + (f"; {note}" if note else "")
            for plain, written in (("|", "\\|"), ("<", "&lt;")):
                note = note.replace(plain, written)
            lines.append(f"| `{full}` | `{value!r}` | {note} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Parser(prog="launch.reference", description=__doc__).parse_args()
    TARGET.write_text(text())
    print(TARGET)
