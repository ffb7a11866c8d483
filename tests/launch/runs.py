"""Starting the commands as a user does, at a size that takes seconds."""

import json
import os
import pathlib
import subprocess
import sys

from tests.devices import fake

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    "sft.steps": 3,
    "sft.batch_size": 4,
    "rl.steps": 3,
    "rl.prompts": 2,
    "rl.samples": 2,
    "rl.min_accuracy": 0.0,
    "rollout.slots": 8,
    "data.eval_limit": 4,
    "eval.samples": 1,
    "checkpoint.every": 1,
    "model.new.num_layers": 1,
    "model.new.hidden_size": 32,
}


def command(name, run_dir, *flags, config="configs/quickstart.py", **overrides):
    fields = {**TINY, "run_dir": run_dir, **overrides}
    settings = [f"--config.{field}={value}" for field, value in fields.items()]
    return [sys.executable, "-m", f"launch.{name}", f"--config={config}", *settings, *flags]


def environment(devices=1):
    several = fake(devices) if devices > 1 else {}
    return {**os.environ, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", **several}


def run(name, run_dir, *flags, config="configs/quickstart.py", devices=1, **overrides):
    return subprocess.run(
        command(name, run_dir, *flags, config=config, **overrides),
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=280,
    )


def start(name, run_dir, **overrides):
    return subprocess.Popen(
        command(name, run_dir, **overrides),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def lines(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (pathlib.Path(run_dir) / name).read_text().splitlines()]


def timeless(run_dir):
    """Metrics without what no two runs agree on."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "engine/", "tokens_per_second"))}
        for line in lines(run_dir)
    ]
