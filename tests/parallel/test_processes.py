import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

from open_agentrl_jax.models import hf, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.train import publish
from tests.devices import fake

from ..models.rows import packed
from .eight_devices import difference, jitter, loss

CONFIG = ModelConfig("qwen2", 96, 64, 128, 2, 4, 2, 16)


def start(program, folder, devices=2):
    """Starts two processes of a program of this folder, each with some fake devices."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, pathlib.Path(__file__).with_name(program), str(rank), port, folder],
            env=os.environ | fake(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_processes_agree_on_the_checkpoint_they_restore(tmp_path):
    processes = start("restoring.py", tmp_path, devices=1)
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (out, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error
        assert out.splitlines()[-3:] == ["transient 60 2 True", "memory True", "damaged 30 4 True"]
    assert (tmp_path / "60" / "damaged.txt").exists() and not (tmp_path / "30" / "damaged.txt").exists()


def test_two_processes_load_compute_export_and_publish_as_one(tmp_path):
    params = jitter(qwen.init(CONFIG, 0))
    hf.save_pretrained(tmp_path / "model", CONFIG, params)
    tokens, positions, segments = packed(np.random.default_rng(0), 4, 24, 12, vocab=96)
    batch = np.stack([tokens, positions, segments, np.roll(tokens, -1, 1)])
    np.save(tmp_path / "batch.npy", batch)
    processes = start("two_processes.py", tmp_path)
    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, CONFIG, *batch)
    for process in processes:
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        theirs, held = map(float, out.split()[-2:])
        assert abs(theirs - value) < 1e-5 * value
        assert 0.4 < held < 0.6  # each process read and holds its half of the model
    assert difference(hf.load_pretrained(tmp_path / "params")[1], params) == 0
    assert difference(hf.load_pretrained(tmp_path / "gradient")[1], gradient) < 1e-5
    published = [hf.load_pretrained(publish.version_path(tmp_path / "weights", version))[1] for version in (2, 3)]
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
    published.append(hf.load_pretrained(publish.version_path(tmp_path / "memory-0", 4))[1])
    assert [difference(one, rounded) for one in published] == [0, 0, 0]
    assert not (tmp_path / "memory-1").exists()
    expected = publish.replayed_logprobs(params, CONFIG, range(9))  # an odd number, of a row in two parts
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"replayed-{rank}.npy"), expected, atol=1e-5)
