"""The copy of a run, in a folder and in a gs:// bucket that is kept in memory."""

import json
import shutil

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from open_agentrl_jax.train.checkpoint import Checkpoints, Progress
from open_agentrl_jax.train.mirror import LIST, Mirror
from open_agentrl_jax.types import UserError
from tests.disks import bucket_mount  # noqa: F401 - a fixture

from .test_checkpoint import abstract, equal, make

FINGERPRINT = '{"seed": 1}'


class Bucket(MemoryFileSystem):
    """An object store: a folder exists if it has files. Writing to a path that contains `broken` fails."""

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
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, Bucket, clobber=True)
    yield "gs://bucket/runs/one"
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, "gcsfs.GCSFileSystem", clobber=True)


def read(target, name):
    store, root = fsspec.url_to_fs(target)
    return store.cat_file(f"{root}/{name}")


def listed(target):
    return json.loads(read(target, LIST))["checkpoints"]


def folders(target):
    store, root = fsspec.url_to_fs(target)
    return sorted(path.rpartition("/")[2] for path in store.ls(f"{root}/checkpoints", detail=False))


def run_at(directory):
    (directory / "init").mkdir(parents=True)
    (directory / "init/config.json").write_text("model")
    (directory / "weights").mkdir()
    (directory / "weights/v1").write_text("not to be copied")
    (directory / "config.json").write_text(json.dumps({"id": "1", "fingerprint": FINGERPRINT}))
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
    mirror = Mirror(here, target, FINGERPRINT)
    assert not mirror.fetch()
    for number in (1, 2, 3):
        checkpoint(here, number)
        mirror.saved(number, lambda: None)
        mirror.wait()
    (here / "export").mkdir()
    (here / "export/model.safetensors").write_text("weights")
    mirror.finish()
    mirror.close()
    expected = {"checkpoints": [2, 3], "once": ["init"], "fingerprint": FINGERPRINT}
    assert json.loads(read(target, LIST)) == expected
    assert folders(target) == ["2", "3"]
    assert read(target, "export/model.safetensors") == b"weights"
    with pytest.raises(FileNotFoundError):
        read(target, "weights/v1")
    there = tmp_path / "there"
    again = Mirror(there, target, FINGERPRINT)
    assert again.fetch() and not again.fetch()
    expected = files(here)
    assert files(there) == {n: c for n, c in expected.items() if not n.startswith(("weights", "export"))}
    checkpoint(there, 4)
    again.saved(4, lambda: None)
    again.close()
    assert listed(target) == [3, 4]
    assert read(target, "metrics.jsonl").decode().splitlines() == [f"step {n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("target", ["gs"], indirect=True)
def test_real_checkpoints_come_back_from_the_bucket(tmp_path, target):
    here = run_at(tmp_path / "here")
    checkpoints = Checkpoints(here / "checkpoints", keep=1, mirror=Mirror(here, target, FINGERPRINT))
    for number in (1, 2, 3):
        checkpoints.save(make(number), Progress("rl", number))
    checkpoints.close()
    there = tmp_path / "there"
    shutil.rmtree(here)
    assert Mirror(there, target, FINGERPRINT).fetch()
    checkpoints = Checkpoints(there / "checkpoints", keep=1)
    state, progress = checkpoints.restore(abstract())
    checkpoints.close()
    equal(state, make(3))
    assert progress == Progress("rl", 3)


@pytest.mark.parametrize("target", ["gs"], indirect=True)
def test_a_partial_upload_is_ignored_and_made_good(tmp_path, target, monkeypatch, caplog):
    here = run_at(tmp_path / "here")
    mirror = Mirror(here, target, FINGERPRINT)
    checkpoint(here, 1)
    mirror.saved(1, lambda: None)
    mirror.wait()
    monkeypatch.setattr(Bucket, "broken", "checkpoints/2/state")
    checkpoint(here, 2)
    mirror.saved(2, lambda: None)
    mirror.wait()
    assert "not copied: the bucket is out of reach" in caplog.text
    there = tmp_path / "there"
    assert Mirror(there, target, FINGERPRINT).fetch()
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
    assert listed(target) == [3] and folders(target) == ["3"]


@pytest.mark.usefixtures("bucket_mount")
@pytest.mark.parametrize("target", ["folder"], indirect=True)
def test_a_copy_on_a_mounted_bucket(tmp_path, target):
    mirror = Mirror(run_at(tmp_path / "here"), target, FINGERPRINT)
    checkpoint(tmp_path / "here", 1)
    mirror.saved(1, lambda: None)
    mirror.close()
    assert listed(target) == [1]


def test_a_copy_that_cannot_be_reached(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.copy_to=.*s3fs"):
        Mirror(tmp_path / "run", "nowhere://bucket/run", FINGERPRINT)


def another_run(folder, tmp_path):
    run_at(folder)
    checkpoint(folder, 7)


def notes(folder, tmp_path):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def copy_of(**facts):
    def make_copy(folder, tmp_path):
        run = run_at(tmp_path / "other")
        facts_there = {"id": "1", "fingerprint": FINGERPRINT} | facts
        (run / "config.json").write_text(json.dumps(facts_there))
        checkpoint(run, 7)
        mirror = Mirror(run, str(folder), facts_there["fingerprint"])
        mirror.saved(7, lambda: None)
        mirror.close()

    return make_copy


@pytest.mark.parametrize(
    "there, message",
    [
        (another_run, "no copy of this run"),
        (notes, "no copy of this run"),
        (copy_of(fingerprint='{"seed": 2}'), "of another config"),
        (copy_of(id="2"), "of another run of this config"),
    ],
)
def test_what_is_no_copy_of_this_run_is_left_alone(tmp_path, there, message):
    there(tmp_path / "there", tmp_path)
    before = files(tmp_path / "there")
    with pytest.raises(UserError, match=message):
        Mirror(run_at(tmp_path / "here"), str(tmp_path / "there"), FINGERPRINT)
    assert files(tmp_path / "there") == before


@pytest.mark.parametrize("place", [".", "export", "..", "../link", "../link/copy"])
def test_a_copy_in_or_around_the_run_directory_is_refused(tmp_path, place):
    here = run_at(tmp_path / "runs" / "here")
    (tmp_path / "runs" / "link").symlink_to(here)
    with pytest.raises(UserError, match="in or around run_dir"):
        Mirror(here, str(here / place), FINGERPRINT)


@pytest.mark.parametrize("damage", [LIST, "config.json"])
def test_a_damaged_list_or_config_leaves_the_copy_usable(tmp_path, damage):
    copy_of()(tmp_path / "there", tmp_path)
    (tmp_path / "there" / damage).write_text("")
    here = tmp_path / "here"
    mirror = Mirror(here, str(tmp_path / "there"), FINGERPRINT)
    assert mirror.fetch()
    assert [path.name for path in (here / "checkpoints").iterdir()] == ["7"] and (here / "init/config.json").exists()
    checkpoint(here, 8)
    mirror.saved(8, lambda: None)
    mirror.close()
    assert listed(str(tmp_path / "there")) == [7, 8]


@pytest.mark.parametrize("target", ["gs"], indirect=True)
def test_a_copy_that_broke_off_before_its_first_checkpoint_is_continued(tmp_path, target, monkeypatch):
    here = run_at(tmp_path / "here")
    monkeypatch.setattr(Bucket, "broken", "checkpoints/1")
    mirror = Mirror(here, target, FINGERPRINT)
    checkpoint(here, 1)
    mirror.saved(1, lambda: None)
    mirror.close()
    monkeypatch.setattr(Bucket, "broken", "")
    mirror = Mirror(here, target, FINGERPRINT)
    checkpoint(here, 2)
    mirror.saved(2, lambda: None)
    mirror.close()
    assert listed(target) == [2]
