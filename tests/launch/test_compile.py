"""Two layers of the real config's step, compiled for devices that are not attached."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def compiled(out, *flags, topology="v5p:2x2x1"):
    command = [sys.executable, "-m", "launch.compile", f"--topology={topology}", "--layers=2", f"--out={out}"]
    command += ["--config=configs/qwen3_4b_grpo_tcr.py", "--config.packing.length=23040", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'"
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_libtpu
def test_the_real_step_compiles_for_a_topology_that_is_not_here(tmp_path):
    numbers = compiled(tmp_path / "numbers.json")
    assert numbers["attention"] == "splash"
    assert not numbers["faults"]
    kinds = {(row["kind"], row["axis"]): row for row in numbers["collectives"]}
    # One for each of seven matrices of a layer, and two for the embedding, which is the head too.
    assert kinds["reduce-scatter", "fsdp"]["runs"] == 7 * 2 + 2
    assert kinds["all-reduce", "fsdp"]["bytes"] < 2**20  # norms and counts
    counters = numbers["bytes"]["moments"] - 2 * numbers["bytes"]["parameters"]
    assert 0 <= counters <= 16  # the optimizer's and the schedule's
    assert 2 < numbers["flops"]["matrix_products"] / (numbers["flops"]["model"] / 6 * 2) < 5


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_libtpu
def test_two_slices_exchange_gradients_and_nothing_else(tmp_path):
    """Data parallel between slices: each device sends its shard of every gradient once per micro-batch."""
    small = ("--config.packing.length=2048", "--config.packing.rows=0", "--config.agent.max_response=1024")
    small += ("--config.agent.max_prompt=1024", "--config.reward.overlong_buffer=512")
    small += ("--config.mesh.data=2", "--config.mesh.seq=2")
    numbers = compiled(tmp_path / "numbers.json", *small, topology="2xv5e:2x2")
    assert numbers["mesh"]["data"] == 2
    assert not numbers["faults"]
    between = {row["kind"]: row for row in numbers["collectives"] if row["axis"] == "slices"}
    shard = numbers["bytes"]["parameters"]  # float32; the layers' gradients travel in bfloat16, the embedding's twice
    assert 0.5 * shard < between["all-reduce"]["bytes"] < 2.1 * shard
    assert sum(row["bytes"] for kind, row in between.items() if kind != "all-reduce") < 2**20
    assert numbers["seconds"]["slices"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_libtpu
def test_moments_in_host_memory_take_none_of_the_devices(tmp_path):
    sizes = compiled(tmp_path / "numbers.json", "--config.rl.optim.offload=true")["bytes"]
    assert sizes["host"] >= 2 * sizes["parameters"]
    assert sizes["arguments"] < 1.01 * (sizes["parameters"] + sizes["batch"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs pip install 'jax[cuda12]'")
def test_the_real_step_compiles_for_gpus_that_are_not_here(tmp_path):
    out = tmp_path / "numbers.json"
    command = [sys.executable, "-m", "launch.compile", "--topology=h100:8", "--layers=2", f"--out={out}"]
    command += ["--config=configs/qwen3_4b_grpo_tcr.py", "--config.packing.length=23040"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads(out.read_text())
    assert numbers["attention"] == "triton"
    kinds = {(row["kind"], row["axis"]): row for row in numbers["collectives"]}
    parameters = 8 * numbers["bytes"]["parameters"]
    assert parameters / 2 < kinds["reduce-scatter", "fsdp"]["bytes"] < 2 * parameters  # float32, and bfloat16 in layers
    assert kinds["all-reduce", "fsdp"]["bytes"] < 2**22  # norms and counts
    # Two products forward, twice because it is computed again, and seven backward.
    square = 11 * 2 * 8 * 23040**2 * 32 * 128 * 2
    assert numbers["flops"]["attention_whole_square"] == square
