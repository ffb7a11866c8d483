"""Names in a config become tools, grader, environment and reader; what plays and what is shown comes from them."""

import asyncio
import importlib
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.config import Config, validate
from open_agentrl_jax.data import synthetic
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.players import Player
from open_agentrl_jax.run.world import load, open_world, reader_of
from open_agentrl_jax.types import Message, Sampling, Task, UserError
from tests.launch.runs import ROOT
from tests.serve.test_streaming import Continuing

MINE = """
from open_agentrl_jax.agent.environment import ToolEnvironment, ToolResult
from open_agentrl_jax.data.prompts import Problem
from open_agentrl_jax.types import Score

closed = []

class Search:
    name = "lookup"
    schema = {"type": "function", "function": {"name": "lookup", "description": "", "parameters": {"type": "object"}}}
    async def __call__(self, call, *, session=""):
        return ToolResult(f"{call.arguments['query']} in {session}")
    async def close(self):
        closed.append("tool")

class Nameless:
    def __call__(self):
        pass

async def grader(task, text):
    return Score(0.25, 1.0, text)

class Noting(ToolEnvironment):
    async def close(self):
        closed.append("environment")

def read(row):
    return Problem(row["riddle"], row["word"], "riddles")

number = 3
"""
CALL = '<tool_call>\n{"name": "lookup", "arguments": {"query": "pump"}}\n</tool_call>'


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("mine")
    del sys.modules["mine"]


@pytest.fixture(scope="module")
def tokenizer():
    return synthetic.train_tokenizer(synthetic.corpus(0, 300))


def play(config, tokenizer, *said):
    world = open_world(config)
    try:
        chat = Chat(tokenizer, world.schemas)
        player = Player(config, Continuing(chat, *said), chat, world, Sampling(0), "rl")
        task = Task("t", [Message("user", "When does the pump start?")], "40")
        return chat, asyncio.run(player(task, position=2, sample=1, attempt=0))
    finally:
        asyncio.run(world.close())


def test_one_line_each_and_they_play(mine, tokenizer):
    config = Config()
    config.reward.overlong_buffer = 0
    config.agent.tools = ("python", "mine:Search")
    config.agent.environment, config.reward.grader = "mine:Noting", "mine:grader"
    assert validate(config) == []
    chat, played = play(config, tokenizer, CALL, "At 40 bar.")
    assert [schema["function"]["name"] for schema in chat.tools] == ["code_interpreter", "lookup"]
    assert played.turns[0].tool_outputs == ["pump in rl-2-1-0"]
    assert (played.reward, played.accuracy, played.prediction) == (0.25, 1.0, "At 40 bar.")
    assert mine.closed == ["environment", "tool"]


def test_an_mcp_server_is_one_line(tmp_path, tokenizer):
    pytest.importorskip("mcp", reason="the extra [mcp]")
    config = Config()
    config.agent.tools = (f"mcp:{sys.executable} {ROOT}/tests/agent/mcp_server.py {tmp_path / 'log'}",)
    assert validate(config) == []
    chat, played = play(config, tokenizer, CALL.replace("lookup", "search"), "So it is.")
    assert [schema["function"]["name"] for schema in chat.tools] == ["search", "hang", "die"]
    assert played.turns[0].tool_outputs == ["1 found: pump "] and played.stop == "answer"
    assert (tmp_path / "log").read_text().split() == ["start", "end"]
    config.agent.tools *= 2
    with pytest.raises(UserError, match="there are two tools called"):
        open_world(config)


def test_without_tools_none_is_opened_or_shown():
    config = Config()
    config.agent.tools = ("mcp:no-such-program",)
    world = open_world(config, tools=False)
    assert world.tools == world.schemas == []
    asyncio.run(world.close())


def test_a_data_format_of_ones_own(mine, tmp_path, tokenizer):
    (tmp_path / "riddles.jsonl").write_text('{"riddle": "What has keys and opens no door?", "word": "piano"}\n')
    config = Config()
    config.data.format = "mine:read"
    assert reader_of(Config()) == "auto" and reader_of(config) is mine.read
    chat = Chat(tokenizer)
    (task,), _ = inputs.problems(config, str(tmp_path / "riddles.jsonl"), chat, evaluation=False)
    assert task.answer == "piano" and task.source == "riddles" and "opens no door" in task.messages[0].content


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere:Search", "No module named 'nowhere'"),
        ("mine:Nothing", "has no attribute 'Nothing'"),
        ("mine:number", "is a int; name a function or a class"),
        ("mine", "write 'module:name'"),
    ],
)
def test_names_that_lead_nowhere(mine, name, told):
    with pytest.raises(UserError, match=told) as raised:
        load("agent.tools", name)
    assert str(raised.value).startswith(f"agent.tools={name}: ") and "\n" not in str(raised.value)


def test_what_is_no_tool(mine):
    config = Config()
    config.agent.tools = ("mine:Nameless",)
    with pytest.raises(UserError, match=r"agent\.tools=mine:Nameless: made a Nameless; a tool has a name"):
        open_world(config)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("agent.tools", "python", "agent.tools is 'python'; it must be a tuple"),
        ("agent.tools", ("python", "bash"), "agent.tools is"),
        ("agent.tools", ("mcp: ",), "agent.tools is"),
        ("agent.environment", "mine", "agent.environment is 'mine'; write 'module:name'"),
        ("reward.grader", "mine.grader", "reward.grader is 'mine.grader'"),
    ],
)
def test_forms_are_checked_before_anything_is_opened(field, value, told):
    config = Config()
    section, leaf = field.split(".")
    setattr(getattr(config, section), leaf, value)
    assert any(told in problem for problem in validate(config))


def test_the_flag(monkeypatch):
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    tools = "('python', 'mcp:npx -y server --root=/data', 'mine:Search')"
    argv = ["command", f"--config={ROOT}/configs/quickstart.py", f"--config.agent.tools={tools}"]
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections reads it to know the fields
    values(argv)
    assert holder.value.agent.tools == ("python", "mcp:npx -y server --root=/data", "mine:Search")
    assert validate(holder.value) == []
