# ruff: noqa: E501
from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import pathlib
import signal
import socket
import sys
import tempfile
import time

import pytest

from open_agentrl_jax.sandbox import child, executor, fetching, forkserver, immortal, isolation, probes
from open_agentrl_jax.sandbox.client import Result, SandboxSpec, open_sandbox
from open_agentrl_jax.types import UserError


async def test_finishes(sandbox):
    result = await sandbox.run("import sys\nprint(input()[::-1])\nprint('oops', file=sys.stderr)", stdin="abc\n")
    assert (result.status, result.return_code, result.stdout, result.stderr) == ("finished", 0, "cba\n", "oops\n")
    assert 0 < result.seconds < 20


async def test_is_a_script(sandbox):
    code = "import pickle, sys\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A\nprint(__name__, __file__, sys.argv)"
    assert (await sandbox.run(code)).stdout == "__main__ main.py ['main.py']\n"


async def test_tracebacks_show_the_source(sandbox):
    result = await sandbox.run("def f(x):\n    return 1 / x\n\nf(0)\n")
    assert result.return_code == 1
    assert result.stderr.startswith(
        'Traceback (most recent call last):\n  File "main.py", line 4, in <module>\n    f(0)\n'
    )
    assert "    return 1 / x\n" in result.stderr and result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "child.py" not in result.stderr


@pytest.mark.parametrize(
    ("code", "return_code", "stderr"),
    [
        ("exit(3)", 3, ""),
        ("import sys; sys.exit('bad')", 1, "bad\n"),
        ("raise SystemExit", 0, ""),
        ("x = = 1", 1, "SyntaxError"),
        ("\0", 1, "null bytes"),
        ("'\ud800'", 1, "UnicodeEncodeError"),
        ("import sys\nsys.excepthook = lambda *e: print('hooked', file=sys.stderr)\n1/0", 1, "hooked\n"),
    ],
)
async def test_ends_as_python_does(sandbox, code, return_code, stderr):
    result = await sandbox.run(code)
    assert (result.status, result.return_code) == ("finished", return_code)
    assert stderr in result.stderr


async def test_threads_and_exit_functions_come_to_their_end(sandbox):
    code = (
        "import atexit, threading, time\natexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\nprint('first')"
    )
    assert (await sandbox.run(code)).stdout == "first\nthread\nlast\n"


async def test_asyncio_works_inside(sandbox):
    code = "import asyncio\nasync def main():\n    await asyncio.sleep(0.01)\n    return await asyncio.to_thread(lambda: 5)\nprint(asyncio.run(main()))"
    assert (await sandbox.run(code)).stdout == "5\n"


@pytest.mark.parametrize("package", ["numpy", "sympy", "scipy"])
async def test_imports_third_party_modules_from_every_tier(sandbox, package):
    pytest.importorskip(package)
    near = await sandbox.run(f"import {package}\nprint({package}.__version__)")
    far = await sandbox.run(
        f"import importlib\nm = importlib.import_module('{package}'.lower())\nprint(m.__version__)", timeout=60
    )
    assert near.stdout == far.stdout and near.stdout.count(".") == 2, (near, far)


def test_tiers_are_chosen_by_the_syntax_tree():
    choices = {
        "import numpy as np": "numpy",
        "if 1:\n    from sympy.abc import x": "sympy",
        "import numpy, scipy.optimize, sympy": "scipy",
        "# import sympy\nprint('import numpy')": "bare",
        "import math": "bare",
        "import numpy as": "bare",
        "(" * 5000 + "numpy": "bare",
        "import numpy\n" + "#" * 70_000: "bare",
    }
    assert {code: executor.tier_of(code) for code in choices} == choices


async def test_timeout_keeps_what_was_printed(sandbox):
    result = await sandbox.run("print('half')\nwhile True: pass", timeout=0.5)
    assert (result.status, result.stdout, result.return_code) == ("timeout", "half\n", -9)
    assert 0.5 <= result.seconds < 2.0


