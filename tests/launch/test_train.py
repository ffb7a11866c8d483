"""The commands as a user runs them: real processes, real sandbox, real kills."""

import gzip
import json
import random
import shutil
import signal
import time

import numpy as np
import pytest

from open_agentrl_jax.models import convert
from tests.disks import small_disk  # noqa: F401 - a fixture
from tests.launch.runs import lines, run, start, timeless


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run that the tests of this file look at."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    done = run("train", directory, "--profile")
    assert done.returncode == 0, done.stderr[-3000:]
    return directory, done


def test_a_run_leaves_what_it_promises(finished):
    directory, done = finished
    names = {p.name for p in directory.iterdir()}
    assert {"config.json", "metrics.jsonl", "trajectories.jsonl", "checkpoints", "export", "report.html"} <= names
    phases = [(line["phase"], line["step"]) for line in lines(directory)]
    assert phases == [("sft", 1), ("sft", 2), ("sft", 3), ("eval", 0), ("rl", 1), ("rl", 2), ("rl", 3), ("eval", 3)]
    assert "before RL" in done.stdout and "reward by step" in done.stdout and str(directory) in done.stdout


def test_a_profile_shows_two_steps_of_each_phase_by_the_names_of_their_parts(finished):
    for phase, parts in {"sft": {"pack", "dispatch", "train"}, "rl": {"rollout", "pack", "update", "publish"}}.items():
        (trace,) = (finished[0] / "profile" / phase).rglob("*.trace.json.gz")
        names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
        assert parts <= set(names)
        assert names.count("pack") == 2


def test_metrics_have_the_fields_names(finished):
    rl = [line for line in lines(finished[0]) if line["phase"] == "rl"]
    wanted = [
        *("actor/entropy", "actor/pg_clipfrac", "actor/grad_norm", "reward/mean", "accuracy/mean", "staleness/mean"),
        *("response_length/mean", "response_length/max", "tool_calls/mean", "tool_success/mean", "tokens_per_second"),
        *("time/rollout", "time/update", "time/step"),
    ]
    assert all(name in line for line in rl for name in wanted)
    for line in rl:  # the breakdown adds up to the wall time
        parts = sum(
            v for k, v in line.items() if k.startswith("time/") and k not in ("time/step",) and "episode" not in k
        )
        assert parts == pytest.approx(line["time/step"], rel=1e-3)


def test_trajectories_tell_the_whole_conversation(finished):
    texts = lines(finished[0], "trajectories.jsonl")
    assert len(texts) == 4 + 3 * 4 + 4
    assert {"step", "problem_id", "prompt", "messages", "reward", "accuracy", "stop", "versions"} <= set(texts[0])
    rl = [t for t in texts if t["phase"] == "rl"]
    assert all(t["versions"] == [t["step"] - 1] for t in rl if t["stop"] != "aborted")


def test_transformers_loads_the_export(finished):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished[0] / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits
    assert logits.shape == (1, len(ids), model.config.vocab_size) and torch.isfinite(logits).all()


def test_evaluate_alone(finished):
    directory, _ = finished
    done = run("evaluate", directory, **{"eval.samples": 2})
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((directory / "evaluation.json").read_text())
    assert {"avg@2", "pass@1", "pass@2", "maj@2"} <= set(figures["accuracy"])
    assert figures["mode"] == "agentic" and figures["episodes"] == {"all": 8, "graded": 8, "aborted": 0}


def test_another_config_may_not_go_on_there(finished):
    done = run("train", finished[0], **{"rl.samples": 4})
    assert done.returncode == 2
    told = done.stderr.strip().splitlines()[-1]
    assert "rl.samples: 2 there, 4 here" in told and "another run_dir" in told


