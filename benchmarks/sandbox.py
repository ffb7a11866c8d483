"""Sandbox against plain subprocesses: calls per second, latency and CPU time, all in one run.

    python -m launch.benchmark sandbox --seconds 5 --programs print sympy --concurrency 1 8 64

Compared are the embedded sandbox (isolation included), `python -I -c` in a subprocess (none), the same under bubblewrap
where `bwrap` is installed, and a SandboxFusion server where `--url` names one. CPU time is that of this process and all
below it, over the calls made; bubblewrap's is not whole, as it does not wait for what it starts. Writes one JSON object
a measurement to `--out`, and a table to the screen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Awaitable, Callable

from launch.command import Parser
from open_agentrl_jax.sandbox.client import SandboxSpec, open_sandbox

PROGRAMS = {
    "print": "print(sum(range(100)))",
    "numpy": "import numpy as np\nprint(np.linalg.det(np.arange(9.0).reshape(3, 3) + np.eye(3)))",
    "sympy": "from sympy import symbols, solve\nx = symbols('x')\nprint(solve(x**2 - 5*x + 6, x))",
    "scipy": "from scipy.optimize import brentq\nprint(brentq(lambda x: x**3 - 2, 0, 2))",
}
PLAIN = (sys.executable, "-I", "-c")
BUBBLEWRAP = (
    *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--ro-bind", "/", "/"),
    *("--tmpfs", "/tmp", "--dev", "/dev", "--proc", "/proc", *PLAIN),
)
Call = Callable[[str], Awaitable[str]]


def command_call(command: tuple[str, ...]) -> Call:
    """A call that starts a process."""

    async def call(code: str) -> str:
        process = await asyncio.create_subprocess_exec(*command, code, stdin=-3, stdout=-1, stderr=-3)
        return (await process.communicate())[0].decode()

    return call


def cpu_seconds() -> float:
    """CPU time of this process and all its descendants, dead or alive."""
    own = os.times()
    total, ticks = own.user + own.system + own.children_user + own.children_system, os.sysconf("SC_CLK_TCK")
    parents, times = {}, {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            times[int(entry.name)] = sum(map(int, fields[11:15])) / ticks
    for pid, seconds in times.items():
        above = parents[pid]
        while above not in (0, 1, os.getpid()):
            above = parents.get(above, 0)
        if above == os.getpid() and pid != os.getpid():
            total += seconds
    return total


async def measure(call: Call, code: str, concurrency: int, seconds: float) -> dict[str, float]:
    """Keeps `concurrency` calls in flight for some seconds.

    Returns:
        calls a second, p50 and p99 latency in ms, and CPU ms a call.
    """
    expected = await call(code)
    if not expected.strip():
        raise RuntimeError("the program printed nothing")
    await asyncio.gather(*(call(code) for _ in range(min(concurrency, 8))))
    latencies: list[float] = []
    started, cpu = time.perf_counter(), cpu_seconds()

    async def keep_calling() -> None:
        while time.perf_counter() - started < seconds:
            before = time.perf_counter()
            answer = await call(code)
            latencies.append(time.perf_counter() - before)
            if answer != expected:
                raise RuntimeError(f"expected {expected!r}, got {answer!r}")

    await asyncio.gather(*(keep_calling() for _ in range(concurrency)))
    wall, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    latencies.sort()
    return {
        "calls": len(latencies),
        "calls/s": len(latencies) / wall,
        "p50 ms": 1e3 * latencies[len(latencies) // 2],
        "p99 ms": 1e3 * latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
        "CPU ms": 1e3 * cpu / len(latencies),
    }


async def benchmark(options: argparse.Namespace) -> list[dict]:
    """All measurements, ours beside the others' for each program and concurrency."""
    rows = []
    sandbox = open_sandbox(SandboxSpec())

    async def ours(code: str) -> str:
        return (await sandbox.run(code)).stdout

    systems: dict[str, Call] = {"embedded sandbox": ours, "plain subprocess": command_call(PLAIN)}
    if shutil.which("bwrap"):
        systems["bubblewrap"] = command_call(BUBBLEWRAP)
    remote = open_sandbox(SandboxSpec(urls=(options.url,))) if options.url else None
    if remote is not None:

        async def other(code: str) -> str:
            return (await remote.run(code)).stdout

        systems["remote"] = other
    async with sandbox:
        for program in options.programs:
            for concurrency in options.concurrency:
                for name, call in systems.items():
                    figures = await measure(call, PROGRAMS[program], concurrency, options.seconds)
                    rows.append({"program": program, "concurrency": concurrency, "system": name, **figures})
                    show(rows[-1])
    if remote is not None:
        await remote.close()
    print(f"\n{sandbox.metadata['plan']} (level {sandbox.metadata['level']}), {len(os.sched_getaffinity(0))} cores")
    return rows


def show(row: dict) -> None:
    """One line of the table."""
    head = f"{row['program']:6} {row['concurrency']:4} {row['system']:17}"
    latency = f"p50 {row['p50 ms']:7.1f} ms  p99 {row['p99 ms']:7.1f} ms"
    print(f"{head} {row['calls/s']:8.1f}/s  {latency}  CPU {row['CPU ms']:6.1f} ms", flush=True)


def main(arguments: list[str]) -> None:
    """The command."""
    parser = Parser(prog="launch.benchmark sandbox", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--url", default="", help="a SandboxFusion server to measure too")
    parser.add_argument("--out", default="", help="file for the measurements, one JSON object a line")
    options = parser.parse_args(arguments)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if soft < hard else soft, hard))
    rows = asyncio.run(benchmark(options))
    if options.out:
        pathlib.Path(options.out).write_text("".join(json.dumps(row) + "\n" for row in rows))
