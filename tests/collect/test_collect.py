"""launch.collect against a teacher on a real socket: what is kept, what a kill costs, and a teacher that misbehaves."""

import json
import signal
import subprocess
import sys
import time

import pytest

from configs import quickstart
from launch import collect
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.collect import endpoint
from open_agentrl_jax.data.conversations import read_conversations
from open_agentrl_jax.data.rows import read_table
from open_agentrl_jax.types import UserError
from tests.launch.runs import ROOT, environment
from tests.launch.teacher import serving

PROBLEMS = ROOT / "tests" / "launch" / "problems.jsonl"


def gather(output, server=None, *, train=PROBLEMS, held_out="", **values):
    """Runs the command in this process; returns its card."""
    config = quickstart.get_config()
    config.data.train, config.data.eval, config.rollout.concurrency = str(train), str(held_out), 4
    config.packing.length, config.rollout.deadline = 0, 5.0
    if server is not None:
        values |= {"endpoint": server.url, "endpoint_model": "t"}
    try:
        collect.main(config, collect.Options(**{"output": str(output), "tries": 2, **values}))
    finally:
        card = json.loads((output / "card.json").read_text()) if (output / "card.json").exists() else {}
    return card


def test_right_trajectories_are_kept_with_every_call_and_result(tmp_path):
    with serving() as server:
        card = gather(tmp_path, server)
    assert server.asked == 2 * 12 * 2 == card["teacher"]["calls"]
    counts = card["trajectories"]
    assert counts["tries"] == 24 == sum(n for name, n in counts.items() if name != "tries")
    assert (counts["wrong"], counts["duplicate"], counts["kept"]) == (4, 10, 10)  # both tries of a problem are alike
    assert card["problems"] == {"read": 12, "contaminated": 0, "used": 12, "solved": 10}
    kept = read_conversations(tmp_path / "sft.parquet")
    assert len(kept) == 10 and all(c.tools == [PythonTool.schema] for c in kept)
    user, call, result, answer = kept[0].messages
    assert user.content.startswith("Here is a word problem") and call.content == "I count them."
    assert call.tool_calls[0].arguments == {"code": "print(3 * 4 + 2)"}
    assert (result.role, result.content, answer.content) == ("tool", "14", "So \\boxed{14}.")
    columns = read_table(tmp_path / "sft.parquet", lambda row, file, i: row)[0]
    assert (columns["tool_calls"], columns["tool_success"], columns["problem_id"]) == (1, 1, "gsm8k/1")
    assert "| gsm8k | 1 | 10 | 10 | 1.0 |" in (tmp_path / "README.md").read_text()


def test_a_second_time_nobody_is_asked_and_more_tries_ask_only_for_those(tmp_path):
    with serving() as server:
        first = gather(tmp_path, server)
        asked = server.asked
        again = gather(tmp_path, server)
        assert server.asked == asked and again["teacher"] == {"calls saved by the journal": 48}
        assert again["trajectories"] == first["trajectories"]
        gather(tmp_path, server, tries=3)
        assert server.asked == asked + 24


def test_evaluation_problems_are_not_even_asked_for(tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("\n".join(PROBLEMS.read_text().splitlines()[4:7]))
    with serving() as server:
        card = gather(tmp_path / "out", server, held_out=f"gsm8k={held_out}")
    assert card["problems"]["contaminated"] == 3 and server.asked == 2 * 9 * 2
    assert card["made"]["evaluation problems"] == 3
    texts = [c.messages[0].content for c in read_conversations(tmp_path / "out" / "sft.parquet")]
    assert not any(json.loads(line)["question"] in text for line in held_out.read_text().splitlines() for text in texts)


def test_a_row_that_cannot_be_used_is_told_in_the_card(tmp_path):
    (tmp_path / "p.jsonl").write_text(PROBLEMS.read_text() + '{"question": "No answer?"}\n')
    with serving() as server:
        card = gather(tmp_path / "out", server, train=tmp_path / "p.jsonl", tries=1)
    assert card["problems"]["read"] == 12 and f"{tmp_path / 'p.jsonl'} row 13" in card["made"]["left out"]


def test_a_teacher_in_trouble_is_counted_and_nothing_is_lost(tmp_path):
    answers = {1: 500, 2: "no JSON", 5: '{"choices": []}', 8: 429}
    with serving(trouble=answers.get) as server:
        card = gather(tmp_path, server)
    assert card["trajectories"]["kept"] == 10 and card["trajectories"]["not_graded"] == 0
    teacher = card["teacher"]
    assert (teacher["status 500"], teacher["status 429"], teacher["nonsense"], teacher["retries"]) == (1, 1, 2, 4)


def test_a_teacher_that_never_answers_well_ends_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "ATTEMPTS", 1)
    monkeypatch.setattr(endpoint, "IN_A_ROW", 5)
    with serving(trouble=lambda n: 500) as server, pytest.raises(UserError, match="5 calls in a row failed") as error:
        gather(tmp_path, server)
    assert "\n" not in str(error.value) and not (tmp_path / "sft.parquet").exists()


def test_a_teacher_that_is_always_wrong_leaves_a_card_and_a_reason(tmp_path):
    wrong = json.dumps({"choices": [{"message": {"content": "\\boxed{-1}"}}]})
    with serving(trouble=lambda n: wrong) as server, pytest.raises(UserError, match="none of 24 trajectories was kept"):
        gather(tmp_path, server)
    assert json.loads((tmp_path / "card.json").read_text())["trajectories"]["wrong"] == 24


def test_worked_solutions_are_asked_of_nobody(tmp_path):
    card = gather(tmp_path, style="stitched")
    assert card["trajectories"] == {"tries": 12, "duplicate": 0, "contaminated": 0, "over_size": 0, "kept": 12}
    first = read_conversations(tmp_path / "sft.parquet")[0]
    assert [m.role for m in first.messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert first.messages[1].content


def test_kill_9_loses_at_most_what_was_on_the_way(tmp_path):
    """One call at a time: the kill may cost the one that was on the way, every other one comes from the journal."""
    settings = ["--config.packing.length=0", "--config.data.eval=", "--config.rollout.concurrency=1"]
    with serving(delay=0.05) as server:
        command = [
            *(sys.executable, "-m", "launch.collect", "--config=configs/quickstart.py", f"--output={tmp_path}"),
            *(f"--endpoint={server.url}", "--endpoint_model=t", "--tries=2", f"--config.data.train={PROBLEMS}"),
            *("--config.model.tokenizer=none", *settings),
        ]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 120
        while server.asked < 15 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        before = server.asked
        assert 15 <= before < 48
        server.delay = 0.0
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
    card = json.loads((tmp_path / "card.json").read_text())
    saved = card["teacher"]["calls saved by the journal"]
    assert saved >= before - 1 and saved + card["teacher"]["calls"] == 48 and server.asked <= 49
    assert card["trajectories"]["kept"] == 10 and len(read_conversations(tmp_path / "sft.parquet")) == 10
