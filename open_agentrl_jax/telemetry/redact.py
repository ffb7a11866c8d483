"""Removes secrets from whatever is published: config.json, reports, Hub cards, wandb, logs.

A secret is the value of a name such as `api_key`, `HF_TOKEN` or `password`, in a dictionary, a query string, a command
line or a header, and the user-info of a URL.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_SECRET = r"(?:api|access|auth)?(?:key|token|password|passwd|pwd|secret|credentials?)"
_NAME = re.compile(rf"(?:.*[-_. ])?(?:{_SECRET}|authorization)", re.IGNORECASE)
_PATTERNS = [
    (re.compile(r"(?<=://)[^/\s@'\"]+@"), f"{HIDDEN}@"),  # https://user:password@host
    (re.compile(rf"(\b(?:\w+[-_.])*{_SECRET}\s*=\s*)[^\s&,;'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),  # API_KEY=...
    (re.compile(rf"(--?(?:\w+[-_])*{_SECRET}\s+)[^\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),  # --api-key ...
    (re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:sk|hf|ghp|glpat|xox[bp])[-_][\w-]{16,}"), HIDDEN),  # keys that show what they are
]


def redact(value: Any) -> Any:
    """A copy of nested dictionaries, lists and texts with every secret replaced by `***`."""
    if isinstance(value, str):
        for pattern, replacement in _PATTERNS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, dict):
        return {
            name: HIDDEN if inner and isinstance(inner, str) and _NAME.fullmatch(str(name)) else redact(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(map(redact, value))
    return value
