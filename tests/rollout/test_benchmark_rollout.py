"""`launch.benchmark rollout` as a user starts it, on a real server, at a size of seconds."""

import json
import subprocess
import sys

import pytest

from tests.launch.runs import ROOT, environment

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]


def test_throughput_and_refit(tmp_path):
    small = "--repeats 1 --episodes 4 --concurrency 4 --samples 2 --turns 2 --tokens 8"
    command = [sys.executable, "-m", "launch.benchmark", "rollout", *small.split(), f"--out={tmp_path / 'out.json'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads((tmp_path / "out.json").read_text())
    assert measured["throughput"]["whole path"]["tokens"] == measured["throughput"]["bare"]["tokens"] > 0
    (refit,) = (value for key, value in measured["refit"].items() if key.startswith("0.19 B"))
    assert refit["probe difference"] < 0.1 and 0 < refit["files s"] < refit["refit s"]
