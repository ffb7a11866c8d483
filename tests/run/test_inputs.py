"""Which problems of a file a run uses."""

import json

from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.config import Config
from open_agentrl_jax.run import inputs


def test_a_problem_repeated_in_an_evaluation_file_counts_once(tokenizer, tmp_path):
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in (1, 1, 1, 2, 2, 2, 3, 3, 3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, chat = Config(), Chat(tokenizer)
    tasks, notes = inputs.problems(config, str(tmp_path / "a.jsonl"), chat, evaluation=True)
    assert [task.answer for task in tasks] == ["2", "3", "4"] and "9 rows hold 3 problems" in notes[-1]
    config.data.eval_limit = 2  # problems, not rows
    assert len(inputs.problems(config, str(tmp_path / "a.jsonl"), chat, evaluation=True)[0]) == 2
    assert len(inputs.problems(config, str(tmp_path / "a.jsonl"), chat, evaluation=False)[0]) == 9
