import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from orbax.checkpoint import v1 as ocp

from launch import convert
from open_agentrl_jax.models import convert as conversion
from open_agentrl_jax.models import hf, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.types import UserError

from ..telemetry.runs import write_run
from .runs import ROOT, environment

CONFIG = ModelConfig("qwen2", 40, 16, 24, 2, 4, 2, 4, eos_ids=(3,))


def _params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), qwen.abstract_params(CONFIG))


def _same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def _convert(**values):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    values = {
        name.rstrip("_").replace("push_to_hub", "push-to-hub"): str(value) if not isinstance(value, bool) else value
        for name, value in values.items()
    }
    with flagsaver.flagsaver(**values):
        return convert.main()


@pytest.fixture
def model(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tokenizer / name).write_text(name)
    hf.save_pretrained(tmp_path / "model", CONFIG, _params(), tokenizer_from=tokenizer)
    return tmp_path / "model"


class FakeHub:
    """What `huggingface_hub.HfApi` is asked for."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo, **kwargs):
        self.calls.append(("create_repo", repo, kwargs))
        if repo.startswith("theirs/"):
            raise PermissionError("403 Forbidden")
        return f"https://hub/{repo}"

    def upload_folder(self, **kwargs):
        self.calls.append(("upload_folder", sorted(p.name for p in kwargs["folder_path"].iterdir()), kwargs))

    def upload_file(self, **kwargs):
        self.calls.append(("upload_file", kwargs["path_or_fileobj"].decode(), kwargs))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


def test_a_run_goes_to_the_hub_with_its_figures(tmp_path, model, hub, capsys):
    run = write_run(tmp_path / "run", steps=2)
    settings = {
        "seed": 7,
        "run_dir": "/secret",
        "model": {"path": "Qwen/Qwen3-4B"},
        "data": {"eval": "/secret/a.jsonl"},
        "sandbox": {"urls": ["https://me:secret@host"]},
        "agent": {"tools": ["mcp:npx server --api-key secret"]},
    }
    (run / "config.json").write_text(json.dumps({"config": settings}))
    model.rename(run / "export")
    assert _convert(from_="hf", input=run / "export", push_to_hub="me/agent") == 0
    assert "https://hub/me/agent" in capsys.readouterr().out
    (made, files, card) = hub.calls
    assert made == ("create_repo", "me/agent", {"private": True, "exist_ok": True})
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(files[1])
    text = card[1]
    assert card[2]["path_in_repo"] == "README.md" and text.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: Qwen/Qwen3-4B" in text and '"seed": 7' in text and "secret" not in text
    assert "| accuracy/mean | 0.200 | 0.900 |" in text and "step 2" in text


def test_a_conversion_goes_to_the_hub(tmp_path, model, hub):
    conversion.write_orbax(tmp_path / "orbax", CONFIG, _params(), None, "float32")
    assert _convert(from_="orbax", to="hf", input=tmp_path / "orbax", output=tmp_path / "out", push_to_hub="me/x") == 0
    assert "model.safetensors" in hub.calls[1][1] and "##" not in hub.calls[2][1]  # no run, no figures
    with pytest.raises(UserError, match="PermissionError: 403 Forbidden; log in"):
        _convert(from_="hf", input=model, push_to_hub="theirs/x")
    with pytest.raises(UserError, match="give owner/name"):
        _convert(from_="hf", input=model, push_to_hub="nameless")
    with pytest.raises(UserError, match="give --to=hf"):
        _convert(from_="hf", to="orbax", input=model, output=tmp_path / "o", push_to_hub="me/x")


def _edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_there_and_back_is_the_identity(tmp_path, model, capsys):
    assert _convert(from_="hf", to="orbax", input=model, output=tmp_path / "orbax", verify=True) == 0
    assert "largest difference from the input's 0, 0 of which" in capsys.readouterr().out
    assert _convert(from_="orbax", to="hf", input=tmp_path / "orbax", output=tmp_path / "again", verify=True) == 0
    config, params = hf.load_pretrained(tmp_path / "again")
    assert config == CONFIG
    assert _same(params, _params())
    for folder in ("orbax", "again"):
        assert (tmp_path / folder / "chat_template.jinja").read_text() == "chat_template.jinja"


@pytest.mark.parametrize(("kind", "to"), [("hf", "orbax"), ("orbax", "hf")])
def test_bfloat16_rounding_is_distinguished_from_damage(tmp_path, model, capsys, monkeypatch, kind, to):
    source = model
    if kind == "orbax":
        source = tmp_path / "orbax"
        conversion.write_orbax(source, CONFIG, _params(), None, "float32")
    assert _convert(from_=kind, to=to, input=source, output=tmp_path / "out", dtype="bfloat16", verify=True) == 0
    printed = capsys.readouterr().out
    assert ", 0 of which is not bfloat16 rounding" in printed
    assert "input's 0," not in printed
    # A writer that damages one number is found.
    write = conversion.WRITE[to]

    def damaged(target, config, params, tokenizer, dtype):
        write(target, config, params | {"norm": params["norm"].at[0].add(1)}, tokenizer, dtype)

    monkeypatch.setitem(conversion.WRITE, to, damaged)
    assert _convert(from_=kind, to=to, input=source, output=tmp_path / "bad", dtype="bfloat16", verify=True) == 1


def test_one_step_of_a_run(tmp_path, model, capsys):
    run = tmp_path / "run"
    run.mkdir()
    model.rename(run / "init")
    (run / "config.json").write_text(json.dumps({"config": {"model": {"path": "", "tokenizer": ""}}}))
    moments = {"mu": jax.tree.map(jnp.zeros_like, _params())}
    progress = {"progress": {"phase": "rl", "step": 5}}
    tree = {"params": _params(1), "opt_state": (moments,), "updates": jnp.zeros(())}
    ocp.save(str(run / "checkpoints" / "7"), tree, custom_metadata=progress)
    assert _convert(from_="orbax", input=run / "checkpoints" / "7", inspect=True) == 0
    assert "after rl step 5\n" in capsys.readouterr().out
    assert _convert(from_="orbax", to="hf", input=run / "checkpoints" / "7", output=tmp_path / "out") == 0
    assert _same(hf.load_pretrained(tmp_path / "out")[1], _params(1))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(UserError, match=r"holds several checkpoints; give one of them, e\.g\. .*checkpoints/7"):
        _convert(from_="orbax", to="hf", input=run / "checkpoints", output=tmp_path / "out")


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_inspect_lists_every_parameter(tmp_path, model, capsys, kind):
    conversion.write_orbax(tmp_path / "orbax", CONFIG, _params(), None, "float32")
    assert _convert(from_=kind, input=model if kind == "hf" else tmp_path / "orbax", inspect=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(jax.tree.leaves(_params())) + 2
    assert "hidden_size 16" in lines[0] and "num_hidden_layers 2" in lines[0]
    assert "model.layers.{}.self_attn.q_proj.bias" in "".join(lines)
    assert f"{sum(x.size for x in jax.tree.leaves(_params())):,} parameters" in lines[-1]


def test_an_orbax_folder_that_is_none_of_ours(tmp_path, model):
    def refused(message, folder):
        with pytest.raises(UserError, match=message) as raised:
            _convert(from_="orbax", to="hf", input=folder, output=tmp_path / "out")
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()

    refused("missing", tmp_path / "nothing")
    refused("no Orbax checkpoint", model)
    ocp.save(str(tmp_path / "other"), {"weights": jnp.zeros(3)})
    refused("no tree 'params' in it", tmp_path / "other")
    ocp.save(str(tmp_path / "nameless"), {"params": _params()})
    refused("copy the model's config.json into it", tmp_path / "nameless")
    conversion.write_orbax(tmp_path / "misfit", CONFIG, _params(), None, "float32")
    _edit_json(tmp_path / "misfit" / "config.json", intermediate_size=32)
    refused("params/layers/down: shape", tmp_path / "misfit")
    _edit_json(tmp_path / "misfit" / "config.json", intermediate_size=24, tie_word_embeddings=True)
    refused("params/head: unknown to", tmp_path / "misfit")


def test_a_run_directory_is_not_replaced(tmp_path, model):
    """`--output=runs/x` where `/export` was forgotten."""
    convert_from = tmp_path / "orbax"
    conversion.write_orbax(convert_from, CONFIG, _params(), None, "float32")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "checkpoints/state"):
        (run / name).write_text(name)
    with pytest.raises(UserError, match="run: exists and is no exported model"):
        _convert(from_="orbax", to="hf", input=convert_from, output=run)
    assert (run / "checkpoints" / "state").read_text() == "checkpoints/state"


def test_flags_that_cannot_work(tmp_path, model):
    for values, message in (
        ({"to": "orbax"}, "--from is missing"),
        ({"from_": "hf", "to": "orbax"}, "--output is missing"),
        ({"from_": "hf", "to": "hf", "output": tmp_path / "out"}, "--to=hf: the input is that already"),
        ({"from_": "hf", "to": "orbax", "output": model}, "exists; choose another path"),
    ):
        with pytest.raises(UserError, match=message):
            _convert(input=model, **values)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    arguments = ["--from=hf", "--to=orbax", f"--input={tmp_path / 'none'}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.convert", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: {tmp_path / 'none'}: missing; give the folder of a model"]
