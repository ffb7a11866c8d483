"""The table of promises in docs/sandbox.md holds on this machine: promise x plan x Landlock version.

`python -m tests.sandbox.test_matrix` prints the columns that this machine and user can measure.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os

import pytest

from open_agentrl_jax.sandbox import executor, isolation, linux, probes
from open_agentrl_jax.sandbox.executor import Embedded
from tests.sandbox import hosts
from tests.sandbox.cunning import CUNNING
from tests.sandbox.edges import EDGES
from tests.sandbox.hostile import ATTACKS

HOSTILE = {attack.name: attack for attack in [*ATTACKS, *CUNNING, *EDGES]}
# promise: the hostile programs that must be contained for it
PROMISES = {
    "host files cannot be read": ("reads a secret file", "reads the host's accounts"),
    "nothing outside /tmp can be written": ("writes elsewhere", "changes what the next run imports"),
    "no file can be emptied by O_TRUNC": ("empties a library file that it may only read",),
    "no network, no sockets of the host": ("connects", "reaches abstract and other Unix sockets"),
    "no signals to, no tracing of other processes": ("signals others", "traces"),
    "no further processes": ("forks", "starts programs"),
    "no page-cache channel": ("looks which pages of a shared file are cached",),
    "no clocks of other processes": ("reads the clocks of other processes",),
    "no lock or futex channel": (
        "leaves a record lock on a shared file",
        "wakes waiters through a page of a shared file",
    ),
    "no flush of the host's disk": ("has the host flush its disk",),
    "kernel doors stay shut": ("uses exotic kernel doors", "opens io_uring, userfaultfd and bpf in earnest"),
}
FILES = "programs have a private /tmp"
EXISTS = "whether a host path exists stays hidden"


def columns() -> dict[str, isolation.Plan]:
    """Table column: plan, with Landlock as old kernels have it."""
    names = {
        "namespaces of root": "A root",
        "user namespaces": "A user",
        "Landlock and a private user id": "B root",
        "Landlock": "B user",
        "a private user id in an empty root": "B empty root",
    }
    found = {}
    for plan in isolation.PLANS:
        for abi in (1, 2, 3, 4, 6) if plan.landlock else (0,):
            if plan.level != "C":
                label = names[plan.name] + (f", ABI {abi}" + ("+" if abi == 6 else "") if abi else "")
                found[label] = dataclasses.replace(plan, newest_abi=abi if 0 < abi < 6 else 99)
    return found


async def measure(plan: isolation.Plan) -> dict[str, str] | None:
    """Each promise under a plan: "yes" or "no"; None if this machine or user does not offer the plan."""
    if plan.only_root and os.geteuid() != 0:
        return None
    with hosts.host() as facts:
        async with Embedded(plan) as sandbox:
            if not (await probes.attack(sandbox)).holds:
                return None

            async def contained(name: str) -> bool:
                attack = HOSTILE[name]
                options = {"timeout": attack.timeout, "memory_mb": attack.memory_mb}
                return not hosts.verdict(attack, await sandbox.run(attack.program, stdin=facts, **options))

            kept = {}
            for promise, names in PROMISES.items():
                kept[promise] = all([await contained(name) for name in names])
            kept[FILES] = (await sandbox.run("open('/tmp/x', 'w').write('x')")).return_code == 0
            kept[EXISTS] = "True" not in (await sandbox.run("import os; print(os.path.exists('/etc/passwd'))")).stdout
    return {promise: "yes" if true else "no" for promise, true in kept.items()}


def documented() -> dict[str, dict[str, str]]:
    """The table of docs/sandbox.md: column -> promise -> cell."""
    lines = (hosts.ROOT / "docs/sandbox.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| promise |"))
    heads = [cell.strip() for cell in lines[start].strip("|").split("|")][1:]
    table: dict[str, dict[str, str]] = {head: {} for head in heads}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        promise, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for head, cell in zip(heads, cells, strict=True):
            table[head][promise] = cell
    return table


def test_the_table_has_every_column_and_promise():
    table = documented()
    assert list(table) == list(columns())
    assert all(list(cells) == [*PROMISES, FILES, EXISTS] for cells in table.values())


@pytest.mark.parametrize("column", columns())
async def test_promises_are_kept_as_documented(column):
    plan = columns()[column]
    if plan.landlock and not linux.landlock_abi():
        pytest.skip("this kernel has no Landlock")
    if (measured := await measure(plan)) is None:
        pytest.skip("this machine does not offer it to this user")
    assert measured == documented()[column]


def test_promises_are_kept_as_documented_for_an_ordinary_user():
    if os.geteuid() != 0 or (command := hosts.ordinary_command()) is None:
        pytest.skip("needs root, and an interpreter that an ordinary user may start")
    done = hosts.as_ordinary([command[0], "-m", "tests.sandbox.test_matrix"])
    assert done.returncode == 0, done.stderr
    measured = {label: column for label, column in json.loads(done.stdout).items() if column}
    assert measured == {label: documented()[label] for label in measured} and measured


@pytest.mark.parametrize("filtered", [True, False])
async def test_old_landlock_alone_lets_a_file_be_emptied(filtered, monkeypatch):
    """The simulation of ABI 1 is real: without the filter the same program succeeds."""
    if os.geteuid() != 0 or not linux.landlock_abi():
        pytest.skip("needs root, who owns the file, and Landlock")
    if not filtered:
        force = "import _sandbox.seccomp as s\nreal = s.assemble\n"
        force += "s.assemble = lambda **given: real(**(given | {'truncates': True}))\n"
        boot = executor.forkserver.BOOT.replace("forkserver.main(", force + "forkserver.main(")
        monkeypatch.setattr(executor.forkserver, "BOOT", boot)
    plan = dataclasses.replace(hosts.PLANS["Landlock"], newest_abi=1)
    code = "import email.mime, os\nos.open(email.mime.__file__, os.O_RDONLY | os.O_TRUNC)"  # it is empty anyway
    async with Embedded(plan) as sandbox:
        result = await sandbox.run(code)
    assert ("PermissionError" in result.stderr) is filtered, result


if __name__ == "__main__":
    print(json.dumps({label: asyncio.run(measure(each)) for label, each in columns().items()}))
