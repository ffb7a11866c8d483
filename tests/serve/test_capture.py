"""The capturing endpoint, with the real `openai` client against a scripted engine."""

import asyncio
import contextlib

import numpy as np
import openai
import pytest

from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.environment import ToolEnvironment, ToolResult, ungraded
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.agent.transcript import GIVES_UP, PARALLEL, Chats, Transcript
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.serve.capture import Capture
from open_agentrl_jax.types import Message, Sampling, Task

from .speaker import Speaker

TOOLS = [PythonTool.schema]
CALL = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(%s)"}}\n</tool_call>'
ASK = [{"role": "user", "content": "Ada has 3 bags of 4. How many?"}]


@pytest.fixture
def chat(tokenizer):
    return Chat(tokenizer, TOOLS)


@contextlib.asynccontextmanager
async def episode_of(engine, chat, *, max_turns=16, max_response=400, max_prompt=200, max_sampled=0):
    """A client of an episode's own, and the transcript."""
    capture = Capture()
    budget = episode.Budget(max_turns, max_response)
    limits = {"max_prompt": max_prompt, "session": "s", "max_sampled": max_sampled}
    transcript = Transcript(engine, Chats(chat), Sampling(0, seed=7), budget, **limits)
    access = await capture.open(transcript)
    client = openai.AsyncOpenAI(base_url=access.url, api_key=access.key, max_retries=0)
    try:
        yield client, transcript
    finally:
        await client.close()
        await capture.close()


async def ask(client, messages, **fields):
    return await client.chat.completions.create(model="policy", messages=messages, **fields)


async def agent_loop(client, stream=False):
    """What the scripts of other people do: call tools until there is an answer, and send all of it back each time."""
    messages = list(ASK)
    while True:
        if stream:
            content, calls = "", {}
            async for chunk in await ask(client, messages, tools=TOOLS, stream=True):
                delta = chunk.choices[0].delta
                content += delta.content or ""
                for call in delta.tool_calls or []:
                    calls[call.index] = call.model_dump(exclude_none=True, exclude={"index"})
            messages.append({"role": "assistant", "content": content or None, "tool_calls": list(calls.values())})
        else:
            message = (await ask(client, messages, tools=TOOLS)).choices[0].message
            messages.append(message.model_dump(exclude_none=True))
        if not messages[-1].get("tool_calls"):
            return messages[-1]["content"]
        for call in reversed(messages[-1]["tool_calls"]):  # results in another order than the calls
            result = "12" if "3 * 4" in call["function"]["arguments"] else "7"
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})


TURNS = ("Let me see. " + CALL % "3 * 4" + "\n" + CALL % "7", CALL % "3 * 4", "So it is 12.")


async def own_loop(chat):
    class Interpreter:
        name, schema = "code_interpreter", PythonTool.schema

        async def __call__(self, call, *, session=""):
            return ToolResult("12" if "3 * 4" in call.arguments["code"] else "7")

    task = Task("t", [Message("user", ASK[0]["content"])], "12")
    environment = ToolEnvironment([Interpreter()], ungraded)
    budget = episode.Budget(16, 400)
    return await episode.run(Speaker(chat, *TURNS), environment, chat, task, Sampling(0, seed=7), budget, session="s")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_foreign_loop_gives_the_tokens_of_our_own_loop(chat, stream):
    expected = await own_loop(chat)
    async with episode_of(Speaker(chat, *TURNS), chat) as (client, transcript):
        assert await agent_loop(client, stream) == "So it is 12."
        made = await transcript.close("answer")
    (sequence,) = made.sequences
    for name in ("tokens", "loss_mask", "logprobs", "versions"):
        np.testing.assert_array_equal(getattr(sequence, name), getattr(expected, name))
    shared = (
        "response_length",
        "prompt_length",
        "tool_tokens",
        "num_turns",
        "tool_calls",
        "tool_success",
        "first_call",
    )
    assert {name: made.metrics[name] for name in shared} == {name: expected.metrics[name] for name in shared}
    assert made.said == expected.said
    assert made.metrics["retokenised"] == made.metrics["trained_twice"] == made.metrics["refused"] == 0


