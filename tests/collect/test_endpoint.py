"""A teacher that errs, lies, stalls or talks nonsense: counted, told, never a hang, and never the model's mistake."""

import asyncio
import json
import time

import httpx
import pytest

from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.environment import ToolEnvironment, ToolResult
from open_agentrl_jax.agent.episode import Budget
from open_agentrl_jax.collect import endpoint
from open_agentrl_jax.collect.endpoint import ChatEndpoint, MessagePolicy, Nonsense, Reply, read_reply, wire
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.types import Message, Sampling, Score, Task, ToolCall, UserError

SAMPLING = Sampling(64, temperature=0.7, top_p=0.9, seed=5)


def completion(content="", calls=(), finish="stop", tokens=7):
    message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"id": "x", "type": "function", "function": {"name": n, "arguments": a}} for n, a in calls
        ]
    return json.dumps(
        {"choices": [{"message": message, "finish_reason": finish}], "usage": {"completion_tokens": tokens}}
    )


def server(*answers):
    """A client whose server gives these answers in turn, the last one for ever: text, status or exception."""
    asked, left = [], list(answers)

    async def handle(request):
        asked.append(request)
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            return await answer()
        return httpx.Response(answer, text="busy") if isinstance(answer, int) else httpx.Response(200, text=answer)

    client = ChatEndpoint("http://t/v1/", "m", key="k", timeout=1.0, pause=0.001, transport=httpx.MockTransport(handle))
    return client, asked


def ask(client, sampling=SAMPLING):
    async def go():
        try:
            return await client.reply([{"role": "user", "content": "?"}], [{"type": "function"}], sampling)
        finally:
            await client.close()

    return asyncio.run(go())


def test_what_is_sent():
    client, asked = server(completion("4"))
    assert ask(client) == Reply("4", [], "stop", 7)
    (request,) = asked
    body = json.loads(request.content)
    assert str(request.url) == "http://t/v1/chat/completions" and request.headers["authorization"] == "Bearer k"
    assert {k: body[k] for k in ("model", "max_tokens", "temperature", "top_p", "seed")} == {
        "model": "m", "max_tokens": 64, "temperature": 0.7, "top_p": 0.9, "seed": 5,
    }  # fmt: skip
    assert body["tools"] == [{"type": "function"}] and client.counts == {"calls": 1}


def test_what_passes_is_asked_again():
    passing = [500, 429, "<html>", httpx.ReadError("gone"), completion("  "), '{"choices": []}'][
        : endpoint.ATTEMPTS - 1
    ]
    client, asked = server(*passing, completion("4"))
    assert ask(client).content == "4" and len(asked) == len(passing) + 1
    assert client.counts["retries"] == len(passing) and client.counts["nonsense"] == 2
    assert client.counts["status 500"] == client.counts["status 429"] == client.counts["ReadError"] == 1
    assert "failed" not in client.counts


def test_what_does_not_pass_is_an_error_of_the_infrastructure():
    for answer, kind in ((503, "status 503"), ("nonsense", "nonsense"), (httpx.ConnectError("no"), "ConnectError")):
        client, asked = server(answer)
        with pytest.raises(EngineError, match=kind):
            ask(client)
        assert len(asked) == client.counts[kind] == endpoint.ATTEMPTS and client.counts["failed"] == 1
    client, asked = server(400)  # this very request is refused: too long, say
    with pytest.raises(EngineError, match="status 400"):
        ask(client)
    assert len(asked) == 1


@pytest.mark.parametrize(("status", "cure"), [(401, "OPENAI_API_KEY"), (404, "the model's name")])
def test_a_server_that_will_take_none_ends_the_command(status, cure):
    client, asked = server(status)
    with pytest.raises(UserError, match=cure):
        ask(client)
    assert len(asked) == 1


@pytest.mark.parametrize("url", ["notaurl", "host:80/v1", "ftp://host/v1", "https:///v1", "http://[::1"])
def test_an_address_that_is_no_url_is_refused_before_anything_is_sent(url):
    with pytest.raises(UserError, match="is not a URL; give one such as"):
        ChatEndpoint(url, "m")


def test_a_dead_server_ends_the_command_after_some_calls(monkeypatch):
    monkeypatch.setattr(endpoint, "IN_A_ROW", 3)
    client, _ = server(400, 400, completion("4"), 400)

    async def go():
        outcomes = []
        for _ in range(7):
            try:
                outcomes.append((await client.reply([], [], SAMPLING)).content)
            except EngineError:
                outcomes.append("failed")
        return outcomes

    with pytest.raises(UserError, match=r"3 calls in a row failed, the last with status 400 \(busy\).*same command"):
        asyncio.run(go())


def test_silence_and_endless_replies_do_not_hang(monkeypatch):
    async def silent():
        await asyncio.sleep(60)

    class Dripping(httpx.AsyncByteStream):
        async def __aiter__(self):
            while True:
                await asyncio.sleep(0)
                yield b" " * 1000

    async def endless():
        return httpx.Response(200, stream=Dripping())

    monkeypatch.setattr(endpoint, "ATTEMPTS", 2)
    monkeypatch.setattr(endpoint, "MAX_BODY", 100_000)
    for answer, kind in ((silent, "TimeoutError"), (endless, "nonsense")):
        client, _ = server(answer)
        client._timeout = 0.2
        started = time.monotonic()
        with pytest.raises(EngineError, match=kind):
            ask(client)
        assert time.monotonic() - started < 10 and client.counts[kind] == 2


