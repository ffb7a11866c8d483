"""Configs are typed and checked; the numbers of the paper stand in them."""

import dataclasses
import importlib
import math
import os
import pathlib
import subprocess
import sys

import pytest

from open_agentrl_jax.config import Config, expand_home, fingerprint, lookup, validate

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_and_documented(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert config.name == name
    assert validate(config) == []
    assert f"configs/{name}.py" in module.__doc__
    assert "Hardware:" in module.__doc__ and "Expected:" in module.__doc__


def test_the_papers_numbers():
    config = importlib.import_module("configs.qwen3_4b_grpo_tcr").get_config()
    expected = {
        "rl.loss.clip_low": 0.2, "rl.loss.clip_high": 0.28, "rl.loss.dual_clip": 10.0, "rl.loss.kl_coef": 0.0,
        "rl.loss.aggregate": "token-mean", "rl.loss.entropy_coef": 0.0, "rl.loss.normalize_std": True,
        "agent.max_prompt": 2560, "agent.max_response": 20480, "agent.max_turns": 16,
        "reward.overlong_buffer": 4096, "reward.overlong_factor": 1.0,
        "rl.prompts": 64, "rl.samples": 16, "rl.mini_batches": 4, "rl.epochs": 3,
        "rl.optim.lr": 1e-6, "rl.optim.b1": 0.9, "rl.optim.b2": 0.999, "rl.optim.weight_decay": 0.01,
        "rl.optim.clip_norm": 1.0, "rl.optim.schedule": "constant",
        "rollout.temperature": 1.0, "rollout.top_p": 1.0,
        "eval.every": 10, "eval.samples": 32, "eval.temperature": 1.0, "eval.top_p": 0.6, "checkpoint.every": 30,
    }  # fmt: skip
    assert {field: lookup(config, field) for field in expected} == expected
    sft = importlib.import_module("configs.qwen3_4b_sft").get_config().sft
    assert (sft.max_length, sft.batch_size, sft.epochs) == (32768, 32, 5)
    assert dataclasses.astuple(sft.optim) == (1e-5, 0.9, 0.95, 0.01, 1.0, "cosine", 0.1, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl.prompts": 10}, "rl.prompts=10 is not divisible"),
        ({"rl.loss.aggregate": "mean"}, "rl.loss.aggregate is 'mean'; use one of token-mean"),
        ({"rl.samples": 0}, "rl.samples is 0; it must be at least 1"),
        ({"rollout.temperature": 0.0}, "rollout.temperature is 0"),
        ({"rollout.top_p": 0.9, "rl.loss.old_logprobs": "rollout"}, "old_logprobs=rollout with top-p"),
        ({"rollout.top_k": 20, "rl.loss.importance_level": "token"}, "importance_level=token with top-p or top-k"),
        ({"rl.optim.lr": math.nan}, "rl.optim.lr is nan; it must be a finite number"),
        ({"rl.optim.lr": math.inf}, "rl.optim.lr is inf; it must be a finite number"),
        ({"rl.optim.b1": 1.0}, "rl.optim.b1 is 1.0; it must be below 1"),
        ({"sft.optim.warmup": -5}, "sft.optim.warmup is -5; it must be at least 0"),
        ({"agent.seconds": 0.0}, "agent.seconds is 0.0; it must be above 0"),
        ({"rl.steps": 2.5}, "rl.steps is 2.5; it must be an integer"),
        ({"rl.steps": True}, "rl.steps is True; it must be an integer"),
        ({"agent.tools": "python"}, "agent.tools is 'python'; it must be a tuple"),
        ({"rollout.weights": "int8"}, "rollout.weights=int8 needs the embedded engine"),
        ({"rollout.weights": "int8", "rollout.engine": "local"}, "int8 samples from another policy"),
        (
            {"rollout.weights": "int8", "rl.loss.old_logprobs": "rollout", "rl.loss.importance_level": "token"},
            "int8 samples from another policy",
        ),
        ({"data.train": ""}, "data.train is empty"),
        ({"packing.length": 100}, "packing.length=100 cannot hold"),
        ({"reward.overlong_buffer": 99999}, "reward.overlong_buffer=99999 exceeds"),
        ({"rollout.servers": ()}, "rollout.engine=sglang needs rollout.servers"),
    ],
)
def test_faults_are_named(change, message):
    config = importlib.import_module("configs.qwen3_4b_grpo_tcr").get_config()
    for field, value in change.items():
        *parents, leaf = field.split(".")
        setattr(lookup(config, ".".join(parents)) if parents else config, leaf, value)
    assert any(message in fault for fault in validate(config))


def test_fingerprint_ignores_what_a_continuation_may_change():
    a, b = Config(), Config()
    b.rl.steps, b.run_dir, b.checkpoint.every = 99, "elsewhere", 1
    assert fingerprint(a) == fingerprint(b)
    b.rl.optim.offload = True
    assert fingerprint(a) == fingerprint(b)
    b.rl.samples = 3
    assert fingerprint(a) != fingerprint(b)


def test_equal_numbers_have_one_fingerprint():
    a, b = Config(), Config()
    a.sft.optim.warmup, b.sft.optim.warmup = 20, 20.0
    assert fingerprint(a) == fingerprint(b)


def test_a_leading_tilde_is_the_home_directory():
    config, home = Config(run_dir="~/x"), os.path.expanduser("~")
    config.data.train, config.data.eval, config.data.sft = "~/a.jsonl:3,~/b.jsonl", "gsm8k=~/c.jsonl", "a~/d.jsonl"
    expand_home(config)
    assert config.directory == f"{home}/x" and config.data.train == f"{home}/a.jsonl:3,{home}/b.jsonl"
    assert config.data.eval == f"gsm8k={home}/c.jsonl" and config.data.sft == "a~/d.jsonl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/quickstart.py", "--config.rl.stepz=1"], "stepz"),
        (["--config=configs/quickstart.py", "--config.rl.steps=many"], "--config.rl.steps=many"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        ([], "--config is missing"),
        (["--config=configs/quickstart.py", "--config.rl.prompts=0"], "rl.prompts is 0"),
        (["--config=configs/quickstart.py", "--config.data.eval=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_user_errors_are_one_line_with_exit_code_2(arguments, message, tmp_path):
    command = [sys.executable, "-m", "launch.train", *arguments]
    if "--config=configs/quickstart.py" in arguments:
        command.append(f"--config.run_dir={tmp_path}")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    errors = done.stderr.strip().splitlines()
    assert errors[-1].startswith("error: ") and message in errors[-1]
    assert "Traceback" not in done.stderr
