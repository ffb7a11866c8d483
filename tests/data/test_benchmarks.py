"""Evaluation sets by name: the template and the slice belong to the name, the file may be a local copy."""

import json
import pathlib

import pytest

from open_agentrl_jax.data.benchmarks import BENCHMARKS, read_problems
from open_agentrl_jax.data.prompts import TEMPLATES, TOOL_HINT
from open_agentrl_jax.types import UserError
from tests.data.test_prompts import AIME, GPQA, GSM8K, case, lcb, write

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "problems"


def test_a_local_copy_of_any_file_name_gets_the_template_of_its_set(tmp_path):
    for name, row, family in (("aime_2024", AIME, "aime"), ("gpqa_diamond", GPQA, "gpqa"), ("gsm8k", GSM8K, "gsm8k")):
        file = write(tmp_path / "part-00000.jsonl", [row])
        (task,) = read_problems(f"{name}={file}")
        assert task.messages[0].content.startswith(TEMPLATES[family].preamble)
        assert task.extra["grader"] == TEMPLATES[family].grader and TOOL_HINT in task.messages[0].content
        (bare,) = read_problems(f"{name}={file}", tools=False)
        assert TOOL_HINT not in bare.messages[0].content and "tool" not in bare.messages[0].content


@pytest.mark.parametrize(
    ("name", "answer", "family"),
    [
        ("aime_2026", 277, "aime"),
        ("hmmt_feb_2025", "103", "math"),
        ("hmmt_feb_2026", "-\\frac{1}{21}", "math"),
        ("beyond_aime", 123456, "math"),
    ],
)
def test_newer_contests_are_read_in_their_documented_columns(tmp_path, name, answer, family):
    row = {"problem_idx": 1, "problem": "Compute it.", "answer": answer}
    (task,) = read_problems(f"{name}={write(tmp_path / 'rows.jsonl', [row])}")
    assert str(task.answer) == str(answer) and task.messages[0].content.startswith(TEMPLATES[family].preamble)


def test_the_slice_of_livecodebench_is_cut_by_the_month_of_the_contest(tmp_path):
    months = ["2024-12", "2025-01", "2025-02", "2025-04", "2025-05", "2025-06"]
    tests = ([case("1", "1")], [case("2", "2")])
    rows = [lcb(*tests, contest_date=f"{month}-15T00:00:00", question_id=month) for month in months]
    file = write(tmp_path / "test.jsonl", rows)
    assert len(read_problems(f"livecodebench_v6={file}")) == 6
    cut = read_problems(f"livecodebench_v6_2502_2505={file}")
    assert [task.extra["question_id"] for task in cut] == ["2025-02", "2025-04", "2025-05"]
    old = write(tmp_path / "old.jsonl", rows[:2])
    with pytest.raises(UserError, match="none of its 2 problems belongs to livecodebench_v6_2502_2505"):
        read_problems(f"livecodebench_v6_2502_2505={old}")


def test_a_file_that_was_cut_already_tells_no_dates(tmp_path):
    row = {
        "data_source": "livecodebench", "prompt": json.dumps([{"role": "user", "content": "Double it."}]),
        "ability": "code", "reward_model": json.dumps({"ground_truth": {"inputs": ["1"], "outputs": ["2"]}}),
        "extra_info": json.dumps({"index": 3}),
    }  # fmt: skip
    (task,) = read_problems(f"livecodebench_v6_2502_2505={write(tmp_path / 'v6.jsonl', [row])}")
    assert task.extra["grader"] == "code" and "inputs" not in task.messages[0].content


def test_names_ask_the_hub_for_their_own_files_only(tmp_path, monkeypatch):
    import huggingface_hub

    folder = tmp_path / "hub"
    (folder / "main").mkdir(parents=True)
    write(folder / "main" / "test-0.jsonl", [GSM8K])
    write(folder / "main" / "train-0.jsonl", [GSM8K] * 5)
    asked = []

    def download(repo, **options):
        asked.append((repo, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert len(read_problems("gsm8k")) == 1
    assert asked == [("openai/gsm8k", ["main/test-*"])]


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not part of the project")
@pytest.mark.parametrize(("name", "rows"), [("aime_2024", 30), ("aime_2025", 30), ("gsm8k", 1319)])
def test_the_real_files(name, rows):
    file = SHARED / {"gsm8k": "gsm8k_test.jsonl"}.get(name, f"{name}.jsonl")
    tasks = read_problems(f"{name}={file}")
    assert len(tasks) == rows == len({task.id for task in tasks}) and name in BENCHMARKS
