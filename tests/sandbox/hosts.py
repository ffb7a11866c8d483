# ruff: noqa: E501
"""A host to attack, and a way to attack it as an ordinary user."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import pathlib
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator

from open_agentrl_jax.sandbox import isolation, probes
from open_agentrl_jax.sandbox.executor import Embedded
from open_agentrl_jax.sandbox.result import Result
from tests.sandbox.cunning import CUNNING
from tests.sandbox.edges import EDGES
from tests.sandbox.hostile import ATTACKS, Attack

ROOT = pathlib.Path(__file__).parents[2]
PLANS = {plan.name: plan for plan in isolation.PLANS if plan.level != "C"}


@contextlib.contextmanager
def host() -> Iterator[str]:
    """A secret file, listening sockets and a secret in the environment; gives the facts as JSON."""
    name = f"prey-{secrets.token_hex(8)}"
    folder = tempfile.mkdtemp()
    with (
        socket.socket() as port,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
    ):
        os.chmod(folder, 0o777)
        secret = pathlib.Path(folder, f"{name}-secret")
        secret.write_text(name)
        secret.chmod(0o644)
        port.bind(("127.0.0.1", 0))
        port.listen()
        abstract.bind(f"\0{name}")
        abstract.listen()
        datagram.bind(f"\0{name}-datagram")
        yield json.dumps(
            {
                "secret": str(secret), "folder": folder, "pid": os.getpid(), "port": port.getsockname()[1], "abstract": name,
                "datagram": f"{name}-datagram",
            }
        )  # fmt: skip
        for listener in (port, abstract, datagram):
            listener.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                listener.recv(1) if listener is datagram else listener.accept()
                raise AssertionError(f"something reached {listener}")
    shutil.rmtree(folder)


def verdict(attack: Attack, result: Result) -> str:
    """Empty where the attack was contained; else what went wrong."""
    text = result.stdout + result.stderr
    faults = {
        "it escaped": "ESCAPED" in result.stdout,
        f"status {result.status}": result.status not in attack.statuses,
        f"return code {result.return_code}": attack.return_code not in (None, result.return_code),
        f"it did not print {attack.prints!r}": attack.prints not in result.stdout,
        f"it took {result.seconds:.2f} s": result.status == "timeout" and result.seconds > attack.timeout + 1.5,
        f"{len(text)} characters were kept": len(text) > 2 * 65_536 + 500,
    }
    found = [fault for fault, true in faults.items() if true]
    return f"{attack.name}: {', '.join(found)}: {result.stdout[:1500]} | {result.stderr[-800:]}" if found else ""


async def assault(plan: isolation.Plan) -> list[str]:
    """Runs every attack under a plan, some at a time; gives the faults found."""
    faults: list[str] = []
    with host() as facts:
        os.environ["SECRET"] = facts
        async with Embedded(plan) as sandbox:
            found = await probes.attack(sandbox)
            if not found.holds:
                return [found.why_not]

            async def one(attack: Attack) -> None:
                memory = {"timeout": attack.timeout, "memory_mb": attack.memory_mb}
                result = await sandbox.run(attack.program, stdin=facts, **memory)
                faults.append(verdict(attack, result))

            other = "import time; secret = 'squeamish-ossifrage'; time.sleep(0.2)"
            await asyncio.gather(
                *(one(attack) for attack in [*ATTACKS, *CUNNING, *EDGES]), *(sandbox.run(other) for _ in range(3))
            )
            after = await sandbox.run(
                "import json, numpy; print(json.dumps({'still': 'serving'}), int(numpy.ones(3).sum()))"
            )
            if after.stdout != '{"still": "serving"} 3\n':
                faults.append(f"afterwards: {after}")
            if sandbox.counts["fork_servers_restarted"] or sandbox.counts["infrastructure"]:
                faults.append(f"a fork server died: {sandbox.metadata}")
    return [fault for fault in faults if fault]


@functools.cache
def ordinary_command() -> list[str] | None:
    """An interpreter that an ordinary user can start and that finds our modules; None: there is none."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, shutil.which(version, path="/usr/bin:/usr/local/bin:/bin")):
        if candidate:
            command = [candidate, "-m", "tests.sandbox.hosts"]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                if as_ordinary([candidate, "-c", "import numpy, jaxtyping, open_agentrl_jax"]).returncode == 0:
                    return command
    return None


def as_ordinary(command: list[str], timeout: float = 250) -> subprocess.CompletedProcess[str]:
    """Runs a command as the user nobody; needs root."""
    nobody = pwd.getpwnam("nobody")
    path = os.pathsep.join([str(ROOT), sysconfig.get_paths()["purelib"]])
    return subprocess.run(
        command, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], cwd="/", text=True, capture_output=True, timeout=timeout,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(asyncio.run(assault(PLANS[sys.argv[1]]))))
