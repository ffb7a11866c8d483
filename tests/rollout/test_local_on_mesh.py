"""The embedded engine on the trainer's mesh gives what it gives on one device."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.devices import fake

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("cases", [("0",), pytest.param(tuple("123456"), marks=pytest.mark.slow)])
def test_any_mesh_generates_what_one_device_does(cases):
    """Two turns, groups, more requests than slots; sampled tokens too, though only the greedy ones must be equal.

    A draw may fall between two probabilities that differ in the last bits; here none does.
    """
    program = [sys.executable, "-m", "tests.rollout.eight_devices", *cases]
    done = subprocess.run(program, cwd=ROOT, env=os.environ | fake(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert len(told) == len(cases)
    for case in told:
        assert all(case["tokens"]), case
        assert 0 < case["logprobs"] < 1e-5, case  # sums are added up in another order
        assert case["bits"], case  # in other slots, at other times, with others
        assert case["shared"] == (case["weights"] == "same") and case["held"] == 1 / 8, case
        assert case["cached_tokens"] > 0 and case["parked"] > 0 and case["recompilations"] == 0, case
