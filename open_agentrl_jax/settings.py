"""Typed settings: what a field of the configuration is, and what can be done with all of them.

A configuration is a tree of dataclasses, its sections. `setting` declares a leaf with default, meaning and limits, in
one place; checks, documentation, fingerprints and path expansion read them from there.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

HOME = re.compile(r"(^|[,=])~(?=/|$)")  # a path, or each of several: "~/a.jsonl:3,~/b.jsonl"
BOUNDS = {  # limit -> whether a value breaks it, and how the message names it
    "at_least": (lambda value, limit: value < limit, "at least"),
    "above": (lambda value, limit: value <= limit, "above"),
    "at_most": (lambda value, limit: value > limit, "at most"),
    "below": (lambda value, limit: value >= limit, "below"),
}
KINDS = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string", tuple: "a tuple"}


def setting(
    default: Any,
    help: str = "",
    *,
    at_least: float = 0,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    choices: tuple[str, ...] = (),
    path: bool = False,
    resumable: bool = False,
) -> Any:
    """A field of a config section.

    Args:
        default: its value and type.
        help: its meaning, shown in docs/config.md.
        at_least: lower limit of a number; `above` excludes the limit itself.
        above: likewise, excluded.
        at_most: upper limit; `below` excludes the limit itself.
        below: likewise, excluded.
        choices: allowed values of a string.
        path: names files; a leading `~` is the home directory.
        resumable: may change between a run and its continuation.
    """
    limits = {"above": above, "at_least": at_least, "at_most": at_most, "below": below}
    metadata = {"help": help, "limits": limits, "choices": choices, "path": path, "resumable": resumable}
    return dataclasses.field(default=default, metadata=metadata)


def section(default: Any, *, resumable: bool = False) -> Any:
    """A nested section, made anew for each config by calling `default`."""
    return dataclasses.field(default_factory=default, metadata={"resumable": resumable})


def lookup(config: Any, field: str) -> Any:
    """The value of a dotted field."""
    for part in field.split("."):
        config = getattr(config, part)
    return config


def sections(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, section) of a config, itself first, with the name ""."""
    yield prefix, part
    for field in dataclasses.fields(part):
        name = f"{prefix}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(inner := getattr(part, field.name)):
            yield from sections(inner, name)
        elif isinstance(inner, list | tuple):  # a table, whose rows are sections
            for i, row in enumerate(inner):
                if dataclasses.is_dataclass(row):
                    yield from sections(row, f"{name}[{i}]")


def settings(config: Any) -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted name, section, field) of every field that is not a section itself."""
    for name, part in sections(config):
        for field in dataclasses.fields(part):
            if "limits" in field.metadata:
                yield f"{name}.{field.name}".lstrip("."), part, field


def fault(name: str, value: Any, field: dataclasses.Field) -> str:
    """What is wrong with the value of one field; "" if it is valid."""
    kind: Any = field.type
    fits = isinstance(value, (int, float) if kind is float else (list, tuple) if kind is tuple else kind)
    if not fits or (isinstance(value, bool) and kind is not bool) or (kind is float and not math.isfinite(value)):
        return f"{name} is {value!r}; it must be {KINDS[kind]}"
    if (choices := field.metadata["choices"]) and value not in choices:
        return f"{name} is {value!r}; use one of {', '.join(choices)}"
    if kind in (int, float):
        for limit, bound in field.metadata["limits"].items():
            breaks, words = BOUNDS[limit]
            if breaks(value, bound):
                return f"{name} is {value!r}; it must be {words} {bound:g}"
    return ""


def expand_home(config: Any) -> None:
    """Replaces a leading `~` in every path by the home directory."""
    home = os.path.expanduser("~")
    for _, part, field in settings(config):
        if field.metadata["path"]:
            setattr(part, field.name, HOME.sub(lambda match: match[1] + home, getattr(part, field.name)))


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries; a number has its field's type, so that 20 equals 20.0."""

    def plain(value: Any, kind: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(plain(inner, None) for inner in value)
        return to_dict(value) if dataclasses.is_dataclass(value) else float(value) if kind is float else value

    return {f.name: plain(getattr(config, f.name), f.type) for f in dataclasses.fields(config)}


def fingerprint(config: Any) -> str:
    """A canonical text of all fields that a continued run must share with the run it continues."""

    def shared(part: Any, tree: dict[str, Any]) -> dict[str, Any]:
        kept = [field.name for field in dataclasses.fields(part) if not field.metadata.get("resumable")]
        return {n: shared(getattr(part, n), tree[n]) if isinstance(tree[n], dict) else tree[n] for n in kept}

    return json.dumps(shared(config, to_dict(config)), sort_keys=True)


def differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, its value in a, in b) where two trees of dictionaries differ; None for an absent value."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from differences(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))
    elif a != b:
        yield name, a, b
