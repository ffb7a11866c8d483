"""A taskset of `verifiers` with a toolset, hooks and rewards, played by our loop and by `verifiers`' own scoring."""

import asyncio
import json
import pathlib
import re

import pytest

from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.data.prompts import read_tasks, write_tasks
from open_agentrl_jax.types import Message, Sampling, Task, UserError
from tests.serve.test_streaming import Continuing

vf = pytest.importorskip("verifiers.v1", reason="the extra [verifiers]")
from open_agentrl_jax.agent.verifiers_environment import Verifiers, problems  # noqa: E402


class Shelf(vf.Toolset[vf.ToolsetConfig]):
    async def setup_task(self, task):
        self.book = task.book

    @vf.tool
    async def find(self, room: str) -> str:
        """Finds a book."""
        if room == "cellar":
            raise ValueError("it is dark")
        return f"{self.book} lies in the {room}"


class Bare(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = None

    @vf.tool
    async def count(self, word: str) -> int:
        """Counts letters."""
        return len(word)


class Row(vf.TaskData):
    book: str = ""


class Riddle(vf.Task[Row]):
    @classmethod
    def toolsets(cls, config):
        return [Shelf(vf.ToolsetConfig())]

    async def setup(self, trace, runtime):
        await runtime.write("seen", b"yes")

    @vf.reward(weight=0.5)
    async def right(self, trace) -> float:
        return float(self.data.book in trace.last_reply)

    @vf.reward(weight=0.25)
    async def looked(self, trace, runtime) -> float:
        assert await runtime.read("seen") == b"yes"
        return float(sum("lies in" in message.content for message in trace.tool_messages))

    @vf.metric
    async def turns(self, trace) -> float:
        return float(trace.num_turns)


class Riddles(vf.Taskset[Riddle]):
    @classmethod
    def toolsets(cls, config):
        return [Bare(vf.ToolsetConfig())]

    def load(self):
        for name in ("Emma", "Ulysses"):
            yield Riddle(Row(id=name, prompt="Which book is it?", system_prompt="Look first.", book=name))


class Broken(Riddle):
    @vf.reward
    async def right(self, trace) -> float:
        raise ValueError("the judge is away")


class Absent(Riddle):
    async def setup(self, trace, runtime):
        raise OSError("no such shelf")


class Stopping(Riddle):
    @vf.stop
    async def enough(self, trace) -> bool:
        return True


def taskset(kind=Riddle):
    made = Riddles(vf.TasksetConfig(id="riddles"))
    if kind is not Riddle:
        made.load = lambda: [kind(Row(prompt="Which?", book="Emma"))]
    return made


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def play(tokenizer, task, make, *said):
    environment = make([], None, shorten=str, session="s")
    chat = Chat(tokenizer, environment.tools)
    budget = episode.Budget(8, 4000)
    return chat, asyncio.run(
        episode.run(Continuing(chat, *said), environment, chat, task, Sampling(0), budget, session="s")
    )


def test_a_taskset_is_a_data_set(tmp_path):
    tasks = problems(taskset())
    assert [task.id for task in tasks] == ["verifiers/Emma", "verifiers/Ulysses"]
    assert tasks[0].messages == [Message("system", "Look first."), Message("user", "Which book is it?")]
    write_tasks(tmp_path / "riddles.parquet", tasks)
    back = read_tasks(tmp_path / "riddles.parquet")
    assert [(t.messages, t.answer) for t in back] == [(t.messages, t.answer) for t in tasks]


def test_its_tools_and_rewards_are_played(tokenizer, tmp_path):
    make = Verifiers(taskset())
    task = problems(taskset())[1]
    turn = call("shelf_find", room="attic") + call("shelf_find", room="cellar") + call("count", word="seven")
    chat, played = play(tokenizer, task, make, turn, call("shelf_find"), "It is Ulysses.")
    assert [schema["function"]["name"] for schema in chat.tools] == ["count", "shelf_find"]
    assert chat.tools[1]["function"]["parameters"]["required"] == ["room"]
    assert played.turns[0].tool_statuses == ["ok", "error", "ok"]
    found, dark, counted = played.turns[0].tool_outputs
    assert found == "Ulysses lies in the attic" and "Error" in dark and counted == "5"
    assert played.turns[1].tool_statuses == ["error"] and "room" in played.turns[1].tool_outputs[0]
    assert (played.stop, played.reward, played.accuracy) == ("answer", 0.75, 0.75)
    _, wrong = play(tokenizer, task, make, "It is Emma.")
    assert (wrong.reward, wrong.accuracy) == (0.0, 0.0)


def test_the_example_of_the_docs(tokenizer, tmp_path, monkeypatch):
    page = (pathlib.Path(__file__).parents[2] / "docs/extending.md").read_text()
    (block,) = [block for block in re.findall(r"```py\n(.*?)```", page, flags=re.S) if "Verifiers" in block]
    names = {"__name__": "__main__"}
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/extending.md", "exec"), names)
    task = read_tasks("words.parquet")[1]
    _, played = play(tokenizer, task, names["make"], "It is v-a-l-v-e.")
    assert played.reward == 1.0


@pytest.mark.parametrize("kind", [Broken, Absent])
def test_hooks_that_fail_are_not_the_models(tokenizer, kind):
    (task,) = problems(taskset(kind))
    _, played = play(tokenizer, task, Verifiers(taskset(kind)), "It is Emma.")
    assert played.aborted and played.reward == 0.0


def test_a_chat_has_the_tools_of_all_tasks_and_no_reward(tokenizer):
    task = Task("chat-0", [Message("user", "How long is it?")], None)
    _, played = play(tokenizer, task, Verifiers(taskset()), call("count", word="seven"), "Five.")
    assert played.turns[0].tool_outputs == ["5"] and played.stop == "answer" and played.reward == 0.0


def test_what_is_not_played_is_refused():
    with pytest.raises(UserError, match="verifiers task Stopping: stops or rewrites conversations"):
        Verifiers(taskset(Stopping))
    elsewhere = taskset()
    elsewhere.toolsets = lambda config: [Bare(vf.ToolsetConfig(url="http://elsewhere/mcp"))]
    with pytest.raises(UserError, match="verifiers toolset Bare: runs elsewhere"):
        Verifiers(elsewhere)
    environment = Verifiers(taskset())([], None)
    with pytest.raises(UserError, match="is not in the taskset"):
        asyncio.run(environment.reset(problems(taskset(Broken))[0]))
