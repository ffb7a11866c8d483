"""Real input: GSM8K rows, a Hugging Face tokenizer from a folder, the wide vocabulary where the real one is at hand."""

import json
import pathlib

import pytest

from open_agentrl_jax.data import synthetic
from tests.launch.runs import lines, run

SAMPLE = pathlib.Path(__file__).parent / "problems.jsonl"
SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"


def smoke(directory, train, held_out, tokenizer, **overrides):
    fields = {"rl.steps": 3, "rl.prompts": 4, "data.train": train, "data.eval": held_out, "model.tokenizer": tokenizer}
    keep = {"rl.mini_batches": 2, "checkpoint.every": 10, **fields, **overrides}
    return run("train", directory, config="configs/gsm8k_smoke.py", **keep)


def halves(tmp_path):
    rows = SAMPLE.read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:8]))
    (tmp_path / "eval.jsonl").write_text("\n".join(rows[8:]))
    return tmp_path / "train.jsonl", tmp_path / "eval.jsonl"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [json.loads(line)["question"] for line in SAMPLE.read_text().splitlines()]
    synthetic.train_tokenizer([*synthetic.corpus(0, 200), *texts]).save_pretrained(folder)
    return folder


def test_three_steps_on_two_files_mixed_by_weight_and_prepared_once(tmp_path, tokenizer):
    train, held_out = halves(tmp_path)
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    plain = [{"problem": row["question"], "answer": row["answer"].split()[-1]} for row in rows[6:]]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    directory = tmp_path / "run"
    small = {"sft.steps": 0, "model.new.vocab_size": 1024, "agent.max_response": 48}
    prepared = {"data.data_dir": tmp_path / "prepared"}
    done = smoke(directory, f"{train}:3,{tmp_path / 'few.jsonl'}:1", held_out, tokenizer, **small, **prepared)
    assert {path.name for path in (tmp_path / "prepared").iterdir()} >= {"eval_problems", "rl_problems"}
    assert done.returncode == 0, done.stderr[-3000:]
    rl = [line for line in lines(directory) if line["phase"] == "rl"]
    assert [line["step"] for line in rl] == [1, 2, 3]
    assert all(line["actor/skipped"] == 0 and line["episodes"] == 8 for line in rl)
    texts = lines(directory, "trajectories.jsonl")
    assert all(t["answer"].isdigit() for t in texts)
    played = [t["problem_id"].split("/")[0] for t in texts if t["phase"] == "rl"]
    assert [played.count(source) for source in ("gsm8k", "few")] == [18, 6]
    assert json.loads((directory / "export" / "config.json").read_text())["vocab_size"] == 1024


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("", "train.jsonl"),
        ('{"question": "q"}\n' * 3, "3 of 3 rows are bad"),
        ("not json\n" * 3, "train.jsonl"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path, tokenizer, rows, told):
    train, held_out = halves(tmp_path)
    train.write_text(rows)
    done = smoke(tmp_path / "run", train, held_out, tokenizer, **{"model.new.vocab_size": 1024, "sft.steps": 0})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and told in done.stderr.splitlines()[-1]


def test_evaluation_problems_may_not_be_trained_on(tmp_path, tokenizer):
    train, held_out = halves(tmp_path)
    held_out.write_text(train.read_text())
    done = smoke(tmp_path / "run", train, held_out, tokenizer, **{"model.new.vocab_size": 1024, "sft.steps": 0})
    assert done.returncode == 2 and "is also in data.train" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not SHARED.exists(), reason="the real Qwen3 tokenizer and GSM8K are not part of the project")
def test_the_real_tokenizer_vocabulary_and_problems(tmp_path):
    problems = SHARED / "problems"
    tokenizer = SHARED / "qwen3-tokenizer"
    directory = tmp_path / "run"
    small = {"sft.steps": 0, "rl.samples": 4, "rl.steps": 2}
    done = smoke(directory, problems / "gsm8k_train.jsonl", problems / "gsm8k_test.jsonl", tokenizer, **small)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([line for line in lines(directory) if line["phase"] == "rl"]) == 2
    assert json.loads((directory / "export" / "config.json").read_text())["vocab_size"] == 151936
