"""Which problems of a file a run uses."""

import json

from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.config import Config
from open_agentrl_jax.data.conversations import Conversation
from open_agentrl_jax.run import inputs
from open_agentrl_jax.types import Message


def test_a_problem_repeated_in_a_file_counts_once(tokenizer, tmp_path):
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in (1, 1, 1, 2, 2, 2, 3, 3, 3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, chat = Config(), Chat(tokenizer)
    tasks, notes = inputs.problems(config, str(tmp_path / "a.jsonl"), chat, evaluation=True)
    assert [task.answer for task in tasks] == ["2", "3", "4"] and "9 rows hold 3 problems" in notes[-1]
    config.data.eval_limit = 2  # problems, not rows
    assert len(inputs.problems(config, str(tmp_path / "a.jsonl"), chat, evaluation=True)[0]) == 2
    trained, notes = inputs.problems(config, str(tmp_path / "a.jsonl"), chat, evaluation=False)
    assert len(trained) == 3 and notes[-1].endswith("9 rows hold 3 problems; each is played once per epoch")


def test_copied_conversations_are_counted(tokenizer, caplog):
    messages = [Message("user", "1 + 1?"), Message("assistant", "2")]
    conversations = [Conversation(str(i), messages, [], "x") for i in range(3)]
    assert len(inputs.sft_examples(Config(), Chat(tokenizer), conversations)) == 3
    assert "2 of 3 conversations are copies of others" in caplog.text
