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
_GRACE = 5.0  # seconds that the other processes wait longer than process 0, which names the missing ones


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
    """Every process's `value` (JSON), in the order of the processes; see `meet`.

    Process 0 reads all values and writes one list, which the others read: two messages per process.
    """
    value = json.loads(json.dumps(value))
    count, me = jax.process_count(), jax.process_index()
    if count == 1:
        return [value]
    _calls[place] += 1
    name = f"open_agentrl_jax/{place}/{_calls[place]}"
    _write(f"{name}/{me}", json.dumps(value))
    if me == 0:
        deadline = time.monotonic() + seconds
        found = {process: _read(f"{name}/{process}", deadline) for process in range(count)}
        _write(f"{name}/all", json.dumps([found, sorted(p for p, text in found.items() if text is None)]))
    text = _read(f"{name}/all", time.monotonic() + seconds + _GRACE)
    found, missing = ({}, [0]) if text is None else json.loads(text)
    if missing:
        who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
        raise UserError(
            f"distributed: {who} of {count} did not come to {place!r} within {seconds:g} s; look at the log there, "
            "and start all of them again with the same command"
        )
    # Process 0 has read the values of this call, and every process the list of the call before.
    while len(_written) > (1 if me == 0 else 0):
        _client().key_value_delete(_written.pop(0))
    return [json.loads(found[str(process)]) for process in range(count)]


def raise_flag(name: str) -> None:
    """Makes `flag_raised(name)` true in all processes, until the end of the run."""
    if jax.process_count() > 1:
        _client().key_value_set(f"open_agentrl_jax/flags/{name}", "raised", allow_overwrite=True)


def flag_raised(name: str) -> bool:
    """Whether any process has called `raise_flag(name)`."""
    if jax.process_count() == 1:
        return False
    try:
        return bool(_client().key_value_try_get(f"open_agentrl_jax/flags/{name}"))
    except jax.errors.JaxRuntimeError:  # NOT_FOUND
        return False


def _write(key: str, text: str) -> None:
    _client().key_value_set(key, text)
    _written.append(key)


def _read(key: str, deadline: float) -> str | None:
    """The value of a key once it is written; None after the deadline."""
    left = max(100, int(1000 * (deadline - time.monotonic())))
    try:
        return _client().blocking_key_value_get(key, left)
    except jax.errors.JaxRuntimeError:
        return None


def _client() -> Any:
    from jax._src import distributed  # the coordinator's store has no public name; orbax imports this one, too

    return distributed.global_state.client
