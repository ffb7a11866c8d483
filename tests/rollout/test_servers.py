"""Launched servers: their guard, with a stand-in that writes its process id and sleeps, and their arguments."""

import http.server
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from open_agentrl_jax.rollout import servers
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.rollout.servers import LaunchedServers, interpreter
from open_agentrl_jax.types import UserError

STAND_IN = """#!/bin/sh
echo $$ >> "$PIDS"
exec sleep 300
"""
RUN = """
import sys, time
from open_agentrl_jax.rollout.servers import LaunchedServers
servers = LaunchedServers("model", 2, log_dir=sys.argv[1], context_length=64)
time.sleep(300)
"""


@pytest.fixture
def pids(tmp_path, monkeypatch):
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    monkeypatch.setenv("SGLANG_ENV", str(tmp_path / "env"))
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    return lambda: [int(line) for line in (tmp_path / "pids").read_text().split()]


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def started(pids, count):
    def condition():
        try:
            return len(pids()) >= count
        except OSError:
            return False

    return condition


def test_a_dead_server_restarts_and_all_end_with_close(tmp_path, pids):
    with LaunchedServers("model", 1, log_dir=tmp_path, context_length=64) as launched:
        until(started(pids, 1))
        launched.kill(0)
        until(started(pids, 2))
        first, second = pids()
        assert not alive(first)
        assert alive(second)
        with pytest.raises(EngineError, match="does not answer"):
            launched.wait(0.1)
    assert not alive(second)


def test_servers_end_with_a_killed_run(tmp_path, pids):
    run = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)])
    try:
        until(started(pids, 2))
        assert all(map(alive, pids()))
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    until(lambda: not any(map(alive, pids())))


def test_a_missing_installation_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("SGLANG_ENV", str(tmp_path))
    with pytest.raises(UserError, match=r"rollout\.launch_servers: .*third_party/sglang/install\.sh"):
        interpreter()


def test_a_server_that_cannot_start_is_reported_with_its_log(tmp_path, monkeypatch):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho unknown argument; exit 2\n")
    python.chmod(0o755)
    monkeypatch.setenv("SGLANG_ENV", str(tmp_path))
    monkeypatch.setattr(servers, "CRASHES", 1)
    with (
        servers.LaunchedServers("model", 1, log_dir=tmp_path, context_length=64) as launched,
        pytest.raises(EngineError, match=r"(?s)exits while it starts.*unknown argument.*exit status 2"),
    ):
        launched.wait(20)


def test_polling_this_machine_uses_no_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with http.server.HTTPServer(("127.0.0.1", 0), Pong) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert servers._answers(f"http://127.0.0.1:{server.server_address[1]}")


class Pong(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


PARSE = {  # prints the parsed arguments as JSON
    "sglang": """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print(json.dumps(vars(parser.parse_args(sys.argv[1:])), default=str))
""",
    "sglang_jax": """
import argparse, json, sys
from sgl_jax.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print(json.dumps(vars(parser.parse_args(sys.argv[1:])), default=str))
""",
}


@pytest.mark.sglang
@pytest.mark.parametrize("kind", ["sglang", "sglang_jax"])
def test_the_parser_of_the_server_accepts_the_arguments(kind):
    server = servers.KINDS[kind]
    for flags in (
        server.cpu_flags,
        servers.device_flags(kind, 1, first_device=2, tensor=2, memory=0.7),
    ):
        command = [str(servers.interpreter(kind)), "-W", "ignore", "-c", PARSE[kind]]
        command += ["--model-path", "m", "--context-length", "9", "--max-total-tokens", "9", *server.flags, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        parsed = json.loads(done.stdout.strip().splitlines()[-1])
    assert parsed["mem_fraction_static"] == 0.7
    assert parsed["tp_size" if kind == "sglang" else "tensor_parallel_size"] == 2
    assert parsed["skip_tokenizer_init"] is True
    if kind == "sglang":
        assert parsed["base_gpu_id"] == 4
        assert parsed["device"] == "cuda"
