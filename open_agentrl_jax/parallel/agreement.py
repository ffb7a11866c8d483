"""Several processes, one run: all there, all of one config and one code, and who keeps the others waiting is named.

A collective operation hangs where one process is missing, and computes nonsense where one runs another program. So
before the first one, and wherever they should meet, processes leave notes with JAX's coordinator, which can be read
with a time limit.
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
from typing import Any

import jax

from open_agentrl_jax.settings import differences
from open_agentrl_jax.types import UserError

_calls: collections.Counter[str] = collections.Counter()  # so that a place met twice has notes of its own
_left: list[str] = []  # this process's notes that others may still want to read


def agree(facts: Mapping[str, Any], *, seconds: float = 120.0) -> None:
    """Returns where every process calls this with equal facts; a single process always does.

    Args:
        facts: what must be equal, by name; JSON, nested as deep as you like.
        seconds: to wait for the slowest process.

    Raises:
        UserError: a process did not come, or its facts differ; all processes that came say the same.
    """
    theirs = _exchange("agree", dict(facts), seconds)
    first, *others = theirs
    for number, note in enumerate(others, start=1):
        differing = [f"{name} is {b!r}, not {a!r}" for name, a, b in differences(first["facts"], note["facts"])]
        if differing:
            raise UserError(
                f"distributed: process {number} on {note['host']} differs from process 0 on {first['host']}: "
                f"{'; '.join(differing[:3])}; start all processes with the same config and the same code"
            )


def meet(place: str, *, seconds: float = 600.0) -> None:
    """A barrier that names who is late.

    Args:
        place: where in the program, e.g. "checkpoint"; all processes pass the same places in the same order.
        seconds: to wait.

    Raises:
        UserError: one or more processes did not come.
    """
    _exchange(place, {}, seconds)


@functools.cache
def code_version() -> str:
    """The commit, where there is one, and a hash of the package's own source files."""
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


def _exchange(place: str, facts: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """Leaves this process's note and returns everyone's, in the order of the processes."""
    note = {"host": socket.gethostname(), "facts": json.loads(json.dumps(facts))}
    count, me = jax.process_count(), jax.process_index()
    if count == 1:
        return [note]
    from jax._src import distributed  # the coordinator's notes have no public door; orbax takes this one, too

    client: Any = distributed.global_state.client
    _calls[place] += 1
    name = f"open_agentrl_jax/{place}/{_calls[place]}"
    client.key_value_set(f"{name}/{me}", json.dumps(note))
    _left.append(f"{name}/{me}")
    deadline = time.monotonic() + seconds
    notes: list[dict[str, Any]] = []
    missing = []
    for process in range(count):
        left = max(100, int(1000 * (deadline - time.monotonic())))
        try:
            notes.append(json.loads(client.blocking_key_value_get(f"{name}/{process}", left)))
        except jax.errors.JaxRuntimeError:
            missing.append(process)
    if missing:
        who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
        raise UserError(
            f"distributed: {who} of {count} did not come to {place!r} within {seconds:g} s; look at the log there, "
            "and start all of them again with the same command"
        )
    while len(_left) > 1:  # who is here has read all that was left before
        client.key_value_delete(_left.pop(0))
    return notes
