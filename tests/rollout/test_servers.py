"""The guard around launched servers, with a stand-in for the server: it writes its process id and sleeps."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

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


def test_a_dead_server_is_started_again_and_all_end_with_close(tmp_path, pids):
    with LaunchedServers("model", 1, log_dir=tmp_path, context_length=64) as servers:
        until(started(pids, 1))
        servers.kill(0)
        until(started(pids, 2))
        first, second = pids()
        assert not alive(first)
        assert alive(second)
        with pytest.raises(EngineError, match="does not answer"):
            servers.wait(0.1)
    assert not alive(second)


def test_servers_end_with_a_run_that_is_killed(tmp_path, pids):
    run = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)])
    try:
        until(started(pids, 2))
        assert all(map(alive, pids()))
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    until(lambda: not any(map(alive, pids())))


def test_a_missing_installation_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("SGLANG_ENV", str(tmp_path))
    with pytest.raises(UserError, match=r"rollout\.launch_servers: .*third_party/sglang/install\.sh"):
        interpreter()
