"""What is written down survives a kill, is never mixed with other settings, and is never asked for again."""

import asyncio
import json

import numpy as np
import pytest

from open_agentrl_jax.collect.journal import Journal, RememberingEngine, from_record, remembered, to_record, tokenless
from open_agentrl_jax.types import Completion, Message, Sampling, Task, ToolCall, Turn, UserError

TASK = Task("p/1", [Message("user", "2 + 2?")], "4", "p")


def trajectory(stop="answer", accuracy=1.0):
    call = ToolCall("code_interpreter", {"code": "print(2+2)"})
    turns = [Turn("", [call], ["4"], ["ok"], 0.5), Turn("\\boxed{4}")]
    return tokenless(turns, stop, reward=accuracy, accuracy=accuracy, prediction="4", metrics={"tool_calls": 1.0})


def test_answers_come_back_and_are_counted_once(tmp_path):
    journal = Journal(tmp_path, "j", {"model": "m"})
    assert journal.get("a") is None
    journal.put("a", {"text": "\ud800 half a pair"})
    journal.put("b", [1], calls=3)
    assert journal.get("b") == [1] and journal.found == 0  # of this run: nothing is saved by it
    journal.close()
    again = Journal(tmp_path, "j", {"model": "m"})
    assert again.get("b") == [1] == again.get("b") and again.get("a")
    assert (again.found, again.saved) == (2, 4)
    again.close()
    other = Journal(tmp_path, "j", {"model": "another"})
    assert other.get("a") is None and other.path != again.path
    other.close()


@pytest.mark.parametrize("cut", [1, 5, 12, 30])
def test_a_line_cut_by_a_kill_is_dropped_and_the_next_one_is_whole(tmp_path, cut):
    journal = Journal(tmp_path, "j", {})
    journal.put("a", 1)
    journal.put("b", "x" * 20)
    journal.close()
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-cut])
    again = Journal(tmp_path, "j", {})
    assert again.get("a") == 1 and again.get("b") is None
    again.put("b", "new")
    again.close()
    assert [json.loads(line).get("key") for line in journal.path.read_text().splitlines()] == [None, "a", "b"]


def test_a_damaged_line_and_a_second_writer_are_told(tmp_path):
    journal = Journal(tmp_path, "j", {})
    with pytest.raises(UserError, match="another command is using it"):
        Journal(tmp_path, "j", {})
    journal.close()
    with journal.path.open("a") as file:
        file.write("not json\n")
    with pytest.raises(UserError, match=r"line 2 is damaged .*delete that line"):
        Journal(tmp_path, "j", {})


def test_episodes_are_played_once_and_aborted_ones_again(tmp_path):
    played = []

    async def play(task, *, position, sample, attempt):
        played.append(sample)
        return trajectory("aborted" if sample == 1 else "answer")

    def episode(journal, task, sample):
        return asyncio.run(remembered(play, journal)(task, position=0, sample=sample, attempt=0))

    journal = Journal(tmp_path, "j", {})
    first = episode(journal, TASK, 0)
    assert episode(journal, TASK, 1).aborted
    journal.close()
    again = Journal(tmp_path, "j", {})
    back = episode(again, TASK, 0)
    episode(again, TASK, 1)
    assert played == [0, 1, 1]
    assert back.turns == first.turns and back.metrics == first.metrics and back.prediction == "4"
    assert (again.found, again.saved) == (1, 2)  # one episode of two calls
    reworded = Task(TASK.id, [Message("user", "Two and two?")], "4", "p")
    episode(again, reworded, 0)
    assert played == [0, 1, 1, 0]  # the same id with another prompt is another problem
    again.close()


def test_a_record_holds_all_but_the_tokens():
    t = trajectory()
    back = from_record(json.loads(json.dumps(to_record(t))))
    assert back.turns == t.turns and len(back.tokens) == 0
    assert (back.stop, back.reward, back.accuracy, back.metrics) == (t.stop, t.reward, t.accuracy, t.metrics)


def test_an_engine_that_remembers_answers_the_same_request_without_generating(tmp_path):
    class Engine:
        asked = 0
        finish = "stop"

        async def generate(self, ids, sampling, *, session=""):
            self.asked += 1
            new = np.array([7, 8], np.int32)
            return Completion(new, np.zeros(2, np.float32), self.finish, np.zeros(2, np.int32))

        async def update_weights(self, path, version): ...

        async def release(self, session): ...

    def ask(journal, ids, seed):
        return asyncio.run(RememberingEngine(engine, journal).generate(ids, Sampling(9, seed=seed), session="s"))

    engine = Engine()
    journal = Journal(tmp_path, "j", {})
    ask(journal, [1, 2], 0)
    engine.finish = "abort"
    ask(journal, [3], 0)
    journal.close()
    journal = Journal(tmp_path, "j", {})
    found = ask(journal, [1, 2], 0)
    assert engine.asked == 2 and found.ids.tolist() == [7, 8] and np.isnan(found.logprobs).all()
    for ids, seed in (([1, 2], 1), ([1], 0), ([3], 0)):  # another draw, another prefix, an aborted one: asked
        ask(journal, ids, seed)
    assert engine.asked == 5 and journal.saved == 1
    journal.close()
