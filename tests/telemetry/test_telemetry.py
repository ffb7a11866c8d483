import json
import sys
import types

import numpy as np
import pytest

from open_agentrl_jax.telemetry.index import Table
from open_agentrl_jax.telemetry.metrics import episode_table, rollout_metrics
from open_agentrl_jax.telemetry.screen import curve
from open_agentrl_jax.telemetry.writer import TrajectoryWriter, Writer
from open_agentrl_jax.types import Group, Message, Task, ToolCall, Trajectory, Turn


def trajectory(reward=1.0, accuracy=1.0, stop="answer", calls=2.0, good=1.0):
    turns = [Turn("say <b>", [ToolCall("f")], ["out"], ["ok"]), Turn("done")]
    metrics = {
        "response_length": 7.0,
        "prompt_length": 3.0,
        "num_turns": 2.0,
        "tool_calls": calls,
        "tool_success": good,
    }
    versions = np.array([-1, 3, 4], np.int32)
    return Trajectory(
        np.arange(3, dtype=np.int32),
        versions >= 0,
        np.zeros(3, np.float32),
        versions,
        turns,
        stop,
        reward,
        accuracy,
        metrics,
    )


def group(*trajectories, name="p1"):
    return Group(Task(name, [Message("user", "q")], "3"), list(trajectories))


def test_files_are_cut_to_the_lengths_of_the_checkpoint(tmp_path):
    writer = Writer(tmp_path)
    writer.metrics(1, "rl", {"a": np.float32(0.5), "b": float("nan"), "c": 3.0})
    writer.trajectories(1, "rl", [group(trajectory())])
    offsets = writer.offsets()
    writer.metrics(2, "rl", {"a": 1})
    writer._files["metrics.jsonl"].write(b'{"half')
    writer.close()
    writer = Writer(tmp_path, offsets=offsets)
    writer.metrics(2, "rl", {"a": 2})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "phase": "rl", "a": 0.5, "b": None, "c": 3}, {"step": 2, "phase": "rl", "a": 2}]
    (line,) = [json.loads(line) for line in (tmp_path / "trajectories.jsonl").read_text().splitlines()]
    assert line["problem_id"] == "p1" and line["versions"] == [3, 4] and line["stop"] == "answer"
    assert [m["role"] for m in line["messages"]] == ["assistant", "tool", "assistant"]
    assert line["messages"][0]["content"] == "say <b>" and line["prompt"] == [{"role": "user", "content": "q"}]


@pytest.mark.parametrize("left", [0, 3, 30, 75])
def test_a_file_shorter_than_remembered_is_cut_at_a_line_s_end(tmp_path, monkeypatch, caplog, left):
    monkeypatch.setattr("open_agentrl_jax.telemetry.writer.BLOCK", 7)
    path = tmp_path / "metrics.jsonl"
    writer = Writer(tmp_path)
    for step in (1, 2, 3):
        writer.metrics(step, "rl", {"a": step})
    offsets = writer.offsets()
    writer.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    writer = Writer(tmp_path, offsets=offsets)
    writer.metrics(4, "rl", {"a": 4})
    writer.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [*range(1, whole[:left].count(b"\n") + 1), 4]
    assert "some lines were lost" in caplog.text


def test_rows_hold_the_tools(tmp_path):
    schema = {"type": "function", "function": {"name": "python"}}
    writer = Writer(tmp_path, tools=[schema])
    writer.trajectories(1, "rl", [group(trajectory())])
    writer.close()
    assert json.loads((tmp_path / "trajectories.jsonl").read_text())["tools"] == [schema]


class FakeBoard:
    made = []  # noqa: RUF012

    def __init__(self, directory, purge_step):
        self.directory, self.purge_step, self.steps = directory, purge_step, []
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.steps.append(step)

    def close(self):
        pass


class FakeWandb:
    """Ignores a step that it has, as wandb does."""

    def __init__(self):
        self.rows, self.inits = {}, []

    def init(self, **arguments):
        self.inits.append(arguments)
        return self

    def log(self, row, *, step):
        self.rows.setdefault(step, row)

    def finish(self):
        pass


def test_a_resumed_run_repeats_no_step_in_tensorboard_or_wandb(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=FakeBoard))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(FakeBoard, "made", [])
    options = {"tensorboard": True, "wandb_project": "p", "run_id": "one", "config": {"api_key": "s3cret"}}
    writer = Writer(tmp_path, **options)
    for step in (1, 2, 3):
        writer.metrics(step, "sft", {"loss": 1.0})
    writer.metrics(1, "rl", {"a": 1.0})
    offsets = writer.offsets()
    writer.metrics(2, "rl", {"a": 1.0})
    writer.close()
    writer = Writer(tmp_path, offsets=offsets, **options)
    writer.metrics(2, "rl", {"a": 1.0})
    writer.close()
    boards = [(board.directory.rpartition("/")[2], board.purge_step, board.steps) for board in FakeBoard.made]
    assert boards == [("sft", 0, [1, 2, 3]), ("rl", 0, [1, 2]), ("rl", 2, [2])]
    assert [row.get("rl/step") for row in wandb.rows.values()] == [None, None, None, 1, 2]
    assert [(i["id"], i["resume"], i["config"]) for i in wandb.inits] == [("one", "allow", {"api_key": "***"})] * 2


def test_metrics_exclude_aborted_episodes():
    lost = trajectory(reward=0.0, accuracy=0.0, stop="aborted", calls=0.0, good=0.0)
    numbers = rollout_metrics(episode_table([group(trajectory(), trajectory(-1.0, 0.0), lost)], version=4))
    assert numbers["accuracy/mean"] == 0.5 and numbers["reward/mean"] == 0 and numbers["episodes/aborted"] == 1
    assert numbers["tool_success/mean"] == 0.5 and numbers["tool_calls/mean"] == 2
    assert numbers["staleness/mean"] == 0.5 and numbers["staleness/max"] == 1
    counts = {"episodes": 1, "episodes/aborted": 1, "episodes/retried": 0}
    assert rollout_metrics(episode_table([group(lost)])) == counts


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0], list(range(500))])
def test_a_curve_is_one_line(values):
    assert "\n" not in curve(values) and len(curve(values)) < 90


def test_a_missing_extra_is_an_error_with_its_cure(tmp_path, monkeypatch):
    from open_agentrl_jax.types import UserError

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[tensorboard\]'"):
        Writer(tmp_path, tensorboard=True)


def test_every_process_writes_its_own_trajectories_and_the_index_reads_all(tmp_path):
    first, second = Writer(tmp_path, processes=2), TrajectoryWriter(tmp_path, 1)
    for step in (1, 2):
        for number, writer in enumerate((first, second)):
            writer.metrics(step, "rl", {"reward": 1.0})
            writer.trajectories(step, "rl", [group(trajectory(), trajectory(), name=f"p{number}")])
        if step == 1:
            offsets = first.offsets() | second.offsets()
    first.close()
    second.close()
    table = Table(tmp_path / "trajectories.jsonl")
    table.update()
    assert len(table) == 8 and len(table.groups()) == 4
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert [json.loads(line)["problem_id"] for line in table.read(3, 5).splitlines()] == ["p0", "p1"]
    again = Writer(tmp_path, offsets=offsets)  # on one process, from step 1
    assert again.offsets() == offsets
    again.close()
    table.update()
    assert table.columns["step"] == [1, 1, 1, 1] and table.columns["problem"] == ["p0", "p0", "p1", "p1"]
