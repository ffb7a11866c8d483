"""Every benchmark as a user starts it, with figures small enough for seconds: it runs, and prints its table."""

import os
import subprocess
import sys

import pytest

from tests.launch.runs import ROOT, environment
from tests.sandbox.test_server import start_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SMALL = {
    "decode": ("--layers=1 --batches=2 --lengths=16 --tokens=4 --rounds=1", "tokens/s"),
    "memory": ("--tokens=512 --vocab=2048 --width=32 --chunks=256 --timed_tokens=256 --rounds=1", "256"),
    "sandbox": ("--seconds 0.3 --programs print --concurrency 2", "embedded sandbox"),
    "scaling": ("--rounds=1 --sweeps=fsdp --picture=scaling.svg", "devices"),
    "train": ("--shapes=8x512 --rounds=1", "torch"),
}


def run(name, flags, cwd):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "launch.benchmark", name, *flags.split()]
    done = subprocess.run(command, cwd=cwd, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs(name, tmp_path):
    flags, told = SMALL[name]
    assert told in run(name, flags, tmp_path)
    assert name != "scaling" or (tmp_path / "scaling.svg").read_text().startswith("<svg")


def test_a_server_beside_the_embedded_sandbox(tmp_path):
    process, url = start_command()
    with process:
        told = run("sandbox", f"{SMALL['sandbox'][0]} --url {url}", tmp_path)
        process.terminate()
    assert "remote" in told and "embedded sandbox" in told
