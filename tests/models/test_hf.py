import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from open_agentrl_jax.models import export, folders, hf, qwen
from open_agentrl_jax.models import params as params_table
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel.mesh import make_mesh
from open_agentrl_jax.types import UserError

from .tiny import torch_model

QWEN2 = ModelConfig("qwen2", 40, 16, 24, 2, 4, 2, 4, eos_ids=(3, 4), bos_id=1)
TIED = ModelConfig("qwen3", 40, 16, 24, 2, 4, 2, 8, tie_word_embeddings=True)


def _random(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), qwen.abstract_params(config))


def _same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


@pytest.fixture
def folder(tmp_path):
    """A one-file export of TIED whose tensors a test may change."""
    hf.save_pretrained(tmp_path / "model", TIED, _random(TIED))
    return tmp_path / "model"


def _rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("config", [QWEN2, TIED])
@pytest.mark.parametrize("limit", [5 * 2**30, 3000])
def test_export_then_load_is_the_identity(tmp_path, config, limit):
    params = _random(config)
    hf.save_pretrained(tmp_path / "out", config, params, max_shard_bytes=limit)
    loaded_config, loaded = hf.load_pretrained(tmp_path / "out")
    assert loaded_config == config
    assert _same(loaded, params)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 3) == (limit == 3000)
    for file in files:
        assert len(load_file(file)) == 1 or sum(x.nbytes for x in load_file(file).values()) <= limit
    assert not [name for name in os.listdir(tmp_path) if name != "out"]  # nothing temporary is left


def test_bfloat16_export(tmp_path):
    params = _random(TIED)
    hf.save_pretrained(tmp_path / "out", TIED, params, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert _same(hf.load_pretrained(tmp_path / "out", None, "bfloat16")[1], rounded)
    assert _same(hf.load_pretrained(tmp_path / "out")[1], jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_export_and_computes_the_same(tmp_path, model_type, tied):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = torch_model(model_type, tie_word_embeddings=tied, rope_theta=3e5)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    config, params = hf.load_pretrained(tmp_path / "theirs")
    hf.save_pretrained(tmp_path / "ours", config, params, max_shard_bytes=30_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.arange(40)[None] % 97
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.config.rope_parameters["rope_theta"] == 3e5


def test_generation_config_and_tokenizer_are_copied(tmp_path, folder):
    source = tmp_path / "source"
    source.mkdir()
    files = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}"}
    files["additional_chat_templates/tool_use.jinja"] = "{{ tools }}"
    (source / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    (source / "weights.bin").write_text("not copied")
    config, params = hf.load_pretrained(folder)
    hf.save_pretrained(tmp_path / "out", QWEN2, _random(QWEN2), tokenizer_from=source)
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files
    assert not (tmp_path / "out" / "weights.bin").exists()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [3, 4],
    }
    (source / "generation_config.json").write_text('{"top_k": 20}')
    hf.save_pretrained(tmp_path / "out", config, params, tokenizer_from=source)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"top_k": 20}


def test_one_device_mesh(folder):
    mesh = make_mesh(devices=jax.devices()[:1])
    _, params = hf.load_pretrained(folder, mesh)
    assert _same(jax.device_get(params), jax.device_get(hf.load_pretrained(folder)[1]))
    assert params["layers"]["q"].sharding.spec == params_table.spec("layers/q")


def test_a_failed_export_leaves_the_old_one(tmp_path, folder, monkeypatch):
    before = load_file(folder / "model.safetensors")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "write_tensors", full)
    with pytest.raises(OSError):
        hf.save_pretrained(folder, TIED, _random(TIED, 1))
    after = load_file(folder / "model.safetensors")
    assert all((before[name] == after[name]).all() for name in before)
    assert os.listdir(tmp_path) == ["model"]


