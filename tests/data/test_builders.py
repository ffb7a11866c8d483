import json
import subprocess
import sys
from pathlib import Path

import pytest

from open_agentrl_jax.data import builders, prompts
from open_agentrl_jax.data.builders import VERSION, prepare_conversations, prepare_tasks
from open_agentrl_jax.data.conversations import read_conversations
from open_agentrl_jax.data.loader import task_stream
from open_agentrl_jax.data.prompts import Problem, read_tasks
from open_agentrl_jax.types import UserError

CALL = {"function": {"name": "python", "arguments": {"code": "print('é')", "n": [1, None]}}}
CHAT = [
    {"role": "user", "content": "6 × 7?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "\\boxed{42}"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def problems(tmp_path):
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(150)]
    code = {
        "prompt": [{"role": "user", "content": "Add."}],
        "reward_model": {"ground_truth": {"inputs": ["1"], "outputs": ["2"]}},
    }
    return write(tmp_path / "My problems.jsonl", [*rows, code, {"problem": "no answer"}])


def test_prepared_tasks_equal_the_read_ones_in_order(tmp_path, problems):
    tasks = read_tasks(problems)
    prepared = prepare_tasks(problems, tmp_path / "data")
    assert list(prepared) == list(tasks) and len(prepared) == 151
    assert prepared.skipped == tasks.skipped and "row 152" in prepared.skipped[0]
    stream = task_stream(prepared, seed=0)
    assert {stream[i].id for i in range(151)} == {t.id for t in tasks}


def test_prepared_conversations_equal_the_read_ones(tmp_path):
    file = write(tmp_path / "sft.jsonl", [{"messages": CHAT, "tools": [{"a": 1}]}, {"messages": CHAT[-1:]}])
    assert list(prepare_conversations(file, tmp_path / "data")) == list(read_conversations(file))


def test_a_data_set_is_prepared_once_and_anew_when_its_file_changes(tmp_path, problems, monkeypatch):
    first = list(prepare_tasks(problems, tmp_path / "data"))
    with monkeypatch.context() as m:
        m.setattr(builders.RlProblems, "read", staticmethod(lambda *_: pytest.fail("prepared twice")))
        assert list(prepare_tasks(problems, tmp_path / "data")) == first
    problems.write_text(problems.read_text() + json.dumps({"problem": "new", "answer": "1"}) + "\n")
    assert len(prepare_tasks(problems, tmp_path / "data")) == 152
    assert len(list((tmp_path / "data" / "rl_problems").iterdir())) == 2


def test_options_and_evaluation_are_kept_apart(tmp_path, problems):
    with_tools = prepare_tasks(problems, tmp_path / "data")
    without = prepare_tasks(problems, tmp_path / "data", tools=False)
    assert with_tools[0].messages != without[0].messages
    prepare_tasks(problems, tmp_path / "data", evaluation=True)
    assert {p.name for p in (tmp_path / "data").iterdir()} >= {"rl_problems", "eval_problems"}
    files = {p.suffix or p.name for p in (tmp_path / "data").rglob(f"{VERSION}/*")}
    assert any("array_record" in f for f in files)


def test_what_reads_a_file_is_part_of_what_it_was_prepared_by(tmp_path, problems, monkeypatch):
    def shout(row):
        return Problem(row["problem"].upper(), row["answer"])

    for template in (prompts.TEMPLATES["math"], prompts.Template("Solve.", "Box it.")):
        monkeypatch.setitem(prompts.TEMPLATES, "math", template)
        (task, *_) = prepare_tasks(problems, tmp_path / "data")
        assert task.messages[0].content.startswith(template.preamble)
    plain = write(tmp_path / "plain.jsonl", [{"problem": "one?", "answer": "1"}])
    (task,) = prepare_tasks(f"gsm8k={write(tmp_path / 'g.jsonl', [{'question': 'q', 'answer': '#### 1'}])}", tmp_path)
    assert task.source == "gsm8k"
    (task,) = prepare_tasks(plain, tmp_path / "data", format=shout)
    assert "ONE?" in task.messages[0].content and task == read_tasks(plain, format=shout)[0]


def test_mistakes_of_the_user(tmp_path, problems):
    with pytest.raises(UserError, match="is not there"):
        prepare_tasks(tmp_path / "none.jsonl", tmp_path / "data")
    bad = write(tmp_path / "bad.jsonl", [{"x": 1}] * 5)
    for _ in range(2):  # a preparation that failed leaves nothing behind that looks prepared
        with pytest.raises(UserError, match="5 of 5 rows are bad"):
            prepare_tasks(bad, tmp_path / "data")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data_dir"):
        prepare_tasks(problems, tmp_path / "file")


def test_no_tensorflow_and_no_jax_and_nothing_printed(tmp_path, problems):
    script = (
        "import sys; from open_agentrl_jax.data.builders import prepare_tasks\n"
        f"n = len(list(prepare_tasks({str(problems)!r}, {str(tmp_path / 'data')!r})))\n"
        "assert n == 151; assert not {'tensorflow', 'jax', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Generating" not in done.stderr
