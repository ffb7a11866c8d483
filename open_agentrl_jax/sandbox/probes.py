"""Finds the strongest plan that holds on this machine by attacking it with canary programs.

A canary is Python code that succeeds only if a protection is missing, and does no harm even then; it is contained if
it raises. The level is that of the first plan under which every canary is contained. Level C is not attacked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from open_agentrl_jax.sandbox import isolation
from open_agentrl_jax.sandbox.executor import Embedded
from open_agentrl_jax.types import UserError

# Names that canaries use: `at` (facts about the host), `call(number, *arguments)` (raises unless the call succeeds).
PRELUDE = """
import ctypes, email.mime, fcntl, json, os, resource, signal, socket, subprocess, sys, threading, time
at = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
def may(function, *arguments):
    if function(*arguments) < 0 and ctypes.get_errno() in (1, 38):
        raise OSError(ctypes.get_errno(), "refused")
def flood(folder):
    names = [os.path.join(folder, f"{at['abstract']}{number}") for number in range(5)]
    made = []
    try:
        for name in names:
            with open(name, "wb", buffering=0) as file:
                made.append(name)
                assert all(file.write(bytes(1 << 20)) == 1 << 20 for _ in range(20))
    finally:
        for name in made:
            os.unlink(name)
def threads():
    threading.stack_size(65536)
    done = threading.Event()
    try:
        for _ in range(300):
            threading.Thread(target=done.wait, daemon=True).start()
    finally:
        done.set()
def descriptors():
    for number in range(3, 1024):
        try:
            os.fstat(number)
        except OSError:
            continue
        return
    raise OSError("none")
def refused(*numbers):
    for number in numbers:
        try:
            call(number, *(ctypes.c_long(0),) * 6)
        except OSError as error:
            if error.errno in (1, 38):
                continue
        return
    raise OSError("all refused")
