"""A fork server: a small, clean process of one thread that has warmed a tier and forks a fresh child for every run.

It never sees a program or an output: a child's memory is a copy of its own, so it must hold nothing worth reading. It
forks children ahead, hands each one's socket to the executor, watches deadlines and reaps. Standard library only; it is
started by `BOOT`, which loads this folder alone, never the package around it.

Messages on the control socket are JSON, one a packet: down {"fork": n} | {"start": pid, "timeout": s} | {"kill": pid};
up {"world": {...}} | {"failed": text} | {"ready": pid} with the child's socket | {"exit": pid, "code": c, ...}.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import atexit
import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from . import child, immortal, isolation, linux

BOOT = """
import importlib.util, sys
folder, descriptor = sys.argv[1:]
spec = importlib.util.spec_from_file_location("_sandbox", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["_sandbox"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from _sandbox import forkserver
forkserver.main(int(descriptor))
"""
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",  # the order of sets is the same in every run
    "PYTHONUTF8": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "MPLBACKEND": "agg",
}
PACKET = 65536


def main(descriptor: int) -> None:
    """Serves until the control socket closes."""
    control = socket.socket(fileno=fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 5))
    os.close(descriptor)
    for reserved in (3, 4):  # a child's channel and ruleset go there
        os.dup2(0, reserved)
    order = json.loads(control.recv(PACKET))
    plan = isolation.Plan(**order["plan"])
    sys.path += order["search"]
    try:
        isolation.leave(plan)
        if plan.namespaces:
            _become_first_process(control)
        child.warm(order["tier"])
        world = isolation.enter(plan, sys.path)
    except Exception as error:  # whatever it is, the executor tells it
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode()[:PACKET])
        return
    sys.argv = [child.NAME]
    child.lay_streams()
    atexit._clear()
    gc.collect()
    gc.disable()
    immortal.make_immortal()
    gc.freeze()
    with os.fdopen(world.in_proc("self/maps")) as maps:
        linux.use_huge_pages(maps.read())
    with os.fdopen(world.in_proc("self/statm")) as statm:
        world.address_space = int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    told = {
        "level": plan.level,
        "plan": plan.name,
        "landlock": world.abi if world.rules else 0,
        "keeps": len(world.keeps),
    }
    control.send(json.dumps({"world": told}).encode())
    try:
        Server(control, world).serve()
    finally:
        os._exit(0)  # the interpreter's own end counts on counts


def _become_first_process(control: socket.socket) -> None:
    """Forks the first process of the new pid namespace; this one only waits for it."""
    pid = os.fork()
    if pid:
        control.close()
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)


class Server:
    """The loop of one fork server."""

    def __init__(self, control: socket.socket, world: isolation.World):
        self.control, self.world = control, world
        self.children: dict[int, int] = {}  # pid: slot
        self.starts: dict[int, float] = {}
        self.deadlines: dict[int, float] = {}
        self.late: set[int] = set()
        self.tasks = (0.0, 0)

    def serve(self) -> None:
        """Until the executor goes away, upon which all children end."""
        try:
            self._loop()
        except OSError:  # it went away while we spoke
            pass
        finally:
            for pid in self.children:
                _kill(pid)
            if self.world.empty:
                os.rmdir(self.world.empty)

    def _loop(self) -> None:
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        while True:
            nearest = min(self.deadlines.values(), default=None)
            wait = None if nearest is None else max(nearest - time.monotonic(), 0)
            ready = select.select([self.control, woken], [], [], wait)[0]
            if woken in ready:
                os.read(woken, 4096)
            self._reap()
            self._kill_late()
            if self.control in ready and not self._obey_all():
                break

    def _obey_all(self) -> bool:
        """Obeys what has come; False once the executor went away."""
        with contextlib.suppress(BlockingIOError):
            while packet := self.control.recv(PACKET, socket.MSG_DONTWAIT):
                self._obey(json.loads(packet))
            return False
        return True

    def _obey(self, order: dict[str, Any]) -> None:
        if "fork" in order:
            for _ in range(order["fork"]):
                self._fork()
        elif "kill" in order:
            self._end(order["kill"])
        elif order["start"] not in self.children:  # it ended before its time began, and its number may be another's now
            self._report(order["start"], -signal.SIGKILL)
        else:
            self.starts[order["start"]] = now = time.monotonic()
            self.deadlines[order["start"]] = now + order["timeout"]

    def _end(self, pid: int) -> None:
        if pid in self.children:
            _kill(pid)

    def _fork(self) -> None:
        slot = next(slot for slot in range(len(self.children) + 1) if slot not in self.children.values())
        threads = self._threads()
        here, there = socket.socketpair()
        pid = linux.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)  # the public one's enumerations would be copied
            os.close(self.control.detach())
            os.close(here.detach())
            child.main(self.world, slot, threads, there)
        there.close()
        self.children[pid] = slot
        socket.send_fds(self.control, [json.dumps({"ready": pid}).encode()], [here.fileno()])
        here.close()

    def _threads(self) -> int:
        """RLIMIT_NPROC of a child: its own where the user id or the user namespace is its own."""
        plan = self.world.plan
        if plan.private_id or plan.namespaces:
            return isolation.THREADS
        if plan.level == "C":
            return 0
        if time.monotonic() - self.tasks[0] > 1:  # a walk through /proc: not at every fork
            self.tasks = (time.monotonic(), isolation.tasks(self.world))
        return self.tasks[1] + isolation.THREADS

    def _kill_late(self) -> None:
        now = time.monotonic()
        for pid in [pid for pid, deadline in self.deadlines.items() if deadline <= now]:
            del self.deadlines[pid]
            self.late.add(pid)
            _kill(pid)
            self._report(pid, -signal.SIGKILL, late=True)  # before its memory is given back, which may take its time

    def _reap(self) -> None:
        while self.children:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid in self.children and ended.si_pid not in self.starts:
                self._obey_all()  # its clock was ordered to start before it got its program: the order waits
            pid, status, usage = os.wait4(ended.si_pid, 0)  # only now may its number become another's
            if pid not in self.children:  # a process that a child without isolation left behind
                continue
            del self.children[pid]
            self.deadlines.pop(pid, None)
            if pid in self.late:
                self.late.discard(pid)
            else:
                cpu, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss
                self._report(pid, os.waitstatus_to_exitcode(status), cpu=cpu, memory=memory)

    def _report(self, pid: int, code: int, *, late: bool = False, cpu: float = 0.0, memory: int = 0) -> None:
        """Tells the executor of an end: return code, seconds since the start, CPU seconds, largest KiB in memory."""
        now = time.monotonic()
        seconds = now - self.starts.pop(pid, now)
        report = {"exit": pid, "code": code, "late": late, "seconds": seconds, "cpu": cpu, "memory": memory}
        self.control.send(json.dumps(report).encode())


def _kill(pid: int) -> None:
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
