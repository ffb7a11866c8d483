import dataclasses
import gc
import json
import shutil

import jax
import numpy as np
import pytest
import tenacity
from orbax.checkpoint import v1 as ocp

from open_agentrl_jax.config import Optim
from open_agentrl_jax.models import qwen
from open_agentrl_jax.train import checkpoint
from open_agentrl_jax.train import state as states
from open_agentrl_jax.train.checkpoint import Checkpoints, Progress
from open_agentrl_jax.train.optimizer import make_optimizer
from open_agentrl_jax.types import UserError
from tests.disks import bucket_mount  # noqa: F401 - a fixture
from tests.train.tiny import MODEL

OPTIMIZER = make_optimizer(Optim(lr=1e-3), 10)


def make(seed):
    return states.create(qwen.init(MODEL, seed), OPTIMIZER, entropy_coef=seed / 10)


def abstract():
    return {"rl": lambda: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(checkpoint, "WAIT", tenacity.wait_none())


def save(folder, *entries, **options):
    checkpoints = Checkpoints(folder, **options)
    for state, progress in entries:
        checkpoints.save(state, progress)
    checkpoints.close()


def restore(folder, **options):
    checkpoints = Checkpoints(folder, **options)
    try:
        return checkpoints.restore(abstract())
    finally:
        checkpoints.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def three(tmp_path):
    entries = [(make(n), Progress("rl", n, next=4 * n, pending=[n], best=0.5)) for n in (1, 2, 3)]
    save(tmp_path, *entries, keep=2)
    return tmp_path


def test_a_checkpoint_restores_bit_for_bit_and_old_ones_are_evicted(three):
    state, progress = restore(three)
    equal(state, make(3))
    assert progress == Progress("rl", 3, 12, [3], {}, 0.5)
    assert names(three) == ["2", "3"]


@pytest.mark.parametrize("offload", [True, False])
def test_moments_may_move_between_host_and_device_on_resume(tmp_path, offload):
    before, after = (make_optimizer(Optim(offload=o), 10) for o in (not offload, offload))
    params = qwen.init(MODEL, 1)
    save(tmp_path, (saved := states.create(params, before), Progress("rl", 1)))
    checkpoints = Checkpoints(tmp_path)
    state, _ = checkpoints.restore({"rl": lambda: states.abstract(params, after, None)})
    checkpoints.close()
    equal(state, saved)
    moments = state.opt_state[1][0].mu
    assert {x.sharding.memory_kind for x in jax.tree.leaves(moments)} == {"pinned_host" if offload else "device"}


def test_fewer_sft_steps_after_a_restart_lose_no_rl_progress(tmp_path):
    both = {phase: abstract()["rl"] for phase in ("sft", "rl")}
    save(tmp_path, (make(0), Progress("sft", 100)), (make(1), Progress("rl", 10)), keep=1)
    assert names(tmp_path) == ["110"]
    for step in (20, 30):  # restarted with sft.steps=50: numbers of 50 + step would be evicted as the oldest
        checkpoints = Checkpoints(tmp_path, keep=1)
        assert checkpoints.restore(both)[1].step == step - 10
        checkpoints.save(make(step), Progress("rl", step))
        checkpoints.close()
    assert names(tmp_path) == ["130"]


def test_equal_progress_is_saved_once(tmp_path):
    save(tmp_path, (make(1), Progress("rl", 1, offsets={"a": 1})), (make(1), Progress("rl", 1, offsets={"a": 2})))
    assert names(tmp_path) == ["1"]


@pytest.mark.usefixtures("bucket_mount")
def test_a_bucket_that_renames_no_directory(tmp_path):
    save(tmp_path, *((make(n), Progress("rl", n)) for n in (1, 2, 3)), keep=2)
    partial = tmp_path / "4"  # a writer was killed: there is no marker
    shutil.copytree(tmp_path / "3", partial)
    for marker in partial.rglob("commit_success.txt"):
        marker.unlink()
    metadata = json.loads((partial / "_CHECKPOINT_METADATA").read_text()) | {"commit_timestamp_nsecs": None}
    (partial / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    state, progress = restore(tmp_path)
    equal(state, make(3))
    assert progress.step == 3 and names(tmp_path) == ["2", "3"]


def test_checkpoints_that_were_renamed_into_place_are_found(tmp_path):
    tree = {field.name: getattr(make(1), field.name) for field in dataclasses.fields(states.TrainState)}
    old = ocp.training.Checkpointer(tmp_path)
    old.save(7, tree, custom_metadata={"progress": dataclasses.asdict(Progress("rl", 7))})
    old.close()
    assert restore(tmp_path)[1].step == 7


# When one read fails, orbax leaves its other readers unawaited.
abandoned = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def swept():
    """Collects what a test left unawaited at its own end, not in a later test."""
    yield
    gc.collect()


@abandoned
@pytest.mark.usefixtures("swept")
@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "metadata"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(three, damage, caplog):
    files = sorted((p for p in (three / "3").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest = files[-1]
    data = bytearray(largest.read_bytes())
    if damage == "cut":
        largest.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        for place in range(len(data) // 4, len(data), max(1, len(data) // 50)):
            data[place] ^= 0xFF
        largest.write_bytes(data)
    elif damage == "remove":
        largest.unlink()
    else:
        for file in (three / "3").rglob("_*METADATA"):
            file.write_text("{")
    checkpoints = Checkpoints(three, keep=1)
    state, progress = checkpoints.restore(abstract())
    assert progress.step == 2
    equal(state, make(2))
    assert "checkpoint 3 is damaged" in caplog.text and "trying the one before" in caplog.text
    for step in (3, 4):
        checkpoints.save(make(step), Progress("rl", step))
    checkpoints.close()
    assert names(three) == ["3", "5"]  # the damaged one is kept and does not count
    assert (three / "3" / checkpoint.DAMAGED).read_text()
    assert restore(three, keep=1)[1].step == 4


@pytest.fixture
def unreadable(three):
    """The newest checkpoint, one file of which answers every read with EIO."""
    largest = max((path for path in (three / "3").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.unlink()
    largest.symlink_to("/proc/self/mem")
    return three, largest, content


def repair(largest, content):
    largest.unlink()
    largest.write_bytes(content)


@abandoned
@pytest.mark.usefixtures("swept")
def test_an_unreadable_newest_checkpoint_is_not_damage(unreadable):
    three, largest, content = unreadable
    with pytest.raises(UserError, match=r"3: the newest checkpoint cannot be read, Input/output error .*again"):
        restore(three)
    assert names(three) == ["2", "3"] and not (three / "3" / checkpoint.DAMAGED).exists()
    repair(largest, content)
    assert restore(three)[1].step == 3


@abandoned
@pytest.mark.usefixtures("swept")
def test_a_read_that_fails_once_is_repeated(unreadable, monkeypatch):
    three, *file = unreadable
    monkeypatch.setattr(checkpoint, "WAIT", lambda state: repair(*file) or 0)
    assert restore(three)[1].step == 3


def test_memory_that_does_not_suffice_is_not_damage(three, monkeypatch):
    def load(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 2 GB")

    monkeypatch.setattr(checkpoint, "_load", load)
    with pytest.raises(UserError, match="not enough memory"):
        restore(three)
    assert names(three) == ["2", "3"]


@abandoned
@pytest.mark.usefixtures("swept")
def test_only_damaged_checkpoints_are_an_error_and_stay(three):
    for folder in three.iterdir():
        for file in folder.rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint can be read"):
        restore(three)
    assert names(three) == ["2", "3"] and not list(three.rglob(checkpoint.DAMAGED))


def test_an_empty_folder_is_a_new_run(tmp_path):
    assert restore(tmp_path / "new") is None


def test_the_best_is_kept_too(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=True)
    for number, accuracy in ((1, 0.2), (2, 0.9), (3, 0.5), (4, None)):
        checkpoints.save(make(number), Progress("rl", number), accuracy=accuracy)
    checkpoints.close()
    assert names(tmp_path) == ["2", "4"]
