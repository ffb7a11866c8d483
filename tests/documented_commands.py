"""Reads command lines, a JSON list of argument lists on standard input, as each command would, and runs none of them.

Prints a JSON list with what each was refused for; "" where it would have begun.
"""

import argparse
import contextlib
import io
import json
import runpy
import sys

from absl import app, flags

from open_agentrl_jax.config import validate

BUILT_IN = dict(flags.FLAGS._flags())  # those of absl itself


class Read(Exception):
    """The arguments were understood: here the command would begin."""


def begin(entry, flags_parser):
    left = flags_parser(sys.argv)
    if len(left) > 1:
        raise ValueError(f"unexpected {left[1]!r}")
    config = flags.FLAGS.config if "config" in flags.FLAGS else None
    if config is not None and (problems := validate(config)):
        raise ValueError("; ".join(problems))
    raise Read


def parse(parser, arguments=None, namespace=None):
    parse_known(parser, arguments, namespace)
    raise Read


def refusal(command):
    for name in list(flags.FLAGS._flags()):
        if name not in BUILT_IN:
            delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    module, *sys.argv[1:] = command
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Read:
        return ""
    except (Exception, SystemExit) as error:
        return f"{error!r} {told.getvalue()}"
    return "it ended without reading its arguments"


app.run, parse_known, argparse.ArgumentParser.parse_args = begin, argparse.ArgumentParser.parse_args, parse
json.dump([refusal(command) for command in json.load(sys.stdin)], sys.stdout)
