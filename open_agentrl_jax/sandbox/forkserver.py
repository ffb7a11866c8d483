"""A fork server: a small process of one thread that warms a tier and forks a fresh child for every run.

It never sees a program or its output: a child's memory is a copy of its own, so it must hold nothing worth reading. It
forks children ahead of need, sends each one's socket to the executor, enforces deadlines and reaps. Standard library
only; `BOOT` loads this folder alone, not the package around it.

Messages on the control socket are JSON, one per packet: down {"fork": n} | {"start": pid, "timeout": s} | {"kill": pid}
| {"interrupt": pid};
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
LOOK = 0.1  # seconds between two looks at what the children use
STRETCH, STARVED = 2.0, 0.25  # see Server._kill_late


def main(descriptor: int) -> None:
    """Serves until the control socket closes."""
    control = socket.socket(fileno=fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 5))
    os.close(descriptor)
    for reserved in (3, 4):  # for a child's channel and ruleset
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
    except Exception as error:  # the executor reports it
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
        os._exit(0)  # the interpreter's own shutdown relies on reference counts


def _become_first_process(control: socket.socket) -> None:
    """Forks the first process of the new pid namespace, and only waits for it."""
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
        self.limits: dict[int, float] = {}
        self.proc: dict[int, int] = {}  # pid: descriptor of its directory of /proc
        self.cpu: dict[int, float] = {}  # pid: CPU seconds at the last look
        self.late: set[int] = set()
        self.owed = 0  # forks that the kernel refused, to be tried again
        self.looked = time.monotonic()
        self.status, self.children_status = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.status.setblocking(False)

    def serve(self) -> None:
        """Serves until the executor closes the socket; then all children end."""
        try:
            self._loop()
        except OSError:  # the executor closed the socket during a message
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
            if self.owed or self.deadlines:
                wait = LOOK if wait is None else min(wait, LOOK)
            ready = select.select([self.control, woken, self.status], [], [], wait)[0]
            if woken in ready:
                os.read(woken, 4096)
            self._note_proc()
            self._reap()
            self._kill_late()
            self._slow_down_hogs()
            self._fork_owed()
            if self.control in ready and not self._obey_all():
                break

    def _obey_all(self) -> bool:
        """Processes all pending orders; returns False once the executor closed the socket."""
        with contextlib.suppress(BlockingIOError):
            while packet := self.control.recv(PACKET, socket.MSG_DONTWAIT):
                self._obey(json.loads(packet))
            return False
        return True

    def _obey(self, order: dict[str, Any]) -> None:
        if "fork" in order:
            self.owed += order["fork"]
            self._fork_owed()
        elif "kill" in order:
            self._end(order["kill"])
        elif "interrupt" in order:
            if order["interrupt"] in self.children:
                with contextlib.suppress(OSError):
                    os.kill(order["interrupt"], signal.SIGINT)
        elif order["start"] not in self.children:  # it ended before its clock started, and its pid may be reused
            self._report(order["start"], -signal.SIGKILL)
        else:
            self.starts[order["start"]] = now = time.monotonic()
            self.deadlines[order["start"]] = now + order["timeout"]
            self.limits[order["start"]] = order["timeout"]

    def _end(self, pid: int) -> None:
        if pid in self.children:
            _kill(pid)

    def _fork_owed(self) -> None:
        """Forks what was ordered; where the kernel has no room for a process, again a little later."""
        with contextlib.suppress(BlockingIOError):
            while self.owed:
                self._fork()
                self.owed -= 1

    def _fork(self) -> None:
        slot = next(slot for slot in range(len(self.children) + 1) if slot not in self.children.values())
        here, there = socket.socketpair()
        try:
            pid = linux.fork()
        except OSError as error:
            here.close()
            there.close()
            raise BlockingIOError(error.errno, error.strerror) from error
        if pid == 0:
            signal.set_wakeup_fd(-1)
            _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)  # the public module's enums would cost copied pages
            os.close(self.control.detach())
            os.close(here.detach())
            child.main(self.world, slot, there, os.dup(self.children_status.fileno()))
        there.close()
        self.children[pid] = slot
        socket.send_fds(self.control, [json.dumps({"ready": pid}).encode()], [here.fileno()])
        here.close()

    def _note_proc(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, descriptors, _, _ = socket.recv_fds(self.status, child.PID.size, 1)
                pid = child.PID.unpack(data)[0]
                if pid in self.children:
                    self.proc[pid] = descriptors[0]
                else:
                    os.close(descriptors[0])

    def _waited(self, pid: int) -> float:
        """Seconds for which the thread that waited longest was ready to run but had no CPU; 0 if unknown."""
        if (directory := self.proc.get(pid)) is None:
            return 0.0
        longest = 0
        with contextlib.suppress(OSError, ValueError):  # threads end; a kernel may lack the file
            tasks = os.open("task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
            try:
                for name in os.listdir(tasks)[: isolation.THREADS]:
                    with open(os.open(f"{name}/schedstat", os.O_RDONLY, dir_fd=tasks)) as file:
                        longest = max(longest, int(file.read().split()[1]))
            finally:
                os.close(tasks)
        return longest / 1e9

    def _kill_late(self) -> None:
        """Kills children at their time limit, which neighbours' load extends.

        A program gets its limit in seconds of running or waiting for something else than a CPU, within STRETCH times
        the limit in all. One that had less than STARVED of its limit of CPU time by then, and waited for a CPU most of
        the time, was starved: not its own fault.
        """
        now = time.monotonic()
        for pid in [pid for pid, deadline in self.deadlines.items() if deadline <= now]:
            limit, start = self.limits[pid], self.starts[pid]
            waited, cpu = (self._waited(pid), cpu_seconds(pid)) if limit > 0 else (0.0, 0.0)
            fair = start + min(limit + waited, STRETCH * limit)
            if cpu < limit and fair > now + 0.01:
                self.deadlines[pid] = fair
                continue
            del self.deadlines[pid]
            self.late.add(pid)
            _kill(pid)
            starved = cpu < STARVED * limit and waited > (now - start) / 2
            # reported before its memory is given back, which may take a while
            self._report(pid, -signal.SIGKILL, late=True, starved=starved)

    def _slow_down_hogs(self) -> None:
        """Gives programs that use more than one CPU the lowest priority: other runs, and the trainer, go first."""
        now = time.monotonic()
        if (passed := now - self.looked) < LOOK:
            return
        self.looked = now
        for pid in self.deadlines:
            cpu = cpu_seconds(pid)
            if cpu - self.cpu.get(pid, cpu) > 1.2 * passed:
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PGRP, pid, 19)  # all of its threads, and those that they start
            self.cpu[pid] = cpu

    def _reap(self) -> None:
        while self.children:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid in self.children and ended.si_pid not in self.starts:
                self._obey_all()  # the order to start its clock is still pending
            pid, status, usage = os.wait4(ended.si_pid, 0)  # only now may its pid be reused
            if pid not in self.children:  # an orphan of a child without isolation
                continue
            del self.children[pid]
            for kept in (self.deadlines, self.limits, self.cpu):
                kept.pop(pid, None)
            if (directory := self.proc.pop(pid, None)) is not None:
                os.close(directory)
            if pid in self.late:
                self.late.discard(pid)
            else:
                cpu, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss
                self._report(pid, os.waitstatus_to_exitcode(status), cpu=cpu, memory=memory)

    def _report(
        self, pid: int, code: int, *, late: bool = False, starved: bool = False, cpu: float = 0.0, memory: int = 0
    ) -> None:
        """Reports an end to the executor: return code, seconds since the start, CPU seconds, peak memory in KiB."""
        now = time.monotonic()
        seconds = now - self.starts.pop(pid, now)
        report = {
            "exit": pid,
            "code": code,
            "late": late,
            "starved": starved,
            "seconds": seconds,
            "cpu": cpu,
            "memory": memory,
        }
        self.control.send(json.dumps(report).encode())


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far, all threads included; 0 once it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def _kill(pid: int) -> None:
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
