"""Talking to a model: in the terminal, and as an OpenAI client does; real processes and a real sandbox."""

import contextlib
import gzip
import io
import json
import re
import subprocess
import sys

import httpx
import pytest
from aiohttp import web
from rich.console import Console

from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.config import Config, NewModel, to_dict
from open_agentrl_jax.data import synthetic
from open_agentrl_jax.run.chat_agent import Agent, open_agent
from open_agentrl_jax.run.policy import create_model
from open_agentrl_jax.run.world import open_world
from open_agentrl_jax.serve import endpoint as chat_server
from open_agentrl_jax.serve.streaming import Event
from open_agentrl_jax.serve.terminal import printer
from open_agentrl_jax.text import printable
from open_agentrl_jax.types import UserError
from tests.launch.runs import ROOT, environment

from .test_streaming import CALL, Continuing


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A run directory with an export of random weights: it says nonsense, within its budget."""
    run = tmp_path_factory.mktemp("run")
    config = Config(name="chat")
    config.model.new = NewModel(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16)
    config.model.new.max_position_embeddings = 512
    config.agent.max_response, config.agent.max_turns, config.agent.max_prompt = 24, 2, 64
    (run / "config.json").write_text(json.dumps({"config": to_dict(config)}))
    create_model(config, run / "export")
    return run / "export"


def command(export, *flags):
    return [sys.executable, "-m", "launch.chat", f"--model={export}", *flags]


@pytest.fixture(scope="module")
def endpoint(export):
    process = subprocess.Popen(
        command(export, "--serve=0", "--slots=2"), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    url = re.match(r"(http://\S+)/v1", process.stdout.readline())[1]
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client
    process.terminate()
    process.wait(30)
    process.stdout.close()


def ask(client, **fields):
    body = {"model": "any", "messages": [{"role": "user", "content": "How many?"}], "seed": 3, **fields}
    return client.post("/v1/chat/completions", json=body)


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_client_gets_the_same_answer_whole_and_streamed(endpoint):
    assert endpoint.get("/health").json() == {"status": "ok"}
    (model,) = endpoint.get("/v1/models").json()["data"]
    whole = ask(endpoint).json()
    assert whole["model"] == model["id"] and model["id"].endswith("/export")
    (choice,) = whole["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("stop", "length")
    assert 0 < whole["usage"]["completion_tokens"] <= 24
    streamed = events(ask(endpoint, stream=True))
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in streamed)
    assert text == choice["message"]["content"]
    assert streamed[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert ask(endpoint, seed=4).json()["choices"] != whole["choices"]
    assert ask(endpoint, max_tokens=5).json()["usage"]["completion_tokens"] <= 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: missing"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last one must be the user's"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "agent.max_prompt"),
        ({"n": 2}, "n: only 1"),
        ({"tools": [{}]}, "tools: not supported"),
        ({"temperature": "hot"}, "temperature: 'hot'"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(endpoint, fields, message):
    answer = ask(endpoint, **fields)
    assert answer.status_code == 400 and re.search(message, answer.json()["error"]["message"])
    assert endpoint.post("/v1/chat/completions", content=b"{").status_code == 400


def test_the_terminal(export, tmp_path):
    typed = (
        f"How many?\nAnd now?\n/save {tmp_path / 'kept.json'}\n/reset\n/save {tmp_path / 'empty.json'}\n/help\n/quit\n"
    )
    done = subprocess.run(
        command(export), input=typed, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "forgotten" in done.stdout and "/save FILE" in done.stdout
    kept = json.loads((tmp_path / "kept.json").read_text())["messages"]
    users = [message["content"] for message in kept if message["role"] == "user"]
    assert users == ["How many?", "And now?"] and kept[1]["role"] == "assistant"
    assert json.loads((tmp_path / "empty.json").read_text()) == {"messages": []}


async def test_mistakes_are_told(export):
    with pytest.raises(UserError, match="max_response=600: the model's context is 512"):
        open_agent(str(export), slots=1, max_response=600)
    with pytest.raises(UserError, match="set CHAT_TOKEN"):
        await chat_server.serve(None, chat_server.Spec("0.0.0.0", 0, "", 1.0))


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({}, b'{"messages": ' + b"[" * 100_000, 400),
        ({"Content-Type": "application/json; charset=bogus"}, b"\xff{", 400),
        ({}, json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode(), 400),
        ({"Content-Encoding": "gzip"}, b"not gzip", 415),
        ({"Content-Encoding": "gzip"}, gzip.compress(b"{}", mtime=0), 415),
        ({"Content-Type": "text/plain"}, b"{}", 415),
        ({"Host": "evil.example"}, b"{}", 403),
        ({"Host": "evil.example:80@localhost"}, b"{}", 400),
        ({"Origin": "https://evil.example"}, b"{}", 403),
        ({"Origin": "null"}, b"{}", 403),
        ({"Origin": "http://localhost:3000"}, b"{}", 400),
        ({"Authorization": b"Bearer \xff"}, b"{}", 400),
    ],
)
async def test_odd_and_foreign_requests_are_refused(headers, content, status):
    app = chat_server.make_app(None, chat_server.Spec("127.0.0.1", 0, "", 1.0))
    async with served(app) as url, httpx.AsyncClient() as client:
        headers = {"Content-Type": "application/json", **headers}
        answer = await client.post(f"{url}/v1/chat/completions", content=content, headers=headers)
        assert answer.status_code == status, answer.text


async def test_a_token_of_odd_bytes_is_a_wrong_token():
    app = chat_server.make_app(None, chat_server.Spec("127.0.0.1", 0, "secret", 1.0))
    async with served(app) as url, httpx.AsyncClient() as client:
        for given in (b"Bearer \xff", b"", b"Bearer wrong"):
            answer = await client.get(f"{url}/v1/models", headers={"Authorization": given, "Host": "evil.example"})
            assert answer.status_code == 401


@contextlib.asynccontextmanager
async def served(app):
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def test_the_terminal_shows_no_control_characters():
    hostile = "a\x1b]52;c;ZXZpbA==\x07b\x9b2J\x7f\u202ec\n\td\r\x00é日"
    assert printable(hostile) == "a]52;c;ZXZpbA==b2Jc\n\tdé日"


async def test_events_are_printed_without_escape_sequences():
    console = Console(file=io.StringIO(), force_terminal=False)
    listen = printer(console)
    for kind in ("text", "call", "output"):
        await listen(Event(kind, "x\x1b]0;title\x07y"))
    shown = console.file.getvalue()
    assert "\x1b" not in shown and "\x07" not in shown and shown.count("x]0;titley") == 3


async def test_tool_calls_run_in_the_sandbox_and_are_shown():
    chat = Chat(synthetic.train_tokenizer(synthetic.corpus(0, 300)), [PythonTool.schema])
    config = Config()
    config.sandbox.max_active = 2
    world = open_world(config)
    turns = [f"I compute it.\n{CALL}", "The answer is 12."]
    agent = Agent(config, chat, Continuing(chat, *turns, *turns), world, "scripted")
    spec = chat_server.Spec("127.0.0.1", 0, "secret", 1.0)
    runner = web.AppRunner(chat_server.make_app(agent, spec))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]}
    try:
        async with httpx.AsyncClient(timeout=60) as client:
            assert (await client.post(url, json=body)).status_code == 401
            client.headers["Authorization"] = "Bearer secret"
            whole = (await client.post(url, json=body)).json()
            streamed = events(await client.post(url, json={**body, "stream": True}))
    finally:
        await runner.cleanup()
        await world.close()
    text = whole["choices"][0]["message"]["content"]
    assert text == "I compute it.\n\n```python\nprint(3 * 4)\n```\n```output\n12\n```\nThe answer is 12."
    assert [message["role"] for message in whole["agent"]["messages"]] == ["assistant", "tool", "assistant"]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed) == text


def test_questions_are_read():
    read = chat_server.read_question({"messages": [{"role": "user", "content": "?"}], "temperature": 0}, 0.7)
    assert read.sampling.temperature == 0 and not read.stream
    read = chat_server.read_question({"messages": [{"role": "user", "content": "?"}]}, 0.7)
    assert read.sampling.temperature == 0.7
    with pytest.raises(UserError, match="top_p: 2"):
        chat_server.read_question({"messages": [{"role": "user", "content": "?"}], "top_p": 2}, 1.0)
