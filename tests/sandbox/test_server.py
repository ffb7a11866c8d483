# ruff: noqa: E501
"""Our client against our server, and both against the words of SandboxFusion's API."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from open_agentrl_jax.sandbox import executor, remote
from open_agentrl_jax.sandbox.client import SandboxSpec, open_sandbox
from open_agentrl_jax.types import UserError

server = pytest.importorskip("open_agentrl_jax.sandbox.server", reason="needs aiohttp")
from aiohttp import web  # noqa: E402

RUN = {"language": "python", "run_timeout": 10}


@contextlib.asynccontextmanager
async def serving(sandbox, **spec):
    """A running server; gives its URL."""
    started = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(server.serve(sandbox, server.ServerSpec(port=0, grace=5, **spec), started=started))
    await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield f"http://127.0.0.1:{started.result()}"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def faking(handler):
    """A server that answers as `handler` does."""
    application = web.Application()
    application.add_routes(
        [web.post("/run_code", handler), web.get("/v1/ping", lambda _: asyncio.sleep(0, web.json_response("pong")))]
    )
    runner = web.AppRunner(application, shutdown_timeout=0.1)  # a handler that hangs is not waited for
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "COOLING", 0.2)


async def post(url: str, **body) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.post(f"{url}/run_code", json=body, timeout=60)


async def test_the_words_of_the_api(sandbox):
    async with serving(sandbox) as url:
        good = (await post(url, code="print(input())", stdin="hey", **RUN)).json()
        assert (
            good["status"] == "Success"
            and good["message"] == ""
            and good["compile_result"] is None
            and good["files"] == {}
        )
        ran = good["run_result"]
        assert (ran["status"], ran["return_code"], ran["stdout"], ran["stderr"]) == ("Finished", 0, "hey\n", "")
        assert 0 <= ran["execution_time"] < 30 and "executor_pod_name" in good
        bad = (await post(url, code="1/0", **RUN)).json()
        assert (bad["status"], bad["run_result"]["status"], bad["run_result"]["return_code"]) == (
            "Failed",
            "Finished",
            1,
        )
        late = (await post(url, code="print('half')\nwhile 1: pass", language="python", run_timeout=0.5)).json()
        assert (late["status"], late["run_result"]["status"]) == ("Failed", "TimeLimitExceeded")
        assert late["run_result"]["stdout"] == "half\n"
        full = (await post(url, code="bytearray(1 << 30)", memory_limit_MB=200, **RUN)).json()
        assert full["status"] == "Failed" and "MemoryError" in full["run_result"]["stderr"]
        if sandbox.plan.disk:
            files = {"in.txt": base64.b64encode(b"in").decode(), "none": None}
            code = "open('out.txt', 'w').write(open('in.txt').read() * 2)"
            there = (await post(url, code=code, files=files, fetch_files=["out.txt", "missing"], **RUN)).json()
            assert there["files"] == {"out.txt": base64.b64encode(b"inin").decode()}


@pytest.mark.parametrize(
    "body",
    [
        {"code": "1", "language": "klingon"},
        {"language": "python"},
        {"code": 5},
        {"code": "1", "run_timeout": -1},
        {"code": "1", "run_timeout": 1e9},
        {"code": "1", "run_timeout": "x"},
        {"code": "1", "files": {"a": "not base64!"}},
        {"code": "1", "files": ["a"]},
        {"code": "1", "fetch_files": "a"},
        {"code": "1", "stdin": 5},
        {"code": "1", "memory_limit_MB": "x"},
    ],
)
async def test_wrong_requests_are_answered_422(sandbox, body):
    async with serving(sandbox) as url:
        answer = await post(url, **body)
    assert answer.status_code == 422 and answer.json()["detail"]


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        ("[" * 100_000, {}),
        ('{"code": ' * 50_000, {}),
        (b"\xff\xfe", {}),
        ('{"code": "1"}', {"Content-Type": "application/json; charset=klingon"}),
        ("", {}),
        ("null", {}),
        ('{"code": "1", "fetch_files": [' + '"x",' * 5000 + '"x"]}', {}),
        ('{"code": "1", "run_timeout": NaN}', {}),
        ('{"code": "1", "run_timeout": Infinity}', {}),
        ('{"code": "1", "run_timeout": ' + "9" * 5000 + "}", {}),
        ('{"code": "1", "files": {"a\\u0000": ""}}', {}),
    ],
)
async def test_wrong_bodies_are_answered_422(sandbox, content, headers):
    async with serving(sandbox) as url, httpx.AsyncClient(trust_env=False) as client:
        assert (
            await client.post(
                f"{url}/run_code", content=content, headers={"Content-Type": "application/json"} | headers
            )
        ).status_code == 422


@pytest.mark.parametrize("limit", ["1e300", "Infinity", "NaN", "-5"])
async def test_strange_memory_limits_are_no_failure(sandbox, limit):
    body = f'{{"code": "print(1)", "language": "python", "memory_limit_MB": {limit}}}'
    async with serving(sandbox) as url, httpx.AsyncClient(trust_env=False) as client:
        assert (
            await client.post(f"{url}/run_code", content=body, headers={"Content-Type": "application/json"})
        ).json()["run_result"]["stdout"] == "1\n"


async def test_ping_health_and_metrics(sandbox):
    async with serving(sandbox) as url, httpx.AsyncClient(trust_env=False) as client:
        await post(url, code="1", **RUN)
        assert (await client.get(f"{url}/v1/ping")).json() == "pong"
        assert (await client.get(f"{url}/health")).json()["well"] is True
        text = (await client.get(f"{url}/metrics")).text
    assert 'sandbox_requests_total{status="finished"} 1' in text and "sandbox_waiting 0" in text


async def test_overload_is_answered_429_and_the_queue_is_bounded(sandbox):
    async with executor.Embedded(sandbox.plan, max_active=1) as own, serving(own, max_queue=2) as url:
        answers = await asyncio.gather(*(post(url, code="import time; time.sleep(0.3)", **RUN) for _ in range(12)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes[:3] == [200, 200, 200] and codes[-1] == 429 and set(codes) == {200, 429}


async def test_a_token_is_asked_for_and_needed_beyond_loopback(sandbox):
    async with serving(sandbox, token="secret") as url:
        assert (await post(url, code="1", **RUN)).status_code == 401
        async with remote.Remote([url], token="secret") as client:
            assert (await client.run("print(2)")).stdout == "2\n"
            assert await client.ping() == [True]
    with pytest.raises(UserError, match="token"):
        await server.serve(sandbox, server.ServerSpec(host="0.0.0.0", port=0))
    with pytest.raises(UserError, match=r"port 99999: .*; choose another"):
        await server.serve(sandbox, server.ServerSpec(port=99999))


async def test_client_and_server_agree_with_the_executor(sandbox):
    programs = (
        "print(1)",
        "1/0",
        "import os; os.abort()",
        "bytearray(1 << 30)",
        "print('x')\nwhile True: pass",
        "import sys; sys.exit(9)",
    )
    async with serving(sandbox) as url, open_sandbox(SandboxSpec(urls=(f"{url}/run_code",))) as client:
        for program in programs:
            near = await sandbox.run(program, timeout=1, memory_mb=200)
            far = await client.run(program, timeout=1, memory_mb=200)
            assert (far.status, far.stdout, far.stderr) == (near.status, near.stdout, near.stderr)
            assert far.return_code == (None if near.status == "timeout" else near.return_code)
        if sandbox.plan.disk:
            result = await client.run(
                "open('b', 'wb').write(open('a', 'rb').read() * 2)", files={"a": b"\xff"}, fetch=("b",)
            )
            assert result.files == {"b": b"\xff\xff"}
        assert client.metadata["kind"] == "remote" and client.metadata["runs"] >= 6


async def test_max_output_reaches_the_server(sandbox):
    code = "print('1' * 200_000)"
    async with serving(sandbox) as url, remote.Remote([url]) as client:
        whole, cut = await client.run(code, max_output=1 << 20), await client.run(code)
        assert (await client.run(code, max_output=1 << 30)).status == "refused"
    assert (len(whole.stdout), whole.truncated, cut.truncated) == (200_001, False, True)
    assert len(cut.stdout) <= 65_536


async def test_a_server_without_max_output_is_cut_by_the_client():
    async def handler(_):
        ran = {"status": "Finished", "return_code": 0, "stdout": "1" * 200_000, "stderr": "2" * 300_000}
        return web.json_response({"status": "Success", "message": "", "run_result": ran})

    async with faking(handler) as url, remote.Remote([url]) as client:
        result = await client.run("print(1)", max_output=2000)
    assert result.truncated and len(result.stdout) <= 2000 and len(result.stderr) <= 65_536


async def test_128_in_flight_over_two_servers():
    seen: dict[str, int] = {}
    most = now = 0
    full = asyncio.Event()

    async def handler(request):
        nonlocal most, now
        now += 1
        most = max(most, now)
        if now == remote.IN_FLIGHT:
            full.set()
        await asyncio.wait_for(full.wait(), 60)  # none is answered before all that may come have come
        await asyncio.sleep(0.01)
        now -= 1
        seen[request.host] = seen.get(request.host, 0) + 1
        ran = {
            "status": "Finished",
            "return_code": 0,
            "stdout": (await request.json())["code"],
            "stderr": "",
            "execution_time": 0.1,
        }
        return web.json_response({"status": "Success", "message": "", "run_result": ran})

    async with faking(handler) as one, faking(handler) as two, remote.Remote([one, two]) as client:
        results = await asyncio.gather(*(client.run(str(i)) for i in range(300)))
    assert [result.stdout for result in results] == [str(i) for i in range(300)]
    assert most == 128 and min(seen.values()) > 100


@pytest.mark.parametrize("fault", ["sandbox error", "500", "429", "not json", "empty", "run error", "hang up"])
async def test_faults_are_retried_and_then_infrastructure(fault):
    calls = 0

    async def handler(request):
        nonlocal calls
        calls += 1
        if fault == "hang up":
            request.transport.close()
        if fault in ("500", "429"):
            return web.Response(status=int(fault), text="full")
        if fault == "not json":
            return web.Response(text="<html>")
        if fault == "empty":
            return web.json_response({})
        if fault == "run error":
            return web.json_response(
                {"status": "Failed", "message": "", "run_result": {"status": "Error", "return_code": None}}
            )
        return web.json_response({"status": "SandboxError", "message": "pod lost", "run_result": None})

    async with faking(handler) as url, remote.Remote([url]) as client:
        result = await client.run("print(1)")
    assert result.status == "infrastructure" and result.return_code is None
    assert calls >= 2 and client.counts["retries"] == remote.ATTEMPTS - 1


@pytest.mark.parametrize(
    "ran",
    [
        "[" * 100_000,
        '{"status": "Finished", "return_code": "0", "stdout": "", "stderr": ""}',
        '{"status": "Finished", "return_code": 0, "stdout": 5, "stderr": ""}',
        '{"status": "Finished", "return_code": 0, "stdout": "", "stderr": ["x"]}',
        '{"status": "Finished", "return_code": 0, "stdout": "", "execution_time": "soon"}',
    ],
)
async def test_servers_that_lie_are_infrastructure(ran):
    async def handler(request):
        return web.Response(text=f'{{"status": "Success", "run_result": {ran}}}')

    async with faking(handler) as url, remote.Remote([url]) as client:
        assert (await client.run("print(1)")).status == "infrastructure"


async def test_an_endless_answer_is_not_kept(monkeypatch):
    monkeypatch.setattr(remote, "LARGEST", 1 << 20)
    sent = 0

    async def handler(request):
        nonlocal sent
        answer = web.StreamResponse()
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await answer.write(bytes(1 << 16))
                sent += 1 << 16

    async with faking(handler) as url, remote.Remote([url]) as client:
        result = await client.run("print(1)")
    assert result.status == "infrastructure" and "more than" in result.stderr
    assert sent < 40 * remote.ATTEMPTS << 20


async def test_half_a_character_reaches_the_server_and_nan_does_not(sandbox):
    async with serving(sandbox) as url, remote.Remote([url]) as client:
        assert "surrogates" in (await client.run("print('\ud800')")).stderr
        assert (await client.run("print(1)", timeout=float("nan"))).status == "refused"


async def test_a_fault_that_passes_costs_nothing_but_time(sandbox):
    calls = 0

    async def handler(request):
        nonlocal calls
        calls += 1
        if calls < 3:
            return web.json_response({"status": "SandboxError", "message": "busy"})
        ran = {"status": "Finished", "return_code": 0, "stdout": "well", "stderr": None, "execution_time": None}
        return web.json_response({"status": "Success", "message": "", "run_result": ran})

    async with faking(handler) as url, remote.Remote([url]) as client:
        assert (await client.run("print(1)")).stdout == "well"


async def test_a_dead_server_is_avoided(sandbox):
    async with serving(sandbox) as url, remote.Remote(["http://127.0.0.1:9", url]) as client:
        results = await asyncio.gather(*(client.run(f"print({i})") for i in range(20)))
        assert [result.stdout for result in results] == [f"{i}\n" for i in range(20)]
        assert await client.ping() == [False, True]


async def test_a_silent_server_ends_at_the_deadline(monkeypatch):
    monkeypatch.setattr(remote, "WAITING", 0.3)

    async def handler(_):
        await asyncio.sleep(30)
        raise AssertionError

    async with faking(handler) as url, remote.Remote([url]) as client:
        result = await asyncio.wait_for(client.run("1", timeout=0.2), 20)
    assert result.status == "infrastructure"


async def test_refusals_are_not_retried(sandbox):
    async with serving(sandbox, longest=5.0) as url, remote.Remote([url]) as client:
        result = await client.run("1", timeout=50)
        assert result.status == "refused" and "run_timeout" in result.stderr and client.counts["retries"] == 0


def test_urls_are_checked():
    assert remote.server_url("http://a:1/run_code/ ".strip()) == "http://a:1"
    with pytest.raises(UserError, match=r"sandbox.urls.*http://host:port"):
        remote.Remote(["localhost:8080"])
    for text in ("http://", "http://[::1", "http://a:port"):
        with pytest.raises(UserError, match=r"sandbox.urls"):
            remote.server_url(text)


def start_command(*options: str) -> tuple[subprocess.Popen[str], str]:
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.sandbox", "--port", "0", *options], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    return process, process.stdout.readline().split()[0]


def test_the_command_stops_gracefully(sandbox):
    process, url = start_command()
    with process:
        pending = subprocess.Popen(
            [sys.executable, "-c", f"import httpx; print(httpx.post('{url}/run_code', json={{'code': 'import time; time.sleep(3); print(7)'}}, timeout=30, trust_env=False).json()['run_result']['stdout'])"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with pending:
            while "sandbox_active 1" not in httpx.get(f"{url}/metrics", trust_env=False).text:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert pending.communicate(timeout=60)[0].strip() == "7"
        assert process.wait(60) == 0


def test_idle_connections_leave_room_for_runs(sandbox):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        process, url = start_command()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with process, contextlib.ExitStack() as idle:
        address = url.removeprefix("http://").split(":")
        for _ in range(100):
            idle.enter_context(socket.create_connection((address[0], int(address[1]))))
        answer = httpx.post(f"{url}/run_code", json={"code": "print(1)"}, timeout=20, trust_env=False)
        process.terminate()
    assert answer.json()["run_result"]["stdout"] == "1\n"


def test_a_flood_of_connections_leaves_the_server_able_to_run(sandbox):
    program = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); sys.argv[1:] = ['--port', '0', '--max_active', '2']; from launch.sandbox import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=pathlib.Path(__file__).parents[2]
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        try:
            url = process.stdout.readline().split()[0]
            host, port = url.removeprefix("http://").split(":")
            lasting = httpx.Limits(keepalive_expiry=120)  # it shall not need a second connection
            with httpx.Client(trust_env=False, timeout=20, limits=lasting) as early, contextlib.ExitStack() as idle:
                assert early.get(f"{url}/v1/ping").json() == "pong"
                for _ in range(300):
                    idle.enter_context(socket.create_connection((host, int(port)), 20))
                answers = [early.post(f"{url}/run_code", json={"code": "print(1)"}).json() for _ in range(3)]
            after, until = "", time.monotonic() + 20
            while not after and time.monotonic() < until:
                with contextlib.suppress(httpx.TransportError):  # it may not have seen yet that the others are gone
                    after = httpx.get(f"{url}/v1/ping", trust_env=False, timeout=20).json()
        finally:
            process.terminate()
        said = process.stderr.read()
    assert [answer["run_result"]["stdout"] for answer in answers] == ["1\n"] * 3 and after == "pong"
    assert "out of system resource" not in said


async def test_compressed_bodies_are_not_unpacked(sandbox):
    import gzip

    body = gzip.compress(b'{"code": "print(1)"}')
    async with serving(sandbox) as url, httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(
            f"{url}/run_code", content=body, headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}
        )
    assert answer.status_code == 422


async def send_slowly(url: str, length: int, body: bytes):
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /run_code HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    await asyncio.sleep(0.2)
    return reader, writer


async def test_slow_large_bodies_keep_no_small_ones_out(sandbox, monkeypatch):
    monkeypatch.setattr(server, "ALL_BODIES", 3000)
    monkeypatch.setattr(server, "FREE_BODY", 300)
    monkeypatch.setattr(server, "IDLE", 1.5)
    async with serving(sandbox) as url:
        reader, writer = await send_slowly(url, 5000, b"{" * 3200)
        idle = await send_slowly(url, server.LARGEST_BODY - 1, b"{")
        assert (await post(url, code="print(1)", stdin="x" * 1000, **RUN)).status_code == 429
        assert (await post(url, code="print(1)", **RUN)).status_code == 200
        assert (await asyncio.wait_for(reader.readline(), 20)).startswith(b"HTTP/1.1 408")
        assert (await asyncio.wait_for(idle[0].readline(), 20)).startswith(b"HTTP/1.1 408")
        writer.close()
        idle[1].close()
        assert (await post(url, code="print(1)", stdin="x" * 1000, **RUN)).status_code == 200
        reader, writer = await send_slowly(url, server.LARGEST_BODY + 1, b"{")
        assert (await asyncio.wait_for(reader.readline(), 20)).startswith(b"HTTP/1.1 413")
        writer.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Host": "attacker.example"}, 403),
        ({"Host": "attacker.example:8080"}, 403),
        ({"Host": "127.0.0.1.attacker.example"}, 403),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://[::1]:3000"}, 200),
    ],
)
async def test_web_pages_cannot_run_code(sandbox, headers, status):
    async with serving(sandbox) as url, httpx.AsyncClient(trust_env=False) as client:
        headers = {"Content-Type": "application/json"} | headers
        assert (await client.post(f"{url}/run_code", content='{"code": "1"}', headers=headers)).status_code == status


async def test_health_runs_one_program_however_often_it_is_called(sandbox):
    async with serving(sandbox) as url, httpx.AsyncClient(trust_env=False) as client:
        before = sandbox.counts["runs"]
        answers = await asyncio.gather(*(client.get(f"{url}/health", timeout=60) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200} and sandbox.counts["runs"] == before + 1


async def test_memory_limits_are_capped(sandbox):
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_AS)[0] >> 20)"
    async with serving(sandbox, max_memory_mb=300) as url:
        small, large = [
            int((await post(url, code=code, memory_limit_MB=mb, **RUN)).json()["run_result"]["stdout"])
            for mb in (100, 1 << 20)
        ]
    assert large - small == 200


async def test_many_deep_names_do_not_hold_up_other_runs(sandbox):
    deep = tuple("a/" * 60 + f"{i}" for i in range(1500))
    if sandbox.plan.disk:
        slow = asyncio.create_task(
            sandbox.run("import os; os.makedirs('a/' * 60); open('a/' * 60 + '7', 'w').write('x')", fetch=deep)
        )
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await sandbox.run("print(1)")
        assert (await slow).files == {deep[7]: b"x"} and time.monotonic() - started < 15
    assert (await sandbox.run("1", fetch=("a/" * 1900 + "b",))).status == "refused"


async def test_a_lying_server_gives_no_foreign_files_and_no_strange_times():
    answer = {"files": {"../x": "", "asked": "eA=="}, "execution_time": 0.5}

    async def handler(_):
        ran = {
            "status": "Finished",
            "return_code": 0,
            "stdout": "",
            "stderr": "",
            "execution_time": answer["execution_time"],
        }
        return web.Response(
            text=json.dumps({"status": "Success", "message": "", "run_result": ran, "files": answer["files"]})
        )

    async with faking(handler) as url, remote.Remote([url]) as client:
        assert (await client.run("1", fetch=("asked",))).files == {"asked": b"x"}
        for strange in (float("nan"), float("inf"), -1):
            answer["execution_time"] = strange
            assert (await client.run("1")).status == "infrastructure"


def test_check_tells_the_level(sandbox):
    done = subprocess.run(
        [sys.executable, "-m", "launch.sandbox", "--check"],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert done.returncode == 0 and f"This machine: level {sandbox.plan.level}" in done.stdout
    assert "contained  a program forks" in done.stdout


OFFICIAL = """
import base64, sys
from sandbox_fusion import RunCodeRequest, RunStatus, run_code
def go(**request):
    return run_code(RunCodeRequest(language="python", **request), endpoint=sys.argv[1], max_attempts=1)