def test_calls_are_read_from_the_protocol_or_from_the_text():
    reply = read_reply(completion(None, [("f", '{"code": "1\n2"}'), ("g", "{"), ("h", "[1]")], "tool_calls"))
    assert reply.calls[0] == ToolCall("f", {"code": "1\n2"})
    assert [call.name for call in reply.calls] == ["f", "g", "h"] and reply.calls[1].error and reply.calls[2].error
    hermes = read_reply(completion('Look.<tool_call>{"name": "f", "arguments": {"code": "1"}}</tool_call>'))
    assert hermes.content == "Look." and hermes.calls == [ToolCall("f", {"code": "1"})]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {"code": "1"}}</tool_call>',
        "<tool_call>\n<function=f>\n<parameter=code>\n1\n</parameter>\n</function>\n</tool_call>",
        '<|python_tag|>{"name": "f", "parameters": {"code": "1"}}',
        '[f(code="1")]',
    ],
)
def test_calls_in_the_text_are_read_in_the_format_of_any_family(text):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert read_reply(completion(text), tools).calls == [ToolCall("f", {"code": "1"})]


def test_an_answer_that_looks_like_a_call_stays_an_answer():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for text in ('{"name": "Ada", "parameters": {}}', "[g(x=1)]"):
        reply = read_reply(completion(text), tools)
        assert (reply.content, reply.calls) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        '{"choices": [{}]}',
        '{"choices": [{"message": {"content": 4}}]}',
        completion(""),
        "[" * 100_000,
    ],
)
def test_nonsense_is_known_as_such(text):
    with pytest.raises(Nonsense):
        read_reply(text)


def test_results_are_tied_to_their_calls_on_the_wire():
    calls = [ToolCall("f", {"code": "1"}), ToolCall("f", {"code": "2"})]
    sent = wire([Message("user", "?"), Message("assistant", "", calls), Message("tool", "1"), Message("tool", "2")])
    ids = [call["id"] for call in sent[1]["tool_calls"]]
    assert len(set(ids)) == 2 and [m["tool_call_id"] for m in sent[2:]] == ids
    assert json.loads(sent[1]["tool_calls"][1]["function"]["arguments"]) == {"code": "2"}


class Tool:
    name = "f"
    schema = {"type": "function"}  # noqa: RUF012
    status = "ok"

    async def __call__(self, call, *, session=""):
        return ToolResult(str(call.arguments["x"] * 2), self.status)


async def reward(task, text):
    return Score(1.0, float(task.answer in text), text)


def play(replies, budget=None, tool=None):
    seen, left = [], list(replies)

    async def teach(messages, sampling):
        seen.append((messages, sampling.max_tokens))
        reply = left.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    task = Task("t", [Message("user", "twice 3?")], "6")
    environment = ToolEnvironment([tool or Tool()], reward)
    return asyncio.run(
        episode.play(MessagePolicy(teach, SAMPLING), environment, task, budget or Budget(4, 100, 30.0))
    ), seen


CALL = Reply("Doubling.", [ToolCall("f", {"x": 3}), ToolCall("f", {"x": 4})], "tool_calls", 10)


def test_an_episode_in_messages():
    t, seen = play([CALL, Reply("It is 6", [], "stop", 5)])
    assert (t.stop, t.accuracy, t.metrics["tool_calls"], t.metrics["response_length"]) == ("answer", 1.0, 2.0, 15.0)
    assert t.turns[0].tool_outputs == ["6", "8"] and t.metrics["first_call"] == 10.0
    assert [m["role"] for m in seen[1][0]] == ["user", "assistant", "tool", "tool"]
    assert [limit for _, limit in seen] == [100, 90]


@pytest.mark.parametrize(
    ("replies", "budget", "stop"),
    [
        ([Reply("It is", [], "length", 5)], None, "length"),
        ([CALL], Budget(1, 100, 30.0), "turns"),
        ([CALL, CALL], Budget(4, 20, 30.0), "length"),
        ([CALL, EngineError("gone")], None, "aborted"),
    ],
)
def test_how_an_episode_ends(replies, budget, stop):
    t, _ = play(replies, budget)
    assert t.stop == stop and (stop != "aborted" or (t.accuracy, t.reward) == (0.0, 0.0))


def test_a_lost_sandbox_aborts_and_a_slow_teacher_runs_out_of_time():
    lost = Tool()
    lost.status = "infrastructure"
    assert play([CALL], tool=lost)[0].aborted

    async def slow(messages, sampling):
        await asyncio.sleep(30)

    task = Task("t", [Message("user", "?")], "6")
    t = asyncio.run(
        episode.play(MessagePolicy(slow, SAMPLING), ToolEnvironment([], reward), task, Budget(4, 100, 0.05))
    )
    assert t.aborted and t.metrics["timed_out"] == 1.0