def test_an_export_replaces_an_earlier_export(tmp_path, folder):
    hf.save_pretrained(folder, TIED, _random(TIED, 1), max_shard_bytes=3000)
    hf.save_pretrained(folder, TIED, _random(TIED, 2))
    assert _same(hf.load_pretrained(folder)[1], _random(TIED, 2))
    assert not list(folder.glob("model-*")) and not (folder / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    "files",
    [
        ["config.json", "checkpoints/7/manifest.ocdbt", "metrics.jsonl", "export/config.json"],
        ["config.json", "main.py"],
        ["config.json", "model.safetensors", "tokenizer.json"],  # a model that we did not write
        ["cat.jpg"],
    ],
)
def test_other_folders_are_refused_and_untouched(tmp_path, files):
    for name in files:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(name)
    with pytest.raises(UserError, match="x: exists and is no exported model; choose another path or remove it"):
        hf.save_pretrained(tmp_path / "x", TIED, _random(TIED))
    assert {name: (tmp_path / "x" / name).read_text() for name in files} == {name: name for name in files}
    assert sorted(export_files(tmp_path / "x")) == sorted(files)


def export_files(folder):
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_notes_in_an_export_are_kept(folder):
    (folder / "notes").mkdir()
    (folder / "notes" / "today.md").write_text("mine")
    with pytest.raises(UserError, match=r"notes/today\.md: not written by an export; move it"):
        hf.save_pretrained(folder, TIED, _random(TIED, 1))
    assert (folder / "notes" / "today.md").read_text() == "mine"
    assert _same(hf.load_pretrained(folder)[1], _random(TIED))


def test_export_renames_no_directory(tmp_path, folder, monkeypatch):
    for name in ("rename", "replace"):
        real = getattr(os, name)

        def bucket(source, target, real=real):
            if os.path.isdir(source):
                raise OSError(95, "Operation not supported")
            real(source, target)

        monkeypatch.setattr(os, name, bucket)
    hf.save_pretrained(folder, TIED, _random(TIED, 1))
    hf.save_pretrained(tmp_path / "new", TIED, _random(TIED, 1))
    for path in (folder, tmp_path / "new"):
        assert _same(hf.load_pretrained(path)[1], _random(TIED, 1))


def test_an_interrupted_export_is_refused_and_can_be_repeated(folder, monkeypatch):
    real, moved = os.replace, []

    def killed(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        real(source, target)

    monkeypatch.setattr(folders.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        hf.save_pretrained(folder, TIED, _random(TIED, 1))
    with pytest.raises(UserError, match="an export was interrupted there; export again"):
        hf.load_pretrained(folder)
    monkeypatch.undo()
    hf.save_pretrained(folder, TIED, _random(TIED, 1))
    assert _same(hf.load_pretrained(folder)[1], _random(TIED, 1))


def test_the_turn_end_joins_the_stop_tokens(tmp_path, folder):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"top_k": 20, "eos_token_id": 3}')
    hf.save_pretrained(tmp_path / "out", QWEN2, _random(QWEN2), tokenizer_from=source, stop_ids=(3, 7))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [3, 4, 7]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"top_k": 20, "eos_token_id": [3, 7]}


def test_weights_are_read_from_the_files_that_transformers_reads(tmp_path, folder):
    hf.save_pretrained(tmp_path / "many", TIED, _random(TIED, 1), max_shard_bytes=3000)
    for path in (tmp_path / "many").glob("model*"):
        (folder / path.name).write_bytes(path.read_bytes())  # a stale index and its shards
    for name in ("adapter_model", "consolidated", "model.fp16"):
        save_file({"model.norm.weight": np.ones(16, np.float32)}, folder / f"{name}.safetensors")
    assert _same(hf.load_pretrained(folder)[1], _random(TIED))
    (folder / "model.safetensors").unlink()
    assert _same(hf.load_pretrained(folder)[1], _random(TIED, 1))
    (folder / "model.safetensors.index.json").unlink()
    assert _same(hf.load_pretrained(folder)[1], _random(TIED, 1))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], r"holds \.bin weights only; load and save it with transformers"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter, not a model"),
        (["a.safetensors", "b.safetensors"], r"index\.json: missing, and the weights cannot be told"),
    ],
)
def test_folders_without_readable_weights(folder, files, message):
    (folder / "model.safetensors").unlink()
    for name in files:
        save_file({"x": np.ones(1, np.float32)}, folder / name)
    with pytest.raises(UserError, match=message):
        hf.load_pretrained(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "less"])