async def test_out_of_memory(sandbox):
    result = await sandbox.run("bytearray(400 << 20)", memory_mb=256)
    assert (result.status, result.return_code) == ("memory", 1)
    assert (await sandbox.run("bytearray(400 << 20)", memory_mb=1024)).status == "finished"
    assert (await sandbox.run("import numpy\nnumpy.ones(10**9)", memory_mb=256)).status == "memory"


async def test_head_and_tail_of_long_output(sandbox):
    result = await sandbox.run("for i in range(100000): print(i)")
    assert (
        result.stdout.startswith("0\n1\n")
        and result.stdout.endswith("99998\n99999\n")
        and "bytes left out" in result.stdout
    )
    assert len(result.stdout) < 66_000 and result.return_code == 0


async def test_max_output_bounds_stdout_and_truncation_is_flagged(sandbox):
    whole = await sandbox.run("print('1' * 300_000)", max_output=300_001)
    assert (whole.stdout, whole.truncated) == ("1" * 300_000 + "\n", False)
    for size, limit, truncated in ((65_536, 65_536, False), (65_537, 65_536, True), (5000, 1024, True)):
        result = await sandbox.run(f"print('1' * {size}, end='')", max_output=limit)
        assert result.truncated is truncated and (len(result.stdout) == limit or truncated)
        assert len(result.stdout) <= limit and (not truncated or "bytes left out" in result.stdout)
    for limit in (0, 1 << 30):
        assert (await sandbox.run("print(1)", max_output=limit)).status == "refused"


async def test_random_numbers_differ_between_runs(sandbox):
    code = "import random, numpy\nprint(random.random(), numpy.random.rand())"
    seen = [(await sandbox.run(code)).stdout.split() for _ in range(3)]
    assert len({a for a, _ in seen}) == len({b for _, b in seen}) == 3


async def test_sympy_draws_differ_between_runs(sandbox):
    pytest.importorskip("sympy")
    code = "import sympy\nfrom sympy.core.random import random\nprint(sympy.randprime(10**6, 10**9), random())"
    seen = {(await sandbox.run(code)).stdout for _ in range(3)}
    assert len(seen) == 3 and all(text[0].isdigit() for text in seen), seen


def test_no_two_fork_servers_share_user_ids(monkeypatch, tmp_path):
    monkeypatch.setattr(isolation, "LOCK_FOLDERS", ("/nowhere", str(tmp_path)))
    monkeypatch.setattr(isolation, "RANGES", 3)
    taken = [isolation.reserve_ids() for _ in range(3)]
    assert len({first for first, _ in taken}) == 3
    with pytest.raises(OSError, match="ranges of user ids are taken"):
        isolation.reserve_ids()
    os.close(taken[1][1])
    again = isolation.reserve_ids()
    assert again[0] == taken[1][0]
    for _, descriptor in (taken[0], taken[2], again):
        os.close(descriptor)


async def test_a_refused_fork_is_tried_again(sandbox):
    """The kernel refuses the first forks with EAGAIN; the runs wait and come to a right end."""
    code = (
        "import _sandbox.linux as linux\nreal, left = linux.fork, [5]\n"
        "def fork():\n    left[0] -= 1\n    if left[0] >= 0: raise BlockingIOError(11, 'no room')\n    return real()\n"
        "linux.fork = fork\n"
    )
    boot = executor.forkserver.BOOT.replace("forkserver.main(", code + "forkserver.main(")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor.forkserver, "BOOT", boot)
        patch.setattr(executor, "PATIENCE", 30.0)
        async with executor.Embedded(sandbox.plan) as own:
            results = await asyncio.gather(*(own.run(f"print({i})") for i in range(6)))
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(6)]
    assert own.counts["retries"] == 0


