import concurrent.futures
import errno
import json
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
def test_what_is_published_is_the_model_in_bfloat16(tmp_path, monkeypatch, config, file_bytes):
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
def test_devices_round_and_turn_as_writers_do(tmp_path, monkeypatch, config):
    params = make(config)
    hard = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-40, 1.00390625, 1.01171875], np.float32)  # halves are even
    params["layers"]["q"] = params["layers"]["q"].at[1, 3, : len(hard)].set(hard)
    monkeypatch.setattr(publish, "_PIECE", 1000)
    here = publish_weights(params, config, tmp_path / "here", 0)
    monkeypatch.setattr(publish, "_in_memory", lambda params: False)
    there = publish_weights(params, config, tmp_path / "there", 0)
    assert (here / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()
    assert_same(jax.tree.map(np.asarray, hf.load_pretrained(here)[1]), rounded(params))


def test_two_versions_stay(tmp_path):
    params = make(QWEN3)
    for version in (1, 2, 3, 3):
        publish_weights(params, QWEN3, tmp_path, version)
    assert [path.name for path in sorted(tmp_path.glob("v*"))] == ["v00000002", "v00000003"]


@pytest.mark.parametrize("reader", [False, True])
def test_a_new_version_is_written_over_a_dropped_one_that_nobody_reads(tmp_path, monkeypatch, reader):
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
        assert not reader or mapped[:] == before  # still the weights that it had begun to read
    assert ((folder / "model.safetensors").stat().st_ino == inode) == (not reader)


def test_a_linked_file_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(spare, "_on_tmpfs", lambda folder: True)
    folder = publish_weights(make(QWEN3), QWEN3, tmp_path, 0, frozen=("embed",))
    for number in (1, 2):
        folder = publish_weights(make(QWEN3), QWEN3, tmp_path, number, frozen=("embed",), unchanged_from=folder)
    publish_weights(make(QWEN3, 1), QWEN3, tmp_path, 3, frozen=("embed",))
    assert_same(jax.tree.map(np.asarray, hf.load_pretrained(folder)[1]), rounded(make(QWEN3)))


def test_a_full_disk_is_said_and_harms_nothing(tmp_path):
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


def test_frozen_parameters_are_linked(tmp_path):
    frozen = ("embed", "layers/q")
    params = make(QWEN3)
    first = publish_weights(params, QWEN3, tmp_path, 1, frozen=frozen)
    changed = {**params, "norm": params["norm"] + 1}
    second = publish_weights(changed, QWEN3, tmp_path, 2, frozen=frozen, unchanged_from=first)
    third = publish_weights(changed, QWEN3, tmp_path, 3, frozen=frozen, unchanged_from=second)
    inodes = [{path.name: path.stat().st_ino for path in folder.glob("*.safetensors")} for folder in (second, third)]
    shared = [name for name in inodes[0] if inodes[0][name] == inodes[1][name]]
    names = json.loads((third / "model.safetensors.index.json").read_text())["weight_map"]
    linked = {name for name, file in names.items() if file in shared}
    assert linked == {"model.embed_tokens.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))}
    assert_same(jax.tree.map(np.asarray, hf.load_pretrained(third)[1]), rounded(changed))


def test_an_unknown_frozen_parameter(tmp_path):
    with pytest.raises(UserError, match="layers/nothing"):
        publish_weights(make(QWEN3), QWEN3, tmp_path, 1, frozen=("layers/nothing",))


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
    monkeypatch.setattr(publish, "_any_process", any_process)
    monkeypatch.setattr(publish, "_write", write)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = [pool.submit(process, number) for number in range(2)]
    if full:  # on one host: neither waits for the other for ever
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
