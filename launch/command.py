"""What every command shares: flags to a checked Config, a user's mistake to one line and exit code 2."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from launch.options import refuse
from launch.reference import sections
from open_agentrl_jax.config import Config, validate
from open_agentrl_jax.types import UserError

ROOT = Path(__file__).parents[1]  # where configs/ lies: the checkout, or site-packages
HELP = ("-h", "-help", "--help", "--helpshort")


def _find_config(argument: str) -> str:
    """`--config=FILE` as it stands, or with the FILE of ours where the current directory has none of that name."""
    name, _, value = argument.partition("=")
    path = value.partition(":")[0]  # what follows a colon is told to get_config()
    if name != "--config" or not path or Path(path).is_file():
        return argument
    if (ROOT / path).is_file():
        return f"--config={ROOT / value}"
    names = ", ".join(sorted(file.stem for file in (ROOT / "configs").glob("[a-z]*.py")))
    return refuse(f"--config={value}: no such file; give a path, or configs/NAME.py of {names}")


def _help() -> None:
    """The command's page: what it does, and all flags of ours, wherever they were defined."""
    for module in ("launch.command", "launch.options"):
        for flag in flags.FLAGS.flags_by_module_dict().get(module, ()):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.usage(shorthelp=True, writeto_stdout=True)
    sys.exit(0)


def _unknown_field(argv: Sequence[str]) -> str:
    """What to say of the first `--config.` flag that names no field; empty where all do."""
    fields = [f"{name}.{f.name}".lstrip(".") for name, part in sections(Config()) for f in dataclasses.fields(part)]
    for argument in argv:
        field = argument.partition("=")[0].removeprefix("--config.")
        if argument.startswith("--config.") and field not in fields:
            near = difflib.get_close_matches(field, fields, 1)
            meant = f"did you mean --config.{near[0]}? " if near else ""
            return f"--config.{field}: no such field; {meant}docs/config.md lists the fields"
    return ""


def _parse(argv: Sequence[str]) -> list[str]:
    if any(argument in HELP for argument in argv[1:]):
        _help()
    argv = [_find_config(argument) for argument in argv]
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        return refuse(f"{error} (--help lists the flags)")
    except KeyError as error:  # ml_collections: a field that is not there
        return refuse(_unknown_field(argv) or f"{error.args[0]}; docs/config.md lists the fields")
    except (OSError, ImportError) as error:
        text = " ".join(str(error).split())
        return refuse(f"--config: {text}; give the path of a file in configs/")
    except (TypeError, ValueError, SyntaxError) as error:
        return refuse(f"{' '.join(str(error).split())}; see the field's type in docs/config.md")


def config_flag() -> Callable[[], Config]:
    """Defines `--config` and returns what reads it: the Config, refused with every fault named if it cannot work."""
    holder = config_flags.DEFINE_config_file(
        "config",
        help_string="a file, e.g. configs/quickstart.py; its fields (docs/config.md) are flags: --config.rl.steps=9",
    )

    def load() -> Config:
        try:
            config = holder.value
            valid = config is None or (hasattr(config, "name") and isinstance(config, Config))  # touching it loads it
        except Exception as error:  # the config file is the user's code: whatever it raises is told in one line
            raise UserError(f"--config: {' '.join(str(error).split())}") from error
        if config is None:
            raise UserError("--config is missing; give a file of configs/, e.g. --config=configs/quickstart.py")
        if not valid:
            raise UserError("--config: its get_config() must return an open_agentrl_jax.config.Config")
        problems = validate(config)
        if problems:
            raise UserError(f"config {config.name!r}: " + "; ".join(problems))
        return config

    return load


def profile_flag() -> flags.FlagHolder[bool]:
    """Defines `--profile`, of the commands that train."""
    return flags.DEFINE_bool("profile", False, "write a jax.profiler trace of two steps to <run_dir>/profile/<phase>")


def run(main: Callable[[], int | None]) -> None:
    """Runs a command: parses flags, calls `main`, turns UserError into one line and exit code 2."""

    def entry(arguments: list[str]) -> None:
        if len(arguments) > 1:
            refuse(f"unexpected argument {arguments[1]!r}; options start with --")
        try:
            sys.exit(main() or 0)
        except UserError as error:
            refuse(str(error))

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it says that torch is missing; we want none
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
    app.run(entry, flags_parser=_parse)