async def test_python_below_tmp(sandbox, monkeypatch):
    """A checkout or environment in /tmp is an ordinary place, at every level."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="checkout-") as folder:
        site = pathlib.Path(folder, "site-packages")
        site.mkdir()
        os.chmod(folder, 0o755)
        (site / "lying_in_tmp.py").write_text("word = 'found'\n")
        monkeypatch.setattr(executor, "search_path", lambda: [*sys.path[-1:], str(site)])
        async with executor.Embedded(sandbox.plan) as own:
            result = await own.run("import lying_in_tmp as m\nprint(m.word)\nopen(m.__file__, 'a')")
            if own.plan.disk:
                written = await own.run("open('/tmp/x', 'w').write('mine'); print(open('x').read())")
                assert written.stdout == "mine\n"
    assert result.stdout == "found\n" and result.return_code == 1, result


async def test_a_program_that_waits_is_timed_out_and_one_that_was_starved_is_not_blamed(sandbox):
    request = executor.Request("", "", 1.0, 64, 65_536, {}, ())
    report = {"code": -9, "late": True, "starved": True, "seconds": 2.0, "cpu": 0.0, "memory": 0}
    stream = executor.Stream(0, lambda: None)
    with pytest.raises(OSError, match="starved"):
        sandbox._result(request, report, b"k", [stream, stream], False, {})
    assert (await sandbox.run("import time; time.sleep(60)", timeout=0.3)).status == "timeout"


def test_a_program_that_takes_many_cpus_gets_the_lowest_priority(monkeypatch):
    import subprocess

    used = iter((0.0, 0.1, 0.5))  # CPU seconds at looks that are 0.2 s apart: half a CPU, then two
    here, there = socket.socketpair()
    server = forkserver.Server(here, None)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(forkserver, "cpu_seconds", lambda _: next(used))
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    with here, there, server.status, server.children_status, sleeper:
        server.deadlines[sleeper.pid] = time.monotonic() + 60
        seen = []
        for _ in range(3):
            server.looked = time.monotonic() - 0.2
            server._slow_down_hogs()
            seen.append(os.getpriority(os.PRIO_PROCESS, sleeper.pid))
        sleeper.kill()
    assert seen == [seen[0], seen[0], 19] and seen[0] < 19


@pytest.mark.parametrize(
    ("cpu", "waited", "passed", "outcome"),
    [
        (0.0, 0.0, 1.0, "late"),  # it slept
        (1.0, 0.0, 1.0, "late"),  # it computed
        (0.4, 0.6, 1.0, "more time"),  # neighbours took its CPU
        (0.9, 1.1, 2.0, "late"),  # twice its limit, and most of its CPU time
        (0.1, 1.9, 2.0, "starved"),
        (0.1, 0.0, 2.0, "late"),
        (2.0, 5.0, 1.0, "late"),  # its own threads were in each other's way
    ],
)
def test_waiting_for_a_cpu_does_not_count_towards_the_time_limit(monkeypatch, cpu, waited, passed, outcome):
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = forkserver.Server(here, None)  # pyright: ignore[reportArgumentType]
    now = time.monotonic()
    server.limits[7], server.starts[7], server.deadlines[7] = 1.0, now - passed, now
    monkeypatch.setattr(forkserver, "cpu_seconds", lambda _: cpu)
    monkeypatch.setattr(forkserver, "_kill", lambda _: None)
    monkeypatch.setattr(server, "_waited", lambda _: waited)
    with here, there, server.status, server.children_status:
        server._kill_late()
        if outcome == "more time":
            assert server.deadlines[7] > now and not server.late
        else:
            report = json.loads(there.recv(4096))
            assert report["late"] and report["starved"] is (outcome == "starved")


async def test_files_in_and_out(sandbox):
    if not sandbox.plan.disk:
        result = await sandbox.run("print(1)", files={"a": b"x"})
        assert result.status == "refused"
        return
    code = (
        "import helper, os\nopen('out.bin', 'wb').write(bytes([0, 255]))\nos.makedirs('d/e')\nopen('d/e/f', 'w').write(helper.word)\n"
        "os.symlink('/etc/passwd', 'link')\nos.symlink('/etc', 'etc')\nos.mkdir('dir')\nopen('shut', 'w').close()\nprint(sorted(os.listdir('.')))"
    )
    wanted = (
        "out.bin",
        "d/e/f",
        "/tmp/helper.py",
        "link",
        "etc/passwd",
        "dir",
        "none",
        "../../etc/passwd",
        "/etc/passwd",
        ".",
    )
    result = await sandbox.run(code, files={"helper.py": b"word = 'hi'", "in/deep": b""}, fetch=wanted)
    assert result.stdout == "['d', 'dir', 'etc', 'helper.py', 'in', 'link', 'out.bin', 'shut']\n"
    assert result.files == {"out.bin": b"\0\xff", "d/e/f": b"hi", "/tmp/helper.py": b"word = 'hi'"}
    late = await sandbox.run("open('x', 'w').write('kept')\nwhile True: pass", timeout=0.5, fetch=("x",))
    assert (late.status, late.files) == ("timeout", {"x": b"kept"})
    outside = await sandbox.run("print(1)", files={"../../escape": b""})
    assert (outside.status, outside.stdout) == ("refused", "")


@pytest.mark.parametrize(
    ("named", "status"),
    [
        ({"timeout": float("nan")}, "refused"),
        ({"timeout": float("inf")}, "refused"),
        ({"timeout": 1e12}, "refused"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": 1e-6}, "timeout"),
        ({"memory_mb": 0}, "refused"),
        ({"memory_mb": -5}, "refused"),
        ({"memory_mb": float("nan")}, "refused"),
        ({"memory_mb": 10**30}, "finished"),
        ({"fetch": ("x",) * 5000}, "refused"),
        ({"fetch": ("a\0b", "\ud800", "x" * 5000)}, "finished"),
        ({"files": {"a\0b": b""}}, "refused"),
        ({"files": {"\ud800": b""}}, "refused"),
        ({"files": {"a/" * 1900 + "b": b""}}, "refused"),
        ({"stdin": "\ud800"}, "finished"),
    ],
)
async def test_strange_requests_harm_no_other_run(sandbox, named, status):
    before = sandbox.counts["fork_servers_restarted"], sandbox.counts["infrastructure"]
    code = "while True: pass" if status == "timeout" else "pass"  # one that ends might do so before it is stopped
    other, strange = await asyncio.gather(
        sandbox.run("import time; time.sleep(0.3); print(1)"), sandbox.run(code, **named)
    )
    assert (strange.status, other.stdout) == (status, "1\n")
    assert (sandbox.counts["fork_servers_restarted"], sandbox.counts["infrastructure"]) == before


async def test_times_are_told_however_short(sandbox):
    """A program may be over before its clock was ordered to start, and a time before the program began."""
    results = await asyncio.gather(*(sandbox.run("pass") for _ in range(200)))
    assert all(result.status == "finished" and result.seconds > 0 for result in results)
    results = await asyncio.gather(*(sandbox.run("while True: pass", timeout=-1) for _ in range(60)))
    assert {result.status for result in results} == {"timeout"}


def test_files_are_fetched_up_to_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "LARGEST", 10)
    (tmp_path / "small").write_bytes(b"12345")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    directory = os.open(tmp_path, os.O_RDONLY)
    found = fetching.collect(directory, ("sparse", "small", "./small", "././small"))
    os.close(directory)
    assert sorted(found) == ["./small", "small"]


def test_a_file_that_grows_while_it_is_fetched_is_cut(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"12345")
    real = os.fstat

    def grow(descriptor):
        status = real(descriptor)
        os.truncate(tmp_path / "file", 1 << 20)
        return status

    directory = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(fetching.os, "fstat", grow)
    found = fetching.collect(directory, ("file",))
    os.close(directory)
    assert found == {"file": b"12345"}


async def test_nothing_is_left_for_the_next_run(sandbox):
    code = "import os, builtins, math\nprint(hasattr(builtins, 'mark'), math.pi, os.path.exists('left'))\nbuiltins.mark = 1; math.pi = 3"
    more = "\nopen('left', 'w').close()" if sandbox.plan.disk else ""
    first, second = [await sandbox.run(code + more) for _ in range(2)]
    assert first.stdout == second.stdout == "False 3.141592653589793 False\n"


def test_importing_ahead_takes_only_packages_that_do_nothing_else(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(child.importlib, "import_module", lambda name: asked.append(name) or 1 / 0)
    child.import_ahead(b"import antigravity, unittest.__main__, numpy.f2py.__main__, torch\nfrom sympy import galgebra")
    assert asked == ["sympy", "sympy.galgebra"]


async def test_children_share_no_memory_that_can_be_written(sandbox):
    async with executor.Embedded(sandbox.plan) as own:
        await own.run("import sympy, scipy")
        for task in own._servers.values():
            for pid in descendants(task.result().process.pid) or [task.result().process.pid]:
                maps = pathlib.Path(f"/proc/{pid}/maps").read_text()
                assert not [line for line in maps.splitlines() if line.split()[1].startswith("rw-s")]


# What a program does with the objects that it was given, and the count of each before and after.
COUNTS = """
import gc, resource, sys, sympy, json
from sympy.core import mul
things = {"code": sympy.solve.__code__, "constants": sympy.solve.__code__.co_consts, "function": sympy.solve, "module": sympy,
    "type": sympy.Symbol, "dict": sympy.__dict__, "text": sympy.__doc__, "name": sympy.__name__, "tuple": sympy.Symbol.__mro__,
    "bytes": sympy.solve.__code__.co_linetable, "term": sympy.pi, "method": json.JSONEncoder.encode}
