"""A real MCP server in a process of its own: its tools are our tools, its failures are not the model's."""

import asyncio
import pathlib
import re
import sys

import pytest

from open_agentrl_jax.agent.environment import ToolEnvironment, ungraded
from open_agentrl_jax.types import Message, Task, ToolCall, UserError

pytest.importorskip("mcp", reason="the extra [mcp]")
from open_agentrl_jax.agent.mcp_tool import open_server

SERVER = pathlib.Path(__file__).with_name("mcp_server.py")


def started(log):
    return [line for line in log.read_text().splitlines() if line.startswith("start")]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log of the server"


@pytest.fixture
def tools(log, monkeypatch):
    monkeypatch.setenv("SHELF", "on shelf 4")
    opened = open_server(f"{sys.executable} {SERVER} '{log}'", deadline=1.0)
    yield {tool.name: tool for tool in opened}
    for tool in opened:
        tool.stop()


def test_its_tools_are_ours(tools, log):
    assert list(tools) == ["search", "hang", "die"]
    schema = tools["search"].schema
    assert schema["type"] == "function"
    assert schema["function"]["name"] == "search" and schema["function"]["description"] == "Finds a book."
    assert schema["function"]["parameters"]["type"] == "object"
    assert schema["function"]["parameters"]["required"] == ["query"]

    async def turn(*calls):
        environment = ToolEnvironment(list(tools.values()), ungraded)
        await environment.reset(Task("t", [], None))
        return await environment.step(Message("assistant", "", list(calls)))

    # Two loops one after the other: the server belongs to none of them.
    both = asyncio.run(
        turn(ToolCall("search", {"query": "Emma"}), ToolCall("search", {"query": "Ulysses", "limit": 2}))
    )
    assert [message.content for message in both.messages] == [
        "1 found: Emma on shelf 4",
        "2 found: Ulysses on shelf 4",
    ]
    assert [result.status for result in both.results] == ["ok", "ok"] and not both.failed
    wrong = asyncio.run(
        turn(ToolCall("search", {"query": "nothing"}), ToolCall("search", {}), ToolCall("search", {"query": 3}))
    )
    assert [result.status for result in wrong.results] == ["error"] * 3 and not wrong.failed
    assert "no such book" in wrong.messages[0].content and "query" in wrong.messages[1].content
    asyncio.run(tools["search"].close())
    asyncio.run(tools["die"].close())
    assert log.read_text().splitlines()[1:] == ["end"] and len(started(log)) == 1


def test_what_the_server_does_wrong_is_not_the_models(tools, log):
    async def both():
        late = await tools["hang"](ToolCall("hang", {"seconds": 30}))
        dead = await tools["die"](ToolCall("die"))
        again = await tools["search"](ToolCall("search", {"query": "Emma"}))
        return late, dead, again

    late, dead, again = asyncio.run(both())
    assert late.status == "infrastructure" and 1 <= late.seconds < 3
    assert dead.status == "infrastructure"
    assert again.status == "ok" and "Emma" in again.text
    assert len(started(log)) == 2


def test_the_example_of_the_docs():
    page = (pathlib.Path(__file__).parents[2] / "docs/extending.md").read_text()
    (block,) = [block for block in re.findall(r"```py\n(.*?)```", page, flags=re.S) if "open_server" in block]
    names = {}
    exec(compile(block, "docs/extending.md", "exec"), names)
    assert names["stock"].schema["function"]["description"] == "How many of a part are there?"
    assert asyncio.run(names["ask"]()).text == "3"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("no-such-program-here", "no-such-program-here"),
        (f"{sys.executable} -c 'import sys; sys.exit(1)'", "see that the command starts by hand"),
        ("'half", "No closing quotation"),
    ],
)
def test_a_server_that_does_not_start(command, told):
    with pytest.raises(UserError, match=r"agent\.tools=mcp:") as raised:
        open_server(command)
    assert told in str(raised.value) and "\n" not in str(raised.value)