good, bad = go(code="print(input())", stdin="hey"), go(code="1/0")
late = go(code="print('half')\\nwhile True: pass", run_timeout=1)
full = go(code="bytearray(1 << 40)")
if sys.argv[2] == "A":  # level B has no private file system and says so
    files = {"d/i": base64.b64encode(b"in").decode()}
    there = go(code="open('o', 'w').write(open('d/i').read())", files=files, fetch_files=["o"])
    assert base64.b64decode(there.files["o"]) == b"in"
assert good.status == RunStatus.Success and good.run_result.stdout == "hey\\n"
assert bad.status == RunStatus.Failed and "ZeroDivisionError" in bad.run_result.stderr and bad.run_result.return_code == 1
assert late.run_result.status == "TimeLimitExceeded" and late.run_result.stdout == "half\\n"
assert full.status == RunStatus.Failed and "MemoryError" in full.run_result.stderr
try:
    run_code(RunCodeRequest(code="1", language="cpp"), endpoint=sys.argv[1], max_attempts=1)
except Exception as error:
    assert "422" in str(error)
else:
    raise AssertionError("cpp was accepted")
print("all well")
"""


@pytest.mark.skipif(not importlib.util.find_spec("sandbox_fusion"), reason="needs sandbox-fusion, of the extra [test]")
def test_the_official_client_unchanged(sandbox):
    process, url = start_command()
    with process:
        done = subprocess.run([sys.executable, "-c", OFFICIAL, url, sandbox.plan.level], capture_output=True, text=True)
        process.terminate()
        assert process.wait(60) == 0
    assert done.stdout == "all well\n", done.stderr