before = {name: sys.getrefcount(thing) for name, thing in things.items()}
held = [list(things.values()) for _ in range(50)]
x = sympy.Symbol("x")
assert sympy.solve(x**2 - 5*x + 6, x) == [2, 3]
after = {name: sys.getrefcount(thing) for name, thing in things.items()}
print([name for name in things if before[name] != after[name]], resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
COPIED = 1200  # pages that a child has written by the end of COUNTS: some 900 of immortal objects, 1,800 of others


@pytest.mark.skipif(immortal.marker() is None, reason="this interpreter has no immortal objects (CPython 3.12 has)")
async def test_a_child_writes_no_counts_to_what_it_was_given(sandbox):
    pytest.importorskip("sympy")
    if sandbox.plan.chroot:
        pytest.skip("what the program imports is imported before, but in the child")
    assert (await sandbox.run(COUNTS)).return_code == 0
    result = await sandbox.run(COUNTS)
    changed, _, faults = result.stdout.rpartition(" ")
    assert changed == "[]" and int(faults) < COPIED, result


async def test_the_collector_spares_what_the_fork_server_made(sandbox):
    pytest.importorskip("sympy")
    code = (
        "import gc, sympy\ngc.unfreeze(); x = sympy.Symbol('x'); found = [gc.collect() for _ in range(3)]\n"
        "print(sympy.solve(x**2 - 5*x + 6, x), sympy.integrate(sympy.sin(x), x)); gc.collect(); del x; gc.collect()\nprint('well')"
    )
    result = await sandbox.run(code, timeout=60)
    assert result.stdout == "[2, 3] -cos(x)\nwell\n", result


# Writes behind Python's back to what every child is given: the C library's code, a text, a number, code, and a small number.
SPOILING = """
import ctypes, json, math, platform
libc = ctypes.CDLL(None)
def write(address, data): ctypes.memmove(address, data, len(data))
if platform.machine() == "x86_64":
    address = ctypes.cast(libc.labs, ctypes.c_void_p).value
    assert libc.mprotect(ctypes.c_void_p(address & -4096), ctypes.c_size_t(8192), 7) == 0
    write(address, bytes.fromhex("b82a000000c3"))  # mov eax, 42; ret
    assert libc.labs(-5) == 42
write(id(json.__doc__) + 48, b"SPOILT")
assert "SPOILT" in json.__doc__
write(id(math.pi) + 16, bytes(8))
assert math.pi == 0
write(id(json.dumps.__code__), bytes(4))
libc.write(1, b"spoilt", 6)
write(id(7) + 24, b"\\x09")
libc._exit(0)
"""
LOOKING = """
import ctypes, json, math
print(int("3") + 4, json.__doc__[:20], json.dumps([math.pi]), ctypes.CDLL(None).labs(-5), len(range(7)))
"""


async def test_what_a_program_writes_into_its_memory_no_other_sees(sandbox):
    seen = [(await sandbox.run(LOOKING)).stdout]
    for _ in range(3):  # one child is forked ahead: the third is surely younger than the first program
        assert (await sandbox.run(SPOILING)).stdout == "spoilt"
        seen.append((await sandbox.run(LOOKING)).stdout)
    assert seen == ["7 JSON (JavaScript Obj [3.141592653589793] 5 7\n"] * 4


async def test_no_order_is_lost_where_the_fork_server_is_slow():
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.setblocking(False)
    there.setblocking(False)
    server = executor.ForkServer(None, here, {})  # pyright: ignore[reportArgumentType]
    server.loop = asyncio.get_running_loop()
    for number in range(2000):
        server.send(kill=number)
    seen = set()
    async with asyncio.timeout(20):
        while len(seen) < 2000:
            try:
                seen.add(there.recv(100))
            except BlockingIOError:
                await asyncio.sleep(0.01)
    here.close()
    there.close()


async def test_a_flood_is_stopped_by_one_order(sandbox, monkeypatch):
    kills = []
    send = executor.ForkServer.send
    monkeypatch.setattr(executor.ForkServer, "send", lambda self, **o: (kills.append(o), send(self, **o)))
    result = await sandbox.run("import os\nwhile True: os.write(1, bytes(65536))", timeout=20)
    assert "more than 16 MiB" in result.stderr
    assert len([order for order in kills if "kill" in order]) == 1


async def test_many_at_once(sandbox):
    results = await asyncio.gather(*(sandbox.run(f"print({i})") for i in range(150)))
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(150)]


