"""A foreign agent trained by the real command, with the embedded engine and the real `openai` client."""

import sys

from .runs import lines, run

AGENT = "configs/agents/calculator.py"


def test_the_quickstart_with_a_foreign_agent_trains(tmp_path):
    tiny = {"rl.steps": 1, "data.eval_limit": 2, "agent.harness.function": ""}
    command = f"{sys.executable} {AGENT}"
    done = run("train", tmp_path, config="configs/quickstart_harness.py", **tiny, **{"agent.harness.command": command})
    assert done.returncode == 0, done.stderr[-3000:]
    (step,) = [line for line in lines(tmp_path) if line["phase"] == "rl"]
    assert step["episodes"] == 4 and step["episodes/aborted"] == 0 and step["actor/tokens"] > 0
    assert step["harness/sequences"] == 1 and step["harness/retokenised"] == step["harness/trained_twice"] == 0
    assert {line["stop"] for line in lines(tmp_path, "trajectories.jsonl")} <= {"answer", "length"}
