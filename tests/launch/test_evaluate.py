"""launch.evaluate with a tiny untrained model: files, labels, resumption, comparison."""

import json

import pytest

from configs import quickstart
from launch import evaluate
from open_agentrl_jax.collect import teachers
from open_agentrl_jax.collect.journal import tokenless
from open_agentrl_jax.run.players import Player
from open_agentrl_jax.run.policy import create_model
from open_agentrl_jax.types import Group, Task, UserError
from tests.launch.runs import ROOT

PROBLEMS = ROOT / "tests" / "launch" / "problems.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny()
    path = tmp_path_factory.mktemp("model") / "export"
    create_model(config, path)
    return path


def tiny():
    config = quickstart.get_config()
    config.model.new.num_layers, config.model.new.hidden_size = 1, 32
    config.agent.max_prompt, config.agent.max_response, config.packing.length = 512, 16, 0
    config.rollout.slots, config.eval.samples = 8, 2
    return config


def figures(model, output, data, **values):
    config = tiny()
    config.run_dir, config.data.eval = str(output.parent), data
    evaluate.main(config, evaluate.Options(model=str(model), output=str(output), **values))
    return json.loads(output.read_text())


def test_a_run_its_resumption_and_its_comparison(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "few.jsonl").write_text("\n".join(PROBLEMS.read_text().splitlines()[:3]))
    data = f"gsm8k={tmp_path / 'few.jsonl'}"
    agentic = figures(model, tmp_path / "agentic.json", data)
    assert agentic["mode"] == "agentic" and agentic["data"] == data and agentic["episodes"]["all"] == 6
    assert [p["id"] for p in agentic["problems"]] == ["gsm8k/1", "gsm8k/2", "gsm8k/3"]
    assert {"avg@2", "pass@1", "pass@2", "maj@2", "bootstrap_best@2"} <= set(agentic["accuracy"])
    assert not (tmp_path / "agentic.livecodebench.json").exists()

    # half of the journal is lost, as by a kill: only that half is played again
    (journal,) = (tmp_path / "journals").iterdir()
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:4]) + lines[4][:20])
    played, play = [], Player.__call__

    async def counted(self, task, *, position, sample, attempt):
        played.append(sample)
        return await play(self, task, position=position, sample=sample, attempt=attempt)

    monkeypatch.setattr(Player, "__call__", counted)
    again = figures(model, tmp_path / "agentic.json", data)
    assert len(played) == 3 and again == agentic
    assert "3 of 6 episodes were there already" in capsys.readouterr().out

    free = figures(model, tmp_path / "free.json", data, tools=False, compare=str(tmp_path / "agentic.json"))
    assert free["mode"] == "tool-free" and len(played) == 9
    assert free["tools"]["responses_without_call"] == 1.0
    test = free["comparison"]
    assert (test["mode"], test["problems"], test["with"]) == ("agentic", 3, str(tmp_path / "agentic.json"))
    assert test["difference"] == test["b"] - test["a"] and test["low"] <= test["difference"] <= test["high"]
    out = capsys.readouterr().out
    assert "tool-free" in out and "minus" in out and "on 3 problems" in out


def test_programs_are_written_as_livecodebench_reads_them(tmp_path):
    task = Task("b", [], {}, extra={"question_id": "b", "grader": "code"})
    group = Group(task, [tokenless([], "answer", prediction="print(1)"), tokenless([], "aborted")])
    evaluate.write(tmp_path / "deep" / "lcb.json", {"mode": "agentic"}, [group])
    assert json.loads((tmp_path / "deep" / "lcb.json").read_text()) == {"mode": "agentic"}
    written = json.loads((tmp_path / "deep" / "lcb.livecodebench.json").read_text())
    assert written == [{"question_id": "b", "code_list": ["print(1)", ""]}]


@pytest.mark.parametrize("text", [None, "{}", "no JSON", '{"problems": [{"id": "p", "accuracy": [1.0]}]}'])
def test_what_cannot_be_compared_is_told_before_anything_is_loaded(model, tmp_path, text):
    other = tmp_path / "other.json"
    if text is not None:
        other.write_text(text)
    with pytest.raises(UserError, match=r"--compare=.*other\.json") as error:
        figures(model, tmp_path / "x.json", "arithmetic", compare=str(other))
    assert "\n" not in str(error.value) and not (tmp_path / "journals").exists()


def test_data_is_read_before_weights(model, tmp_path, monkeypatch):
    def never(*arguments):
        raise AssertionError("weights were read")

    monkeypatch.setattr(teachers, "load_policy", never)
    with pytest.raises(UserError, match=r"nowhere\.jsonl is not there"):
        figures(model, tmp_path / "e.json", "nowhere.jsonl")


def test_an_evaluation_without_a_graded_episode_says_why(model, tmp_path):
    config = tiny()
    config.run_dir, config.data.eval, config.data.eval_limit = str(tmp_path), f"gsm8k={PROBLEMS}", 1
    config.agent.seconds = 0.0001
    with pytest.raises(UserError, match=r"none of 2 episodes was graded \(2 ran out of time: raise agent\.seconds\)"):
        evaluate.main(config, evaluate.Options(model=str(model), output=str(tmp_path / "e.json")))
    assert not (tmp_path / "e.json").exists()
