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


def conversations(run_dir):
    """What was said in each episode, by phase, step, problem and sample; no episode may occur twice."""
    texts = [line for path in run_dir.glob("trajectories*.jsonl") for line in lines(run_dir, path.name)]
    said = {tuple(t[n] for n in ("phase", "step", "problem_id", "sample")): t["messages"] for t in texts}
    assert len(said) == len(texts)
    return said


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
    played = sorted(path.name for path in two.glob("trajectories*.jsonl"))
    assert played == ["trajectories-1.jsonl", "trajectories.jsonl"]
    continued = run("train", two, devices=2, **SETTINGS)  # on one process
    assert continued.returncode == 0, continued.stderr[-2000:]
    assert "resumed: rl step" in continued.stdout and "before RL" in continued.stdout
    phases = [(line["phase"], line["step"]) for line in lines(two)]
    assert phases == [("sft", 1), ("sft", 2), ("sft", 3), ("eval", 0), ("rl", 1), ("rl", 2), ("rl", 3), ("eval", 3)]
    for phase, names in {"sft": ("loss", "actor/grad_norm"), "rl": ("reward/mean", "actor/entropy")}.items():
        for name in names:
            one, more = ([x[name] for x in lines(d) if x["phase"] == phase] for d in (tmp_path / "one", two))
            assert more == pytest.approx(one, rel=1e-3, abs=1e-6), (phase, name)
    assert conversations(two) == conversations(tmp_path / "one")
    assert (two / "export" / "model.safetensors").stat().st_size > 0
