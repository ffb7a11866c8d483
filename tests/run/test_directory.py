import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from open_agentrl_jax.config import Config
from open_agentrl_jax.data import rows
from open_agentrl_jax.run import directory as directories
from open_agentrl_jax.run.directory import claim_data, claim_directory, lock_directory, undone_if_refused
from open_agentrl_jax.types import UserError

HOLD = """
import os, sys, time, pathlib
from open_agentrl_jax.run.directory import lock_directory
lock_directory(pathlib.Path(sys.argv[1]))
if os.fork() == 0:  # a child outlives a killed run for a while
    time.sleep(30)
print("locked", flush=True)
time.sleep(30)
"""


@pytest.fixture
def holder(tmp_path):
    """Another run in `tmp_path / "run"`, with a child process."""
    command = [sys.executable, "-c", HOLD, tmp_path / "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_one_run_per_directory_and_a_killed_run_leaves_no_lock(tmp_path, holder):
    run = tmp_path / "run"
    (run / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"another run is working there .process {holder.pid} on "):
        lock_directory(run)
    with pytest.raises(UserError, match="another run"), undone_if_refused(run):
        claim_directory(Config(name="x", run_dir=str(run)))
    assert (run / "config.json").exists()
    holder.kill()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            return lock_directory(run)
        except UserError:
            time.sleep(0.01)
    pytest.fail("still locked")


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock_directory(tmp_path)
    assert "this file system has no locks" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fingerprint": 1}', '{"model_type": "qwen3"}'])
def test_a_config_json_that_is_no_run_s_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"not the config\.json of a run"):
        claim_directory(Config(name="x", run_dir=str(tmp_path)))
    assert (tmp_path / "config.json").read_text() == content


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_a_run_directory_that_cannot_be_made(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run_dir=.*give another run_dir"):
        claim_directory(Config(name="x", run_dir=str(tmp_path / place)))


def test_secrets_are_neither_written_nor_part_of_the_claim(tmp_path):
    config = Config(name="x", run_dir=str(tmp_path))
    config.rollout.servers = ("http://me:s3cret@host:1",)
    config.agent.tools = ("mcp:serve --api-key s3cret",)
    claim_directory(config)
    text = (tmp_path / "config.json").read_text()
    assert "s3cret" not in text and "http://***@host:1" in text
    config.agent.tools = ("mcp:serve --api-key changed",)
    claim_directory(config)
    config.seed = 3
    with pytest.raises(UserError, match="seed: 0 there, 3 here"):
        claim_directory(config)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["id"] == directories.run_id(tmp_path)


def test_training_files_replaced_between_two_starts_are_refused(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    config.rl.steps, config.data.train = 1, f"{tmp_path / 'a.jsonl'}:3,{tmp_path / 'b.jsonl'}:1"
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(name)
    directory = claim_directory(config)
    claim_data(directory, config)
    (tmp_path / "b.jsonl").write_text("corrected before anything was trained")
    claim_data(directory, config)
    (directory / "metrics.jsonl").write_text("{}\n")
    claim_data(directory, config)
    (tmp_path / "b.jsonl").write_text("other")
    with pytest.raises(UserError, match=r"data\.train=.*b\.jsonl: its content is not what the run"):
        claim_data(directory, config)
    config.rl.steps = 0  # a phase that reads nothing
    claim_data(directory, config)


@pytest.mark.parametrize("data", ["FOLDER", "gsm8k=FOLDER/a.jsonl:2", "openai/gsm8k:*.jsonl"])
def test_other_data_behind_the_same_name_is_refused(tmp_path, monkeypatch, data):
    """A folder, a named set and a Hub data set."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("a")
    monkeypatch.setattr(rows, "_download", lambda name, pattern: folder)
    config = Config(run_dir=str(tmp_path / "run"))
    config.data.train, config.rl.steps = data.replace("FOLDER", str(folder)), 1
    directory = claim_directory(config)
    claim_data(directory, config)
    (directory / "metrics.jsonl").write_text("{}\n")
    claim_data(directory, config)
    (folder / "a.jsonl").write_text("other")
    with pytest.raises(UserError, match="its content is not what the run"):
        claim_data(directory, config)


def test_a_read_that_fails_once_is_repeated(tmp_path, monkeypatch):
    """NFS may answer a read with ESTALE once."""
    config = Config(run_dir=str(tmp_path / "run"))
    claim_directory(config)
    real, failed = pathlib.Path.read_bytes, []

    def stale_once(path, *args, **more):
        if path.name == "config.json" and not failed:
            failed.append(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(pathlib.Path, "read_bytes", stale_once)
    assert claim_directory(config) == tmp_path / "run"
    assert failed


def test_the_processes_of_a_run_share_the_lock_of_the_first(tmp_path, holder, monkeypatch):
    config = Config(run_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="another run"):
        claim_directory(config)
    monkeypatch.setattr(directories.processes, "first", lambda: False)
    assert claim_directory(config) == tmp_path / "run"


def test_a_new_run_directory_is_private(tmp_path):
    lock_directory(tmp_path / "runs" / "mine")
    assert (tmp_path / "runs" / "mine").stat().st_mode & 0o777 == 0o700
    (tmp_path / "shared").mkdir(mode=0o750)
    lock_directory(tmp_path / "shared")
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o750  # as its owner made it
