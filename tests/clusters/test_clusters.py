"""The real entry point under each cluster manager's environment, as two processes of four fake devices."""

import pytest

from tests.clusters import standins
from tests.launch.runs import command, lines


@pytest.mark.parametrize("kind", standins.ALL)
def test_two_processes_find_each_other_and_all_devices(kind):
    with standins.ALL[kind]() as environments:
        done = standins.start(["join"], environments)
    for rank, (code, out, error) in enumerate(done):
        assert code == 0, error[-2000:]
        expected = "any number" if kind == "tpu_vm" else "8"
        assert f"devices: 8 found, {expected} expected (2 processes x 4 cpu)" in out
        assert f"'fsdp': 8, 'seq': 1, 'tensor': 1, 'expert': 1}} {rank}" in out


def test_a_node_that_lost_a_gpu_ends_the_run():
    """Three devices for four: the run ends instead of training on what is left."""
    with standins.slurm() as environments:
        done = standins.start(["join"], environments, devices=3)
    for code, _, error in done:
        assert code != 0
        assert "found 3 (cpu) of 4" in error


FOUR = {"sft.steps": 2, "rl.steps": 2, "packing.rows": 8, "rl.prompts": 4, "checkpoint.every": 1}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", standins.ALL)
def test_two_steps_of_training(kind, tmp_path):
    with standins.ALL[kind]() as environments:
        done = standins.start(command("train", tmp_path / "run", **FOUR)[2:], environments)
    (code, out, error), (other, silent, _) = done
    assert (code, other) == (0, 0), error[-3000:]
    assert "devices: 8 found" in out
    assert "run quickstart" not in silent
    steps = [(line["phase"], line["step"]) for line in lines(tmp_path / "run") if line["phase"] != "eval"]
    assert steps == [("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", ["FAKE_NO_DIRECTORY_RENAMES", "FAKE_STALE_READS"])
def test_a_run_and_its_continuation_on_a_difficult_disk(fault, tmp_path):
    """gcsfuse refuses to rename directories; NFS may fail the first read of a file."""
    run = tmp_path / "run"
    for steps in (1, 2):
        with standins.gpu_jobset() as environments:
            arguments = command("train", run, **FOUR | {"rl.steps": steps})[2:]
            done = standins.start(arguments, environments, **{fault: str(tmp_path)})
        assert [code for code, *_ in done] == [0, 0], done[0][2][-3000:]
    assert "resumed: rl step 1 is done" in done[0][1]
    assert [line["step"] for line in lines(run) if line["phase"] == "rl"] == [1, 2]