def test_from_several_event_loops(sandbox):
    assert [asyncio.run(sandbox.run(f"print({i})")).stdout for i in range(3)] == ["0\n", "1\n", "2\n"]


async def test_waiting_runs_go_in_order(sandbox):
    ends: list[int] = []

    async def one(number):
        async with asyncio.timeout(60):
            await single.run("import time; time.sleep(0.01)")
        ends.append(number)

    async with executor.Embedded(sandbox.plan, max_active=1) as single:
        await asyncio.gather(*(one(number) for number in range(12)))
    assert ends == list(range(12))


async def test_a_cancelled_run_is_ended(sandbox):
    async with executor.Embedded(sandbox.plan, max_active=1) as single:
        task = asyncio.create_task(single.run("while True: pass", timeout=100))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await asyncio.wait_for(single.run("print(1)"), 20)).stdout == "1\n"


async def test_a_dead_fork_server_is_replaced_and_the_run_retried(sandbox):
    async with executor.Embedded(sandbox.plan) as own:
        await own.run("print(1)")
        server = own._servers["bare"].result()
        running = asyncio.create_task(own.run("import time; time.sleep(1); print('again')"))
        await asyncio.sleep(0.3)
        for pid in [*descendants(server.process.pid), server.process.pid]:
            with contextlib.suppress(ProcessLookupError):  # the first process of a namespace takes the others along
                os.kill(pid, signal.SIGKILL)
        result = await running
        assert (result.status, result.stdout) == ("finished", "again\n")
        assert own.counts["fork_servers_restarted"] == 1 and own.counts["retries"] == 1


