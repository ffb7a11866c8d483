"""`launch.benchmark rollout` and `refit` as a user starts them, on a real server, at a size of seconds."""

import json
import subprocess
import sys

import pytest

from tests.launch.runs import ROOT, environment

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]


def rows(out, *command):
    command = [sys.executable, "-m", "launch.benchmark", *command, f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_throughput(tmp_path):
    small = "--repeats 1 --episodes 4 --concurrency 4 --samples 2 --turns 2 --tokens 8"
    measured = rows(tmp_path / "out.json", "rollout", *small.split())
    assert measured["throughput"]["whole path"]["tokens"] == measured["throughput"]["bare"]["tokens"] > 0


def test_refit(tmp_path):
    measured = rows(tmp_path / "out.json", "refit", "--rounds", "1", "--params", "tiny")["rows"]
    assert [row["way"] for row in measured] == ["files", "tensors", "distributed"]
    for row in measured:
        assert 0 < row["publish s"] < row["refit s"] and row["usual s"] > 0 and row["stop s"] > 0