"""
X86 = isolation.linux.X86
EXOTIC = (
    (425, 323, 321, 248, 250, 319, 434, 272, 310, 298) if X86 else (425, 282, 280, 217, 219, 279, 434, 97, 270, 241)
)
CANARIES = {
    "reads a host file": "open(at['secret']).read()",
    "reads the host's password file": "open('/etc/passwd').read()",
    "reads the executor's environment": "open(f\"/proc/{at['pid']}/environ\").read()",
    "lists the host's processes": "assert os.listdir('/proc')",
    "signals the executor": "os.kill(at['pid'], 0)",
    "signals its parent": "os.kill(os.getppid(), 0)",
    "signals everybody": "os.kill(-1, 0)",
    "traces the executor": f"call({101 if X86 else 117}, 16, at['pid'], 0, 0)",
    "finds an inherited descriptor": "descriptors()",
    "connects by TCP": "socket.create_connection(('127.0.0.1', at['port']), 1)",
    "connects to an abstract socket": "s = socket.socket(socket.AF_UNIX); s.connect('\\0' + at['abstract'])",
    "opens a netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "resolves a name": "socket.getaddrinfo('localhost', 80)",
    "forks": "os.fork() or os._exit(0)",
    "starts a program": "subprocess.run(['/bin/true'])",
    "becomes a daemon": "os.setsid()",
    "writes beside a host file": "open(at['secret'] + '.canary', 'w').close()",
    "opens the standard library for writing": "os.open(json.__file__, os.O_WRONLY)",
    "empties a file of the standard library": "os.open(email.mime.__file__, os.O_RDONLY | os.O_TRUNC)",  # empty anyway
    "looks at the state of the page cache": "os.preadv(os.open(json.__file__, os.O_RDONLY), [bytearray(9)], 0, 8)",
    "reads another process's clock": "time.clock_gettime((~os.getppid() << 3) | 2)",
    "changes a mode in the standard library": "os.chmod(json.__file__, os.stat(json.__file__).st_mode & 0o777)",
    "mounts": "may(libc.mount, b'tmpfs', b'/no such place', b'tmpfs', 0, b'')",
    "enters a user namespace": "assert libc.unshare(0x10000000) == 0",
    "changes its root": "os.chroot('/')",
    "raises its limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); bytearray(at['memory'] * 2)",
    "allocates beyond its limit": "bytearray(at['memory'] * 2)",
    "starts 300 threads": "threads()",
    "fills a disk": "flood('.')",
    "fills /tmp": "flood('/tmp')",
    "fills /dev/shm": "flood('/dev/shm')",
    "calls by the x32 table": f"call({0x40000000 + 39 if X86 else -1})",
    "opens io_uring, userfaultfd, bpf, keys, memory files, pidfds or another's memory": f"refused{EXOTIC}",
}
MEMORY_MB = 512


@dataclasses.dataclass
class Findings:
    """Outcomes of the canaries under one plan: name -> the exception that contained it, "" if it escaped."""

    plan: isolation.Plan
    canaries: dict[str, str]
    failure: str = ""

    @property
    def holds(self) -> bool:
        """Whether every canary was contained."""
        return not self.failure and all(self.canaries.values())

    @property
    def why_not(self) -> str:
        """The failure, or the canaries that escaped."""
        return self.failure or ", ".join(f"a program {name}" for name, how in self.canaries.items() if not how)


@contextlib.contextmanager
def _bait() -> Iterator[dict[str, Any]]:
    """A secret file, a listening port and an abstract socket for the canaries to try."""
    name = f"canary-{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory() as folder, socket.socket() as port, socket.socket(socket.AF_UNIX) as abstract:
        os.chmod(folder, 0o777)
        secret = os.path.join(folder, "secret")
        with open(secret, "w") as file:
            file.write(name)
        os.chmod(secret, 0o644)
        port.bind(("127.0.0.1", 0))
        port.listen()
        abstract.bind(f"\0{name}")
        abstract.listen()
        yield {
            "secret": secret,
            "pid": os.getpid(),
            "port": port.getsockname()[1],
            "abstract": name,
            "memory": MEMORY_MB * 2**20,
        }


def _program() -> str:
    lines = [PRELUDE]
    for name, code in CANARIES.items():
        lines.append(
            f"try:\n    {code}\n    print(json.dumps([{name!r}, '']), flush=True)\n"
            f"except BaseException as error:\n    print(json.dumps([{name!r}, type(error).__name__]), flush=True)\n"
        )
    return "".join(lines)


async def attack(sandbox: Embedded) -> Findings:
    """Runs the canaries."""
    with _bait() as bait:
        result = await sandbox.run(_program(), stdin=json.dumps(bait), timeout=20, memory_mb=MEMORY_MB)
    told = dict.fromkeys(CANARIES, "")
    for line in result.stdout.splitlines():
        with contextlib.suppress(ValueError, TypeError):
            name, how = json.loads(line)
            told[name] = how
    failure = (
        "" if result.status == "finished" and result.return_code == 0 else f"{result.status} {result.stderr[-300:]}"
    )
    return Findings(sandbox.plan, told, failure.strip())


def survey(*, max_active: int = 0, all_plans: bool = False) -> tuple[Embedded | None, list[Findings]]:
    """Attacks plan after plan until one holds.

    Args:
        max_active: for the executor.
        all_plans: attack every plan, for a report; returns no executor.

    Returns:
        (an executor under the first plan that holds or None, the findings so far).
    """
    findings = []
    for plan in isolation.PLANS:
        if plan.level == "C" or (plan.only_root and os.geteuid() != 0):
            continue
        sandbox = Embedded(plan, max_active=max_active)
        try:
            found = sandbox.wait(attack(sandbox))
        except BaseException:
            sandbox.stop()
            raise
        findings.append(found)
        if found.holds and not all_plans:
            return sandbox, findings
        sandbox.stop()
    return None, findings


def open_embedded(*, max_active: int = 0, unsafe_no_isolation: bool = False) -> Embedded:
    """Opens the embedded executor under the strongest plan that holds here.

    Raises:
        UserError: nothing isolates on this machine, and `unsafe_no_isolation` is not set.
    """
    if sys.platform != "linux":
        raise UserError(
            f"sandbox.urls: the embedded sandbox needs Linux, this is {sys.platform}: give a SandboxFusion server's URL"
        )
    sandbox, findings = survey(max_active=max_active)
    if sandbox is not None:
        sandbox.metadata_extra["missing"] = "; ".join(f"{found.plan.name}: {found.why_not}" for found in findings[:-1])
        return sandbox
    if unsafe_no_isolation:
        return Embedded(isolation.PLANS[-1], max_active=max_active)
    reasons = "; ".join(f"{found.plan.name}: {found.why_not}" for found in findings)
    raise UserError(
        f"sandbox: no isolation holds on this machine ({reasons}); run on Linux 5.13 or later with Landlock or user "
        "namespaces, or give sandbox.urls, or, where programs may do as they like, sandbox.unsafe_no_isolation=true"
    )