async def test_what_cannot_start_is_an_infrastructure_failure(monkeypatch):
    plan = isolation.Plan("impossible", "A", only_root=True, landlock=True)
    monkeypatch.setattr(executor, "start", lambda *_: (_ for _ in ()).throw(OSError("no")))
    async with executor.Embedded(plan) as own:
        result = await own.run("print(1)")
    assert result == Result("infrastructure", None, "", "OSError: no", 0.0)


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(") ")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        found += (below := children.get(queue.pop(), []))
        queue += below
    return found


def test_children_end_with_their_caller(sandbox):
    code = (
        "import asyncio, sys\nfrom open_agentrl_jax.sandbox import executor, isolation\n"
        f"own = executor.Embedded(next(p for p in isolation.PLANS if p.name == {sandbox.plan.name!r}))\n"
        "async def main():\n    run = asyncio.create_task(own.run('while True: pass', timeout=300))\n    await asyncio.sleep(1.5)\n"
        "    print('running', flush=True)\n    await run\nasyncio.run(main())"
    )
    import subprocess

    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()}
    ) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == b"running\n"
        below = descendants(caller.pid)
        assert len(below) >= 2
        caller.kill()
    until = time.monotonic() + 20
    while time.monotonic() < until and any(pathlib.Path(f"/proc/{pid}").exists() for pid in below):
        time.sleep(0.1)
    assert not [pid for pid in below if pathlib.Path(f"/proc/{pid}").exists()]


