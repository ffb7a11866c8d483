import concurrent.futures
import errno
import mmap
import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.models import hf, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.train import publish, spare
from open_agentrl_jax.train.publish import publish_weights, replayed_logprobs
from open_agentrl_jax.types import UserError
from tests.disks import bucket_mount  # noqa: F401 - a fixture

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
)
QWEN3 = ModelConfig(model_type="qwen3", tie_word_embeddings=True, **SIZES)
QWEN2 = ModelConfig(model_type="qwen2", **SIZES)


def make(config, seed=0):
    """Parameters that are all random, the norms too; from numpy, as compiling takes a while."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * random.standard_normal(x.shape, np.float32)), qwen.abstract_params(config)
    )


def rounded(params):
    return jax.tree.map(lambda x: np.asarray(x.astype("bfloat16").astype("float32")), params)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def tree_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("config", [QWEN3, QWEN2], ids=["qwen3", "qwen2"])
@pytest.mark.parametrize("file_bytes", [2**30, 20_000], ids=["one file", "many"])
def test_a_version_is_the_model_in_bfloat16(tmp_path, monkeypatch, config, file_bytes):
    torch = pytest.importorskip("torch")
    import transformers

    monkeypatch.setattr(publish, "_FILE_BYTES", file_bytes)
    params = make(config)
    folder = publish_weights(params, config, tmp_path, 7)
    assert folder == publish.version_path(tmp_path, 7)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (file_bytes < 2**30)
    assert_same(jax.tree.map(np.asarray, hf.load_pretrained(folder)[1]), rounded(params))

    ids = np.arange(20) * 7 % 96
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(ids)[None]).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[1:, None])[:, 0].numpy()
    np.testing.assert_allclose(replayed_logprobs(params, config, ids)[1:], expected, atol=1e-4)


@pytest.mark.parametrize("config", [QWEN3, QWEN2], ids=["qwen3", "qwen2"])
def test_devices_round_and_transpose_as_writers_do(tmp_path, monkeypatch, config):
    params = make(config)
    hard = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-40, 1.00390625, 1.01171875], np.float32)  # halves are even
    params["layers"]["q"] = params["layers"]["q"].at[1, 3, : len(hard)].set(hard)
    monkeypatch.setattr(publish, "_PIECE", 1000)
    here = publish_weights(params, config, tmp_path / "here", 0)
    monkeypatch.setattr(publish, "_in_memory", lambda params: False)
    there = publish_weights(params, config, tmp_path / "there", 0)
    assert (here / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()
    assert_same(jax.tree.map(np.asarray, hf.load_pretrained(here)[1]), rounded(params))


@pytest.mark.usefixtures("bucket_mount")
@pytest.mark.parametrize("killed", [False, True])
def test_a_version_is_visible_once_its_manifest_is_written(tmp_path, monkeypatch, killed):
    """On a file system that renames no directory."""

    def write(*arguments):
        assert not publish.is_published(publish.version_path(tmp_path, 2))
        if killed:
            raise KeyboardInterrupt
        real_write(*arguments)

    real_write = publish._write
    publish_weights(make(QWEN3), QWEN3, tmp_path, 1)
    monkeypatch.setattr(publish, "_write", write)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            publish_weights(make(QWEN3), QWEN3, tmp_path, 2)
    else:
        publish_weights(make(QWEN3), QWEN3, tmp_path, 2)
    complete = [publish.is_published(path) for path in sorted(tmp_path.glob("v*"))]
    assert complete == [True, not killed]
    monkeypatch.setattr(publish, "_write", real_write)
    publish_weights(make(QWEN3), QWEN3, tmp_path, 3)  # what was killed does not count among the two that stay
    names = [path.name for path in sorted(tmp_path.glob("v*"))]
    assert names == ["v00000001" if killed else "v00000002", "v00000003"]
    (tmp_path / "v00000003" / "model.safetensors").write_bytes(b"cut")
    assert not publish.is_published(tmp_path / "v00000003")


def test_two_versions_stay(tmp_path):
    params = make(QWEN3)
    for version in (1, 2, 3, 3):
        publish_weights(params, QWEN3, tmp_path, version)
    assert [path.name for path in sorted(tmp_path.glob("v*"))] == ["v00000002", "v00000003"]


@pytest.mark.parametrize("reader", [False, True])
def test_a_new_version_overwrites_an_evicted_one_that_nobody_reads(tmp_path, monkeypatch, reader):
    monkeypatch.setattr(spare, "_on_tmpfs", lambda folder: True)
    versions = [make(QWEN3, seed) for seed in range(4)]
    first = publish_weights(versions[0], QWEN3, tmp_path, 0) / "model.safetensors"
    inode, before = first.stat().st_ino, first.read_bytes()
    with open(first, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        file.close()
        if not reader:
            mapped.close()
        for number in (1, 2, 3):
            folder = publish_weights(versions[number], QWEN3, tmp_path, number)
            last = publish.version_path(tmp_path, number - 1)
            for path, params in ((last, versions[number - 1]), (folder, versions[number])):
                assert_same(jax.tree.map(np.asarray, hf.load_pretrained(path)[1]), rounded(params))
        assert not reader or mapped[:] == before  # the weights that it started to read
    assert ((folder / "model.safetensors").stat().st_ino == inode) == (not reader)


def test_a_full_disk_is_an_error_and_harms_nothing(tmp_path):
    publish_weights(make(QWEN3), QWEN3, tmp_path, 1)
    before = tree_of(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # writing fails in the middle of the weights
    try:
        with pytest.raises(UserError, match=r"rollout\.weights_dir: .* is full"):
            publish_weights(make(QWEN3, 1), QWEN3, tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree_of(tmp_path) == before
    assert_same(jax.tree.map(np.asarray, hf.load_pretrained(tmp_path / "v00000001")[1]), rounded(make(QWEN3)))


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"rollout\.weights_dir: cannot write"):
        publish_weights(make(QWEN3), QWEN3, tmp_path / "file", 1)


@pytest.mark.parametrize("full", [False, True])
def test_each_process_writes_its_share(tmp_path, monkeypatch, full):
    """Two threads as two processes, for a fault in one of them; two real ones are in tests/parallel."""
    me, meeting, conditions, wrote = threading.local(), threading.Barrier(2, timeout=60), [False, False], [set(), set()]

    def any_process(condition):
        conditions[me.number] = condition
        meeting.wait()
        result = any(conditions)
        meeting.wait()
        return result

    def write(path, *rest):
        wrote[me.number].add(path.name)
        if full and me.number == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_write(path, *rest)

    def process(number):
        me.number = number
        return publish_weights(params, QWEN3, tmp_path, 1)

    params, real_write = make(QWEN3), publish._write
    monkeypatch.setattr(publish, "_FILE_BYTES", 20_000)
    monkeypatch.setattr(publish, "_process", lambda: (me.number, 2))
    monkeypatch.setattr(publish.processes, "any_of", any_process)
    monkeypatch.setattr(publish, "_write", write)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = [pool.submit(process, number) for number in range(2)]
    if full:  # on one host: neither waits for the other forever
        for result in results:
            assert "rollout.weights_dir" in str(result.exception())
        assert not list(tmp_path.iterdir())
        return
    assert min(map(len, wrote)) >= 2
    assert not wrote[0] & wrote[1]
    assert_same(jax.tree.map(np.asarray, hf.load_pretrained(results[0].result())[1]), rounded(params))


def test_replay_rounds_as_the_files_do():
    params = make(QWEN3)
    exact = replayed_logprobs(params, QWEN3, range(10))
    again = replayed_logprobs(jax.tree.map(jnp.asarray, rounded(params)), QWEN3, range(10))
    np.testing.assert_array_equal(exact, again)
