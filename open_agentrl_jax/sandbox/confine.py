"""Runs a command that may read everything and use the network, but writes below one directory only.

Weaker than the executor's levels, for programs that need a network: an agent that talks to a model. With Landlock
(Linux 5.13), files outside the directory cannot be changed; from Linux 6.12 on, the command cannot signal processes
outside either, and from 5.13 on it cannot trace them or read their environment. Without Landlock nothing is confined.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from open_agentrl_jax.sandbox import linux

# Of root's capabilities, those about file owners and modes. CAP_PERFMON, for one, would open other environments.
KEPT = (0, 1, 3, 4, 6, 7)  # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts")
ROOT = Path(__file__).resolve().parents[2]


def available() -> bool:
    """Whether this machine can confine a command."""
    return sys.platform == "linux" and linux.landlock_abi() > 0


def wrapped(command: Sequence[str], directory: str | os.PathLike[str]) -> list[str]:
    """The command line that runs `command` confined to `directory`."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from open_agentrl_jax.sandbox import confine; confine.main()"
    )
    return [sys.executable, "-I", "-S", "-c", code, str(directory), *command]


def enter(directory: str) -> None:
    """Confines this process for good, as far as the kernel can."""
    linux.prctl(linux.PR_SET_PDEATHSIG, 9)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    abi = linux.landlock_abi()
    if not abi:
        return
    rules = [(os.open(directory, os.O_PATH), linux.CHANGES)]
    for path in (f"/dev/{name}" for name in DEVICES):
        if os.path.exists(path):
            rules.append((os.open(path, os.O_PATH), linux.WRITE_FILE))
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.landlock_enter(linux.landlock_ruleset(abi, rules, handled=linux.CHANGES, network=False))
    if os.geteuid() == 0:
        linux.set_capabilities(*KEPT)


def main() -> None:
    """`DIRECTORY COMMAND...`: confines itself and becomes the command."""
    directory, *command = sys.argv[1:]
    enter(directory)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
