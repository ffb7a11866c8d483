"""The checks of launch.doctor: what passes, and what each fault says."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest

from configs import quickstart
from open_agentrl_jax.run import doctor
from open_agentrl_jax.types import UserError
from tests.launch.runs import ROOT, environment


def finding(check, config):
    findings = {found.check: found for found in doctor.examine(config)}
    assert set(findings) == set(doctor.CHECKS)
    return findings[check]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The quickstart, its slow checks replaced."""
    monkeypatch.setitem(doctor.CHECKS, "sandbox", lambda config: "")
    made = quickstart.get_config()
    made.run_dir = str(tmp_path / "runs" / "new")
    return made


def test_the_quickstart_passes_and_nothing_is_left_behind(config, tmp_path):
    findings = list(doctor.examine(config))
    assert [found.check for found in findings if not found.ok] == []
    assert list(tmp_path.iterdir()) == []


def test_too_few_devices(config, monkeypatch):
    monkeypatch.setenv("DEVICES_PER_PROCESS", "8")
    found = finding("devices", config)
    assert not found.ok
    assert "found 1 (cpu) of 8" in found.text


def test_a_mesh_that_the_devices_do_not_make_up(config):
    config.mesh.tensor = 3
    found = finding("mesh", config)
    assert not found.ok
    assert "needs a multiple of 3 devices" in found.text


def test_a_mesh_with_nearly_empty_rows_names_a_better_one(config, monkeypatch):
    """256 devices without `seq`."""
    laid_out = types.SimpleNamespace(
        shape={"data": 1, "fsdp": 256, "seq": 1, "tensor": 1, "expert": 1},
        devices=np.array([types.SimpleNamespace(platform="cpu")], object),
    )
    monkeypatch.setattr(doctor, "mesh_of", lambda config: laid_out)
    config.packing.rows, config.packing.length = 0, 0
    config.rl.prompts, config.rl.samples, config.rl.mini_batches = 16, 16, 1
    config.agent.max_prompt, config.agent.max_response = 2560, 20480
    said = []
    useful, cure = doctor.packed(config)
    assert useful < 0.3 and cure.startswith("mesh.seq=8 with packing.rows=0 and packing.more_lengths=(")
    assert cure in doctor.mesh(config)
    monkeypatch.setattr(doctor, "slow_attention", lambda config: "")
    monkeypatch.setattr(doctor, "_memory", lambda config: [])
    doctor.preflight(config, said.append, None)
    assert cure in said[0]


def test_too_much_memory_names_the_field(config, monkeypatch):
    monkeypatch.setattr(doctor.memory, "device_bytes", lambda: 2**20)
    found = finding("memory", config)
    assert not found.ok
    assert "rollout.slots=" in found.text or "mesh.seq" in found.text


def test_servers_that_are_not_installed(config, monkeypatch, tmp_path):
    monkeypatch.setenv("SGLANG_ENV", str(tmp_path))
    config.rollout.engine, config.rollout.launch_servers = "sglang", 2
    found = finding("servers", config)
    assert not found.ok
    assert "install" in found.text


def test_a_missing_data_file(config, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config.model.tokenizer, config.data.train = str(tmp_path / "tokenizer"), str(tmp_path / "none.jsonl")
    found = finding("data", config)
    assert not found.ok
    assert "none.jsonl" in found.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="give a writable folder"):
        doctor.write_and_read_back(tmp_path, "run_dir")


def test_a_disk_that_other_processes_do_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "False\n", ""))
    with pytest.raises(UserError, match="use a shared disk"):
        doctor.write_and_read_back(tmp_path, "run_dir")
    assert list(tmp_path.iterdir()) == []


def test_the_command_exits_with_2_where_a_check_fails(tmp_path):
    command = [sys.executable, "-m", "launch.doctor", "--config=configs/quickstart.py", f"--config.run_dir={tmp_path}"]
    done = subprocess.run(
        [*command, "--config.mesh.tensor=3"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "FAILS  mesh:" in done.stdout
    assert "checks fail: mesh" in done.stdout
