"""A command's own flags as a dataclass: defined when the command runs, an ordinary argument everywhere else.

Commands without a config take argparse's flags, with `Parser`, which tells a mistake as all commands do.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from absl import flags

T = TypeVar("T")
USER_EXIT = 2


def refuse(message: str) -> NoReturn:
    """Prints one line and ends with the exit code of a user's mistake."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_EXIT)


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake is one line, without the page of `--help`."""

    def error(self, message: str) -> NoReturn:
        """See `refuse`."""
        refuse(f"{message} (--help lists the flags)")


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field of such a dataclass. `limits` are those of absl's DEFINE functions, or `choices`."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def define(options: type[T]) -> Callable[[], T]:
    """Defines a flag for each field, by the type of its default, and returns what reads them all."""
    kinds = {str: flags.DEFINE_string, int: flags.DEFINE_integer, bool: flags.DEFINE_bool}
    holders = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]  (T is a dataclass)
        more = dict(field.metadata)
        help = more.pop("help")
        if "choices" in more:
            default: Any = field.default
            holders[field.name] = flags.DEFINE_enum(field.name, default, more["choices"], help)
        else:
            holders[field.name] = kinds[type(field.default)](field.name, field.default, help, **more)
    return lambda: options(**{name: holder.value for name, holder in holders.items()})