def state() -> tuple[int, int, str]:
    """Descriptors, processes below, mounts."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(descendants(os.getpid())), pathlib.Path("/proc/mounts").read_text()


async def _leaks(plan: isolation.Plan, runs: int) -> None:
    programs = (
        "print(1)",
        "1/0",
        "import os; os._exit(3)",
        "while True: pass",
        "import os; os.kill(os.getpid(), 9)",
        "print('x' * 200000)",
    )
    async with executor.Embedded(plan) as own:
        await asyncio.gather(*(own.run(program, timeout=0.3, fetch=("a",)) for program in programs))
        await asyncio.sleep(0.5)
        before = state()
        for _ in range(runs // 60):
            await asyncio.gather(
                *(
                    own.run(programs[i % 6], timeout=0.1 if i % 30 == 3 else 5 if i % 6 != 3 else 0.02, fetch=("a",))
                    for i in range(60)
                )
            )
        await asyncio.sleep(0.5)
        after = state()
        assert own.counts["runs"] >= runs // 60 * 60
    assert after[0] <= before[0] + 2 and after[1] <= before[1] + 1 and after[2] == before[2]


async def test_nothing_leaks(sandbox):
    await _leaks(sandbox.plan, 120)


@pytest.mark.slow
async def test_nothing_leaks_in_2000_runs(sandbox):
    await _leaks(sandbox.plan, 2040)


def test_everything_is_given_back(sandbox):
    async def once():
        async with executor.Embedded(sandbox.plan) as own:
            await own.run("print(1)")

    asyncio.run(once())
    before = state()
    asyncio.run(once())
    assert state() == before


def test_refused_where_nothing_isolates(monkeypatch):
    monkeypatch.setattr(
        probes, "survey", lambda **_: (None, [probes.Findings(isolation.PLANS[3], {}, "this kernel has no Landlock")])
    )
    with pytest.raises(UserError, match=r"no isolation holds.*Landlock.*unsafe_no_isolation=true"):
        open_sandbox(SandboxSpec())
    unsafe = probes.open_embedded(unsafe_no_isolation=True)
    assert unsafe.metadata["unsafe_no_isolation"] is True and unsafe.metadata["level"] == "C"
    assert asyncio.run(unsafe.run("print(1)")).stdout == "1\n"
    assert asyncio.run(unsafe.run("while True: pass", timeout=0.3)).status == "timeout"
    unsafe.stop()


def test_other_systems_are_told(monkeypatch):
    monkeypatch.setattr(probes.sys, "platform", "darwin")
    with pytest.raises(UserError, match="needs Linux"):
        open_sandbox()


def test_nothing_of_jax_is_imported():
    import subprocess

    code = "import sys, open_agentrl_jax.sandbox.client, open_agentrl_jax.sandbox.probes, open_agentrl_jax.agent.python_tool as p; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