def test_sft_alone(tmp_path):
    done = run("sft", tmp_path / "sft")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line["phase"] for line in lines(tmp_path / "sft")} == {"sft", "eval"}
    assert (tmp_path / "sft" / "export" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_a_run_ends_bit_equal(finished, tmp_path, seed):
    """SIGKILL at three random moments, the same command again, and every number equals the uninterrupted run's."""
    whole, _ = finished
    directory = tmp_path / "run"
    rng = random.Random(seed)
    for _ in range(3):
        process = start("train", directory)
        known = len(lines(directory)) if (directory / "metrics.jsonl").exists() else 0
        target, deadline = known + rng.randint(0, 4), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            written = (directory / "metrics.jsonl").exists() and len(
                (directory / "metrics.jsonl").read_bytes().splitlines()
            )
            if written and written >= target:
                time.sleep(rng.random() * 0.8)
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run("train", directory)
    assert done.returncode == 0, done.stderr[-3000:]
    assert timeless(directory) == timeless(whole)
    assert lines(directory, "trajectories.jsonl") == lines(whole, "trajectories.jsonl")
    for file in ("model.safetensors", "config.json"):
        assert (directory / "export" / file).read_bytes() == (whole / "export" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_continued_run_keeps_the_reference_policy_it_began_with(tmp_path):
    settings = {"rl.loss.kl_coef": 0.1, "rl.optim.schedule": "constant", "rl.optim.lr": 1e-2}
    for directory, steps in (("whole", (3,)), ("twice", (2, 3))):
        for step in steps:
            done = run("train", tmp_path / directory, **settings, **{"rl.steps": step})
            assert done.returncode == 0, done.stderr[-3000:]
    whole, twice = ([x["actor/kl"] for x in timeless(tmp_path / d) if x["phase"] == "rl"] for d in ("whole", "twice"))
    assert whole == twice and whole[2] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_continued_run_of_adapters_ends_bit_equal(tmp_path):
    """Its checkpoints hold adapters alone; its exports are a PEFT adapter and the merged model that was sampled."""
    settings = {"model.lora.rank": 4, "rl.loss.kl_coef": 0.1, "rl.optim.schedule": "constant", "rl.optim.lr": 1e-2}
    settings |= {"rollout.weights": "merged"}
    for directory, steps in (("whole", (3,)), ("twice", (2, 3))):
        for step in steps:
            done = run("train", tmp_path / directory, **settings, **{"rl.steps": step})
            assert done.returncode == 0, done.stderr[-3000:]
    whole, twice = tmp_path / "whole", tmp_path / "twice"
    assert timeless(whole) == timeless(twice)
    for name in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
        assert (whole / name).read_bytes() == (twice / name).read_bytes()
    saved = convert.describe_orbax(str(whole / "checkpoints" / "6"))[1]
    assert {name.rsplit("_", 1)[0][-5:] for name in saved["layers"]} == {"_lora"} and saved.keys() == {"layers"}
    convert.convert("orbax", str(whole / "checkpoints" / "6"), "hf", tmp_path / "made")
    assert (tmp_path / "made/model.safetensors").read_bytes() == (whole / "export/model.safetensors").read_bytes()
    more = {"model.path": whole / "init", "model.lora.adapter": whole / "adapter", "sft.steps": 0, "rl.steps": 1}
    done = run("train", tmp_path / "more", **settings, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    went_on = next(line for line in lines(tmp_path / "more") if line["phase"] == "eval")
    assert went_on["reward/mean"] == [line for line in lines(whole) if line["phase"] == "eval"][-1]["reward/mean"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_asynchronous_episodes_are_at_most_so_stale(tmp_path):
    """Generation goes on while the trainer trains: the weights it samples from must outlive the update."""
    done = run("train", tmp_path, **{"rl.max_staleness": 1, "rl.steps": 6})
    assert done.returncode == 0, done.stderr[-3000:]
    stale = [x["staleness/max"] for x in lines(tmp_path) if x["phase"] == "rl"]
    assert len(stale) == 6 and max(stale) == 1
    texts = [t for t in lines(tmp_path, "trajectories.jsonl") if t["phase"] == "rl"]
    assert not [t for t in texts if t["stop"] == "aborted"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_new_machine_goes_on_from_the_copy(finished, tmp_path):
    """Killed, and its disk is lost."""
    directory, copy = tmp_path / "run", tmp_path / "copy"
    process = start("train", directory, **{"checkpoint.copy_to": copy})
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (copy / "copy.json").exists() and any(line["phase"] == "rl" for line in lines(directory)[:-1]):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(directory)
    done = run("train", directory, **{"checkpoint.copy_to": copy})
    assert done.returncode == 0 and "resumed: " in done.stdout, done.stderr[-3000:]
    assert timeless(directory) == timeless(finished[0])
    for name in ("metrics.jsonl", "trajectories.jsonl", "export/model.safetensors", "report.html"):
        assert (copy / name).read_bytes() == (directory / name).read_bytes()
    other = run("train", tmp_path / "other", **{"checkpoint.copy_to": copy, "seed": 1})
    assert other.returncode == 2 and "the copy there is of another config" in other.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_saves_and_exits_0(finished, tmp_path):
    directory = tmp_path / "run"
    process = start("train", directory, **{"checkpoint.every": 1000})
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (directory / "metrics.jsonl").exists() and any(
            '"rl"' in x for x in (directory / "metrics.jsonl").read_text().splitlines()
        ):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    done = run("train", directory, **{"checkpoint.every": 1000})
    assert done.returncode == 0 and "resumed: rl step" in done.stdout
    assert timeless(directory) == timeless(finished[0])


FULL = "No space left on device; free some space, then run the same command again\n"


def test_a_full_disk_is_one_line(small_disk):  # noqa: F811
    done = run("train", small_disk(64) / "run")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.endswith(FULL)
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kib", [400, 1000])
def test_a_run_continues_once_its_full_disk_has_space(finished, small_disk, kib):  # noqa: F811
    """The first checkpoint does not fit, or a later one."""
    directory = small_disk(kib) / "run"
    done = run("train", directory)
    errors = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("W")]
    assert done.returncode == 2 and len(errors) == 1 and errors[0].endswith(FULL), done.stderr[:3000]
    small_disk(16 * 1024)
    done = run("train", directory)
    assert done.returncode == 0, done.stderr[-3000:]
    assert timeless(directory) == timeless(finished[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_learns(tmp_path):
    """The real one, whole."""
    import subprocess
    import sys

    from tests.launch.runs import ROOT, environment

    command = [
        sys.executable,
        "-m",
        "launch.train",
        "--config=configs/quickstart.py",
        f"--config.run_dir={tmp_path / 'q'}",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    evals = [line["accuracy/mean"] for line in lines(tmp_path / "q") if line["phase"] == "eval"]
    assert evals[0] <= 0.5 and evals[-1] >= 0.9, evals
    rewards = [line["reward/mean"] for line in lines(tmp_path / "q") if line["phase"] == "rl"]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.5
