"""One run of two processes, as on two hosts that share a disk."""

import signal
import socket
import subprocess
import time

import pytest

from tests.launch.runs import ROOT, command, environment, lines, run

SETTINGS = {
    "packing.rows": 4,
    "mesh.tensor": 2,
    "sft.optim.lr": 1e-4,
    "rl.optim.lr": 1e-5,
    "rl.optim.schedule": "constant",
}


def start_two(run_dir, **overrides):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    return [
        subprocess.Popen(
            command("train", run_dir, **SETTINGS, **overrides),
            cwd=ROOT,
            env=environment(2) | {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2", "PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def finish(processes):
    told = [process.communicate(timeout=600) for process in processes]
    assert [p.returncode for p in processes] == [0, 0], told[0][1][-2000:] + told[1][1][-2000:]
    return told


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_stop_go_on_and_end_with_the_numbers_of_one(tmp_path):
    assert run("train", tmp_path / "one", **SETTINGS | {"mesh.tensor": 1}).returncode == 0
    two = tmp_path / "two"
    processes = start_two(two)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and all(p.poll() is None for p in processes):
        if (two / "metrics.jsonl").exists() and any(line["phase"] == "rl" for line in lines(two)):
            break
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # to one of them
    (told, _), (silent, _) = finish(processes)
    assert "interrupted: saved" in told and "run quickstart" not in silent  # Gloo itself greets on both
    (told, _), _ = finish(start_two(two))
    assert "resumed: rl step" in told and "before RL" in told
    phases = [(line["phase"], line["step"]) for line in lines(two)]
    assert phases == [("sft", 1), ("sft", 2), ("sft", 3), ("eval", 0), ("rl", 1), ("rl", 2), ("rl", 3), ("eval", 3)]
    for phase, names in {"sft": ("loss", "actor/grad_norm"), "rl": ("reward/mean", "actor/entropy")}.items():
        for name in names:
            one, more = ([x[name] for x in lines(d) if x["phase"] == phase] for d in (tmp_path / "one", two))
            assert more == pytest.approx(one, rel=1e-3, abs=1e-6), (phase, name)
    assert (two / "export" / "model.safetensors").stat().st_size > 0
