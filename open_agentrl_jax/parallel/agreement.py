"""Checks that all processes of a run are present and have the same config and code; errors name the process at fault.

A collective operation hangs if a process is missing, and computes nonsense if one runs another program. Processes
therefore exchange values through the key-value store of JAX's coordinator, whose reads have a time limit.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import pathlib
import socket
import subprocess
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

from open_agentrl_jax.settings import differences
from open_agentrl_jax.types import UserError

T = TypeVar("T")
_calls: collections.Counter[str] = collections.Counter()  # calls per place: each call has keys of its own
_written: list[str] = []  # this process's keys that others may still have to read


def agree(facts: Mapping[str, Any], *, seconds: float = 120.0) -> None:
    """Returns if every process calls this with equal facts; with one process it always does.

    Args:
        facts: values that must be equal, by name; JSON, nested to any depth.
        seconds: time limit for the slowest process.

    Raises:
        UserError: a process is missing or its facts differ. Every process raises the same error.
    """
    first, *others = exchange("agree", {"host": socket.gethostname(), "facts": dict(facts)}, seconds=seconds)
    for number, other in enumerate(others, start=1):
        changed = [f"{name} is {b!r}, not {a!r}" for name, a, b in differences(first["facts"], other["facts"])]
        if changed:
            raise UserError(
                f"distributed: process {number} on {other['host']} differs from process 0 on {first['host']}: "
                f"{'; '.join(changed[:3])}; start all processes with the same config and the same code"
            )


def meet(place: str, *, seconds: float = 600.0) -> None:
    """A barrier whose error names the missing processes.

    Args:
        place: name of the barrier, e.g. "checkpoint"; all processes pass the same barriers in the same order.
        seconds: time limit.

    Raises:
        UserError: one or more processes did not arrive in time.
    """
    exchange(place, None, seconds=seconds)


@functools.cache
def code_version() -> str:
    """The git commit, if there is one, and a hash of the package's source files."""
    package = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    command = ["git", "-C", str(package), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        commit = done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{commit or 'no commit'}, source {digest.hexdigest()[:12]}"


def exchange(place: str, value: T, *, seconds: float) -> list[T]:
    """Every process's `value` (JSON), in the order of the processes; see `meet`."""
    value = json.loads(json.dumps(value))
    count, me = jax.process_count(), jax.process_index()
    if count == 1:
        return [value]
    from jax._src import distributed  # the coordinator's store has no public name; orbax imports this one, too

    client: Any = distributed.global_state.client
    _calls[place] += 1
    name = f"open_agentrl_jax/{place}/{_calls[place]}"
    client.key_value_set(f"{name}/{me}", json.dumps(value))
    _written.append(f"{name}/{me}")
    deadline = time.monotonic() + seconds
    values: list[T] = []
    missing = []
    for process in range(count):
        left = max(100, int(1000 * (deadline - time.monotonic())))
        try:
            values.append(json.loads(client.blocking_key_value_get(f"{name}/{process}", left)))
        except jax.errors.JaxRuntimeError:
            missing.append(process)
    if missing:
        who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
        raise UserError(
            f"distributed: {who} of {count} did not come to {place!r} within {seconds:g} s; look at the log there, "
            "and start all of them again with the same command"
        )
    while len(_written) > 1:  # every process that is here has read all earlier keys
        client.key_value_delete(_written.pop(0))
    return values