async def test_rewritten_history_begins_a_new_sequence_of_the_same_episode(chat):
    async with episode_of(Speaker(chat, "one", "two", "three"), chat) as (client, transcript):
        first = (await ask(client, ASK)).choices[0].message.content
        said = [*ASK, {"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
        await ask(client, said)
        compacted = [{"role": "user", "content": "Summary: one. And now?"}]
        await ask(client, compacted)
        made = await transcript.close("answer")
    assert [len(s.turns) for s in made.sequences] == [2, 1] and made.metrics["forks"] == 0
    ids = chat.encode("one")
    first, second = made.sequences
    at = next(i for i in range(len(first.tokens)) if first.tokens[i : i + len(ids)].tolist() == ids)
    assert first.loss_mask[at : at + len(ids)].all()
    sampled = sum(int(s.loss_mask.sum()) for s in made.sequences)
    assert sampled == sum(len(chat.encode(text)) + 1 for text in ("one", "two", "three"))
    assert (
        second.tokens[0] == first.tokens[0] and not second.loss_mask[: len(chat.prompt([Message("user", "S")]))].any()
    )


async def test_a_fork_repeats_the_tokens_and_trains_only_what_is_new(chat):
    async with episode_of(Speaker(chat, "one", "two", "other"), chat) as (client, transcript):
        said = [*ASK, {"role": "assistant", "content": (await ask(client, ASK)).choices[0].message.content}]
        await ask(client, [*said, {"role": "user", "content": "Left?"}])
        await ask(client, [*said, {"role": "user", "content": "Right?"}])
        made = await transcript.close("answer")
    left, right = made.sequences
    shared = len(chat.showing([]).prompt([Message("user", ASK[0]["content"])])) + len(chat.encode("one")) + 1
    np.testing.assert_array_equal(left.tokens[:shared], right.tokens[:shared])
    assert left.loss_mask[:shared].any() and not right.loss_mask[:shared].any()
    assert chat.decode(right.tokens[right.loss_mask].tolist()) == "other"
    assert made.metrics["forks"] == 1 and made.metrics["trained_twice"] == 0


async def test_parallel_requests_are_sequences_with_draws_of_their_own(chat):
    engine = Speaker(chat, *"abcd")
    seeds = []
    generate = engine.generate

    async def watched(ids, sampling, *, session=""):
        seeds.append((session, sampling.seed))
        return await generate(ids, sampling, session=session)

    engine.generate = watched
    async with episode_of(engine, chat) as (client, transcript):
        await asyncio.gather(*(ask(client, ASK) for _ in range(4)))
        made = await transcript.close("answer")
    assert len(made.sequences) == len(set(seeds)) == 4 and ("s", 7) in seeds
    assert sorted(engine.released) == sorted(session for session, _ in seeds)


async def test_stop_texts_end_an_answer_and_are_left_out(chat):
    async with episode_of(Speaker(chat, "So it is 12. STOP it is 13.", "fine"), chat) as (client, transcript):
        answer = await ask(client, ASK, stop=["STOP"])
        assert answer.choices[0].message.content == "So it is 12." and answer.choices[0].finish_reason == "stop"
        await ask(client, [*ASK, {"role": "assistant", "content": "So it is 12."}, {"role": "user", "content": "?"}])
        made = await transcript.close("answer")
    (sequence,) = made.sequences
    text = chat.decode(sequence.tokens.tolist())
    assert "STOP<|im_end|>" in text and "it is 13" not in text
    end = int(np.flatnonzero(~sequence.loss_mask & (np.cumsum(sequence.loss_mask) > 0))[0])
    assert sequence.tokens[end] == chat.turn_end  # added by the template's rule, so not trained


async def test_the_responses_api_gives_the_same_sequence(chat):
    tools = [{"type": "function", **PythonTool.schema["function"]}]
    expected = await own_loop(chat)
    for stream in (False, True):
        async with episode_of(Speaker(chat, *TURNS), chat) as (client, transcript):
            items, previous = list(ASK), None
            while True:
                fields = {"model": "policy", "input": items, "tools": tools, "previous_response_id": previous}
                if stream:
                    async with client.responses.stream(**{k: v for k, v in fields.items() if v}) as events:
                        response = await events.get_final_response()
                else:
                    response = await client.responses.create(**fields)
                calls = [item for item in response.output if item.type == "function_call"]
                if not calls:
                    break
                if stream:
                    previous, items = response.id, []
                else:
                    items += [item.model_dump(exclude_none=True) for item in response.output]
                for call in calls:
                    output = "12" if "3 * 4" in call.arguments else "7"
                    items.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
            assert response.output_text == "So it is 12."
            (sequence,) = (await transcript.close("answer")).sequences
        np.testing.assert_array_equal(sequence.tokens, expected.tokens)


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}]


