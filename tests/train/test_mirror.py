"""The copy of a run: in a folder, and by gs:// in a bucket that lies in memory."""

import json
import shutil

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from open_agentrl_jax.train.checkpoint import Checkpoints, Progress
from open_agentrl_jax.train.mirror import LIST, Mirror
from open_agentrl_jax.types import UserError

from .test_checkpoint import abstract, equal, make


class Bucket(MemoryFileSystem):
    """A bucket: folders are made by their files. It breaks where it is told to."""

    protocol = ("gs", "gcs", "memory")
    store = {}  # noqa: RUF012 - as fsspec has it
    pseudo_dirs = [""]  # noqa: RUF012
    broken = ""

    def __init__(self, **_):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def _open(self, path, mode="rb", **kwargs):
        if self.broken and self.broken in path and "w" in mode:
            raise OSError("the bucket is out of reach")
        return super()._open(path, mode, **kwargs)


@pytest.fixture(params=["folder", "gs"])
def target(request, tmp_path, monkeypatch):
    if request.param == "folder":
        yield str(tmp_path / "copy")
        return
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    yield "gs://bucket/runs/one"
    fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


def run_at(directory):
    (directory / "init").mkdir(parents=True)
    (directory / "init/config.json").write_text("model")
    (directory / "weights").mkdir()
    (directory / "weights/v1").write_text("not to be copied")
    (directory / "config.json").write_text('{"seed": 1}')
    return directory


def checkpoint(directory, number, keep=2):
    """As a run does it: files grow, a checkpoint comes, the oldest goes."""
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(f"step {number}\n")
    folder = directory / "checkpoints" / str(number)
    (folder / "state/d").mkdir(parents=True)
    (folder / "state/d/0").write_bytes(bytes([number]) * 1000)
    (folder / "metadata").write_text(str(number))
    for old in sorted(int(path.name) for path in folder.parent.iterdir())[:-keep]:
        shutil.rmtree(folder.parent / str(old))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_machine_goes_on_from_the_copy(tmp_path, target):
    here = run_at(tmp_path / "here")
    mirror = Mirror(here, target)
    assert not mirror.fetch()
    for number in (1, 2, 3):
        checkpoint(here, number)
        mirror.saved(number, lambda: None)
        mirror.wait()
    (here / "export").mkdir()
    (here / "export/model.safetensors").write_text("weights")
    mirror.finish()
    mirror.close()
    copied = epath.Path(target)
    assert json.loads((copied / LIST).read_text()) == {"checkpoints": [2, 3], "once": ["init"]}
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["2", "3"]
    assert (copied / "export/model.safetensors").read_text() == "weights" and not (copied / "weights").exists()
    there = tmp_path / "there"
    again = Mirror(there, target)
    assert again.fetch() and not again.fetch()
    expected = files(here)
    assert files(there) == {n: c for n, c in expected.items() if not n.startswith(("weights", "export"))}
    checkpoint(there, 4)
    again.saved(4, lambda: None)
    again.close()
    assert json.loads((copied / LIST).read_text())["checkpoints"] == [3, 4]
    assert (copied / "metrics.jsonl").read_text().splitlines() == [f"step {n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("target", ["gs"], indirect=True)
def test_real_checkpoints_come_back_from_the_bucket(tmp_path, target):
    here = run_at(tmp_path / "here")
    checkpoints = Checkpoints(here / "checkpoints", keep=1, mirror=Mirror(here, target))
    for number in (1, 2, 3):
        checkpoints.save(number, make(number), Progress("rl", number))
    checkpoints.close()
    there = tmp_path / "there"
    shutil.rmtree(here)
    assert Mirror(there, target).fetch()
    checkpoints = Checkpoints(there / "checkpoints", keep=1)
    state, progress = checkpoints.restore(abstract())
    checkpoints.close()
    equal(state, make(3))
    assert progress == Progress("rl", 3)


@pytest.mark.parametrize("target", ["gs"], indirect=True)
def test_what_breaks_off_does_not_count_and_is_made_up_for(tmp_path, target, monkeypatch, caplog):
    here = run_at(tmp_path / "here")
    mirror = Mirror(here, target)
    checkpoint(here, 1)
    mirror.saved(1, lambda: None)
    mirror.wait()
    monkeypatch.setattr(Bucket, "broken", "checkpoints/2/state")
    checkpoint(here, 2)
    mirror.saved(2, lambda: None)
    mirror.wait()
    assert "not copied: the bucket is out of reach" in caplog.text
    there = tmp_path / "there"
    assert Mirror(there, target).fetch()
    assert [path.name for path in (there / "checkpoints").iterdir()] == ["1"]
    monkeypatch.setattr(Bucket, "broken", "export")
    (here / "export").mkdir()
    (here / "export/model.safetensors").write_text("weights")
    with pytest.raises(UserError, match="the export was not copied"):
        mirror.finish()
    monkeypatch.setattr(Bucket, "broken", "")
    checkpoint(here, 3)
    mirror.saved(3, lambda: None)
    mirror.close()
    assert json.loads((epath.Path(target) / LIST).read_text())["checkpoints"] == [3]
    assert [path.name for path in (epath.Path(target) / "checkpoints").iterdir()] == ["3"]


def test_a_copy_that_cannot_be_reached(tmp_path):
    (tmp_path / LIST).mkdir()
    with pytest.raises(UserError, match=r"checkpoint\.copy_to=.*s3fs"):
        Mirror(tmp_path / "run", str(tmp_path))