def test_names_with_other_prefixes(folder, prefix):
    def change(tensors):
        for name in list(tensors):
            new = name.removeprefix("model.") if prefix == "less" else prefix + name
            tensors[new] = tensors.pop(name)

    _rewrite(folder, change)
    assert _same(hf.load_pretrained(folder)[1], _random(TIED))


def test_a_tied_model_with_the_head_alone(folder):
    _rewrite(folder, lambda t: _head(t, t.pop("model.embed_tokens.weight")))
    assert _same(hf.load_pretrained(folder)[1], _random(TIED))


def test_padding_rows_that_are_nan_are_equal(folder):
    def change(tensors):
        tensors["model.embed_tokens.weight"][-3:] = np.nan
        _head(tensors, tensors["model.embed_tokens.weight"].copy())

    _rewrite(folder, change)
    assert np.isnan(hf.load_pretrained(folder)[1]["embed"]).sum() == 3 * 16


def _head(tensors, value):
    tensors["lm_head.weight"] = value


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.update(x=t["model.norm.weight"]), "model.safetensors: x: unknown to a qwen3 model"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight: missing"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(15, np.float32)}),
            "model.norm.weight: shape (15,), but config.json implies (16,)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}),
            "model.norm.weight: dtype I8 is not supported",
        ),
        (
            lambda t: _head(t, t["model.embed_tokens.weight"] + 1),
            "lm_head.weight: differs from model.embed_tokens.weight",
        ),
        (lambda t: _head(t, t["model.embed_tokens.weight"][1:].copy()), "lm_head.weight: differs"),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, named):
    _rewrite(folder, change)
    with pytest.raises(UserError) as raised:
        hf.load_pretrained(folder)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_equal_tied_head_and_old_buffers_are_accepted(folder):
    def change(tensors):
        _head(tensors, tensors["model.embed_tokens.weight"].copy())
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    _rewrite(folder, change)
    assert _same(hf.load_pretrained(folder)[1], _random(TIED))


def test_an_untied_config_without_a_head_names_the_cure(folder):
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lm_head\.weight: missing; set tie_word_embeddings to true"):
        hf.load_pretrained(folder)


def test_damaged_files_are_named(tmp_path, folder):
    hf.save_pretrained(tmp_path / "many", TIED, _random(TIED), max_shard_bytes=3000)
    last = sorted((tmp_path / "many").glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{last.name}: damaged"):
        hf.load_pretrained(tmp_path / "many")
    last.unlink()
    with pytest.raises(UserError, match=rf"{last.name}: missing, model\.safetensors\.index\.json lists it"):
        hf.load_pretrained(tmp_path / "many")
    save_file({}, last)
    with pytest.raises(UserError, match=f"{last.name}: model.layers.1.* missing, the index lists it"):
        hf.load_pretrained(tmp_path / "many")
    (tmp_path / "many" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weight_map: cannot be read"):
        hf.load_pretrained(tmp_path / "many")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"\*\.safetensors: none there"):
        hf.load_pretrained(folder)


def test_paths_that_are_no_model(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **_):
        asked.append(name)
        raise OSError("offline\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for path in (tmp_path / "nothing", "./runs/none", "a/b/c", "nothing"):
        with pytest.raises(UserError, match="missing; give the folder of a model"):
            hf.load_pretrained(path)
    assert asked == []
    with pytest.raises(
        UserError, match=r"Qwen/Qwen3-4B: no such folder, and the download from the Hub failed \(OSError: offline\)"
    ):
        hf.load_pretrained("Qwen/Qwen3-4B")
    assert asked == ["Qwen/Qwen3-4B"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        hf.load_pretrained(tmp_path / "file")


def test_arguments_that_cannot_work(tmp_path):
    with pytest.raises(UserError, match="dtype: 'float8' is unknown"):
        hf.save_pretrained(tmp_path / "out", TIED, _random(TIED), dtype="float8")
    with pytest.raises(UserError, match=r"tokenizer\.json: missing"):
        hf.save_pretrained(tmp_path / "out", TIED, _random(TIED), tokenizer_from=tmp_path)
    assert not (tmp_path / "out").exists()
