"""The notebooks of launch/, executed on CPU with a tiny model in place of the real one."""

import json
import os
import subprocess
import sys

import pytest

from open_agentrl_jax.config import Config, NewModel
from open_agentrl_jax.run.policy import create_model

from .runs import ROOT, TINY, lines
from .test_gsm8k import SAMPLE

nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel: pip install -e '.[test]'")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
book = nbformat.read(sys.argv[1], 4)
NotebookClient(book, timeout=560, kernel_name="python3", resources={"metadata": {"path": sys.argv[3]}}).execute()
nbformat.write(book, sys.argv[2])
"""


def execute(name, tmp_path, overrides, **variables):
    """All that the cells printed, cell by cell."""
    flags = " ".join(f"--config.{field}={value}" for field, value in overrides.items())
    names = {"RUN": str(tmp_path / "run"), "FLAGS": flags, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    done = tmp_path / "done.ipynb"
    command = [sys.executable, "-c", EXECUTE, str(ROOT / "launch" / "notebooks" / name), str(done), str(ROOT)]
    environment = {**os.environ, **names, **variables, "IPYTHONDIR": str(tmp_path / "ipython")}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert finished.returncode == 0, finished.stderr[-3000:]
    cells = [cell for cell in nbformat.read(done, 4).cells if cell.cell_type == "code"]
    return ["".join(o.get("text", "") + o.get("data", {}).get("text/html", "") for o in c.outputs) for c in cells]


@pytest.mark.parametrize("name", ["colab_quickstart.ipynb", "colab_qwen3.ipynb"])
def test_notebooks_are_committed_without_outputs(name):
    book = json.loads((ROOT / "launch" / "notebooks" / name).read_text())
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in book["cells"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quickstart_notebook(tmp_path):
    said = execute("colab_quickstart.ipynb", tmp_path, {**TINY, "agent.max_response": 48})
    assert any("before RL" in text for text in said)
    assert any("held-out accuracy after RL step 3" in text for text in said)
    (page,) = (text for text in said if "<iframe" in text)
    assert "Content-Security-Policy" in page
    (talk,) = (text for text in said if "tool calls)" in text)
    assert talk.count("tool calls)") == 2
    assert "export.zip" in said[-1] and "model.safetensors" in said[-1] and (tmp_path / "run" / "export.zip").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_qwen3_notebook(tmp_path):
    model = Config()
    model.model.new = NewModel(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16)
    create_model(model, tmp_path / "model")
    rows = SAMPLE.read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:8]))
    (tmp_path / "eval.jsonl").write_text("\n".join(rows[8:]))
    tiny = {
        "model.path": tmp_path / "model",
        "data.eval": tmp_path / "eval.jsonl",
        "rl.steps": 2,
        "rl.prompts": 2,
        "rl.samples": 2,
        "rollout.slots": 4,
        "agent.max_response": 48,
        "reward.overlong_buffer": 16,
        "eval.every": 0,
        "model.remat": "none",
    }
    said = execute("colab_qwen3.ipynb", tmp_path, tiny, PROBLEMS=str(tmp_path / "train.jsonl"))
    assert any("held-out accuracy after RL step 2" in text for text in said)
    assert any("<iframe" in text for text in said) and "model.safetensors" in said[-1]
    assert [line["step"] for line in lines(tmp_path / "run") if line["phase"] == "rl"] == [1, 2]