@pytest.mark.parametrize(
    ("fields", "error", "reason", "message"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "client_model", "OPENAI_MODEL=policy"),
        ({"messages": IMAGE}, openai.BadRequestError, "client_images", "text only"),
        ({"n": 2}, openai.BadRequestError, "client_request", "n: only 1"),
        ({"tool_choice": "required"}, openai.BadRequestError, "client_request", "tool_choice"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "client_request", "response_format"),
        (
            {"messages": [{"role": "tool", "tool_call_id": "x", "content": ""}]},
            openai.BadRequestError,
            "client_request",
            "no call",
        ),
        ({"messages": [{"role": "user", "content": "word " * 900}]}, openai.BadRequestError, "length", "the limit is"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(chat, fields, error, reason, message):
    async with episode_of(Speaker(chat), chat) as (client, transcript):
        with pytest.raises(error, match=message):
            await client.chat.completions.create(**{"model": "policy", "messages": ASK, **fields})
        assert transcript.last_refusal == reason and not transcript.hopeless.is_set()


async def test_after_the_budget_every_request_is_refused_until_the_client_is_given_up(chat):
    async with episode_of(Speaker(chat, "one"), chat, max_turns=1) as (client, transcript):
        await ask(client, ASK)
        for _ in range(GIVES_UP):
            assert not transcript.hopeless.is_set()
            with pytest.raises(openai.BadRequestError, match="the episode is over"):
                await ask(client, ASK)
        assert transcript.hopeless.is_set()
        made = await transcript.close("turns")
    assert len(made.turns) == 1 and made.metrics["refused"] == GIVES_UP


async def test_sampled_tokens_have_a_budget(chat):
    async with episode_of(Speaker(chat, "a b c d e f g h", "x"), chat, max_sampled=5) as (client, _):
        answer = await ask(client, ASK)
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 5
        with pytest.raises(openai.BadRequestError, match="has sampled its 5 tokens"):
            await ask(client, ASK)


async def test_a_flood_is_refused_and_nothing_hangs(chat):
    engine = Speaker(chat, *["x"] * PARALLEL)
    engine.gate = asyncio.Event()
    async with episode_of(engine, chat) as (client, transcript):
        running = [asyncio.ensure_future(ask(client, ASK)) for _ in range(PARALLEL)]
        while transcript._running < PARALLEL:
            await asyncio.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="are running"):
            await ask(client, ASK)
        assert transcript.last_refusal == "client_flood"
        engine.gate.set()
        await asyncio.gather(*running)
        assert transcript.last_refusal == ""


async def test_a_key_opens_its_own_episode_only(chat):
    async with episode_of(Speaker(chat, "one"), chat) as (client, _), episode_of(Speaker(chat), chat) as (other, _):
        stranger = openai.AsyncOpenAI(base_url=client.base_url, api_key=other.api_key, max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="unknown episode or key"):
            await ask(stranger, ASK)
        await stranger.close()
        assert (await client.models.list()).data[0].id == "policy"


async def test_a_failing_engine_is_no_mistake_of_the_client(chat):
    async with episode_of(Speaker(chat, EngineError("away"), "one"), chat) as (client, transcript):
        with pytest.raises(openai.InternalServerError, match="away"):
            await ask(client, ASK)
        assert transcript.failed and transcript.last_refusal == ""
        await ask(client, ASK)
        assert not transcript.failed
        assert len((await transcript.close("answer")).sequences) == 1
