"""What all commands share: flags, a checked Config, and errors as one line with exit code 2.

Commands with a config define their own flags with `define`; commands without one use `Parser`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from open_agentrl_jax.config import Config, expand_home, settings, validate
from open_agentrl_jax.telemetry.redact import redact
from open_agentrl_jax.text import printable
from open_agentrl_jax.types import UserError

T = TypeVar("T")
ROOT = Path(__file__).parents[1]  # the parent of configs/: the checkout, or site-packages
HELP = ("-h", "-help", "--help", "--helpshort")
USER_EXIT, INTERRUPT_EXIT = 2, 130
MACHINE_FAULTS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EDQUOT)


def refuse(message: str) -> NoReturn:
    """Prints one line, without secrets and control characters, and exits with the code of a user error."""
    print(f"error: {printable(redact(message))}", file=sys.stderr)
    sys.exit(USER_EXIT)


class Parser(argparse.ArgumentParser):
    """argparse's parser; an error is one line without usage, and `~/` in a value is the home directory."""

    def error(self, message: str) -> NoReturn:
        """See `refuse`."""
        refuse(f"{message} (--help lists the flags)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse."""
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            setattr(found, name, _home(value))
        return found, rest


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field of a command's flags. `limits` are keyword arguments of absl's DEFINE functions, or `choices`."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def define(options: type[T]) -> Callable[[], T]:
    """Defines one flag per field, typed by its default, and returns a function that reads them."""
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
    return lambda: options(**{name: _home(holder.value) for name, holder in holders.items()})


def config_flag(adapt: Callable[[Config], None] = lambda config: None) -> Callable[[], Config]:
    """Defines `--config` and returns a function that reads it: a valid Config, or a UserError with every fault.

    Args:
        adapt: changes the config before it is validated.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        help_string="a file, e.g. configs/quickstart.py; its fields (docs/config.md) are flags: --config.rl.steps=9",
    )

    def load() -> Config:
        try:
            config = holder.value
            valid = config is None or (hasattr(config, "name") and isinstance(config, Config))  # hasattr loads it
        except Exception as error:  # the config file is user code and may raise anything
            raise UserError(f"--config: {' '.join(str(error).split())}") from error
        if config is None:
            raise UserError("--config is missing; give a file of configs/, e.g. --config=configs/quickstart.py")
        if not valid:
            raise UserError("--config: its get_config() must return an open_agentrl_jax.config.Config")
        adapt(config)
        if faults := validate(config):
            raise UserError(f"config {config.name!r}: " + "; ".join(faults))
        expand_home(config)
        return config

    return load


def profile_flag() -> flags.FlagHolder[bool]:
    """Defines `--profile` for the commands that train."""
    return flags.DEFINE_bool("profile", False, "write a jax.profiler trace of two steps to <run_dir>/profile/<phase>")


def run(main: Callable[[], int | None]) -> None:
    """Runs a command: parses its flags, calls `main`, and turns user errors into one line and exit code 2."""

    def entry(arguments: list[str]) -> None:
        if len(arguments) > 1:
            refuse(f"unexpected argument {arguments[1]!r}; options start with --")
        for handler in logging.root.handlers:
            handler.addFilter(_without_secrets)
        with one_line_errors():
            sys.exit(main() or 0)

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found", which is intended
    absl_logging.set_verbosity(absl_logging.WARNING)  # JAX logs every backend that it does not find
    app.run(entry, flags_parser=_parse)


def _without_secrets(record: logging.LogRecord) -> bool:
    """A filter of log handlers."""
    record.msg, record.args = redact(record.getMessage()), ()
    return True


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with one line for errors of the user or the machine; others keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPT_EXIT)
    except UserError as error:
        refuse(str(error))
    except Exception as error:
        if text := _machine_fault(error):
            refuse(text)
        raise


def _machine_fault(error: BaseException) -> str:
    """One line for a full disk or a path that cannot be used; "" for other errors."""
    full = os.strerror(errno.ENOSPC)
    for cause in _causes(error):
        if full in str(cause):  # also where a library wraps the number into a text
            quoted = re.search(r'"(/[^"]+)"', str(cause))
            name = getattr(cause, "filename", None) or (quoted[1] if quoted else "")
            where = f"{name}: " if name else ""
            return f"{where}{full}; free some space, then run the same command again"
        if isinstance(cause, OSError) and cause.filename is not None and cause.errno in MACHINE_FAULTS:
            return f"{cause.filename}: {cause.strerror}"
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _home(value: Any) -> Any:
    """A path below the home directory written out; other values unchanged."""
    if isinstance(value, (str, Path)) and str(value).startswith("~/"):
        return type(value)(os.path.expanduser(str(value)))
    return value


def _parse(argv: Sequence[str]) -> list[str]:
    if any(argument in HELP for argument in argv[1:]):
        _help()
    argv = _with_config_found(argv)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        return refuse(f"{error} (--help lists the flags)")
    except KeyError as error:  # ml_collections: no such field
        return refuse(_unknown_field(argv) or f"{error.args[0]}; docs/config.md lists the fields")
    except (OSError, ImportError) as error:
        text = " ".join(str(error).split())
        return refuse(f"--config: {text}; give the path of a file in configs/")
    except (TypeError, ValueError, SyntaxError) as error:
        return refuse(f"{' '.join(str(error).split())}; see the field's type in docs/config.md")


def _help() -> NoReturn:
    """Prints the command's docstring and all flags that this project defines."""
    for flag in flags.FLAGS.flags_by_module_dict().get("launch.command", ()):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.usage(shorthelp=True, writeto_stdout=True)
    sys.exit(0)


def _with_config_found(argv: Sequence[str]) -> list[str]:
    """The arguments, where `--config FILE` and `--config=FILE` also find our FILE from another directory."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] == "--config":
            joined[-1] = f"--config={argument}"
        else:
            joined.append(argument)
    return [_find_config(argument) for argument in joined]


def _find_config(argument: str) -> str:
    name, _, value = argument.partition("=")
    path, colon, variant = _home(value).partition(":")  # the part after the colon is the argument of get_config()
    if name != "--config" or not path:
        return argument
    for file in (Path(path), ROOT / path):
        if file.is_file():
            return f"--config={file}{colon}{variant}"
    names = ", ".join(sorted(file.stem for file in (ROOT / "configs").glob("[a-z]*.py")))
    return refuse(f"--config={value}: no such file; give a path, or configs/NAME.py of {names}")


def _unknown_field(argv: Sequence[str]) -> str:
    """The message for the first `--config.` flag that names no field; "" if all do."""
    fields = [name for name, _, _ in settings(Config())]
    for argument in argv:
        field = argument.partition("=")[0].removeprefix("--config.")
        if argument.startswith("--config.") and field not in fields:
            near = difflib.get_close_matches(field, fields, 1)
            meant = f"did you mean --config.{near[0]}? " if near else ""
            return f"--config.{field}: no such field; {meant}docs/config.md lists the fields"
    return ""
