"""Training on several devices by the command itself."""

import pytest

from tests.launch.runs import lines, run

MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "seq": 2, "tensor": 2})


def on(mesh):
    return {f"mesh.{axis}": size for axis, size in mesh.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_on_another_mesh_with_the_numbers_of_one_device(tmp_path):
    """Adam divides by the root of tiny moments, so numbers agree to some digits and no more after a few updates."""
    settings = {"packing.rows": 4, "sft.optim.lr": 1e-4, "rl.optim.lr": 1e-5, "rl.optim.schedule": "constant"}
    assert run("train", tmp_path / "one", **settings).returncode == 0
    several = tmp_path / "several"
    for steps, mesh in ((2, MESHES[0]), (3, MESHES[1])):
        done = run("train", several, devices=8, **settings, **on(mesh), **{"rl.steps": steps})
        assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed: rl step 2 is done" in done.stdout
    for phase, names in {"sft": ("loss", "actor/grad_norm"), "rl": ("reward/mean", "actor/entropy")}.items():
        for name in names:
            one, more = ([x[name] for x in lines(d) if x["phase"] == phase] for d in (tmp_path / "one", several))
            assert more == pytest.approx(one, rel=1e-3, abs=1e-6), (phase, name)


def test_rows_that_the_mesh_does_not_divide(tmp_path):
    done = run("train", tmp_path / "run", devices=4, **{"packing.rows": 3})
    assert done.returncode == 2
    assert "packing.rows=3 does not divide by mesh data x fsdp x expert = 4" in done.stderr.strip().splitlines()[-1]
