"""Watching an answer: what is told, in which order, and that the trajectory is the unwatched one."""

import numpy as np
import pytest

from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.calls import FORMATS
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.environment import ToolEnvironment, ToolResult, ungraded
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.serve.streaming import PIECE, Event, reply, spoken
from open_agentrl_jax.types import Completion, Message, Sampling

CALL = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(3 * 4)"}}\n</tool_call>'


class Continuing:
    """An engine that says given texts, one a turn, as many tokens at a time as it is asked for."""

    def __init__(self, chat, *texts):
        self.turns = [[*chat.encode(text), chat.turn_end] for text in texts]
        self.said, self.released, self.asked, self.chat = [], [], [], chat

    async def generate(self, ids, sampling, *, session=""):
        self.asked.append(sampling.max_tokens)
        script, spoken = self.turns[0], len(self.said)
        piece = script[spoken : spoken + sampling.max_tokens]
        if spoken:
            assert list(ids[-spoken:]) == self.said
        self.said = [*self.said, *piece]
        done = len(self.said) == len(script)
        if done:
            self.turns.pop(0)
            self.said = []
        n = len(piece)
        array = np.array(piece, np.int32)
        return Completion(array, -array.astype(np.float32), "stop" if done else "length", np.full(n, 5, np.int32))

    async def update_weights(self, path, version): ...

    async def release(self, session):
        self.released.append(session)


class Interpreter:
    name = "code_interpreter"
    schema = PythonTool.schema

    async def __call__(self, call, *, session=""):
        assert call.arguments["code"] == "print(3 * 4)"
        return ToolResult("12")


@pytest.fixture
def chat(tokenizer):
    return Chat(tokenizer, [PythonTool.schema])


async def watch(chat, *texts, budget=None):
    events = []

    async def listen(event):
        events.append(event)

    engine = Continuing(chat, *texts)
    history = [Message("user", "Ada has 3 packs of 4 cards. How many?")]
    budget = budget or episode.Budget(4, 400)
    world = ToolEnvironment([Interpreter()], ungraded)
    played = await reply(engine, chat, world, history, Sampling(0), budget, listen, session="s")
    return played, played.said, events, engine


async def test_words_calls_and_outputs_are_told_in_order(chat):
    trajectory, said, events, engine = await watch(chat, f"I compute it.\n{CALL}", "The answer is \\boxed{12}.")
    kinds = [event.kind for event in events]
    merged = [kind for i, kind in enumerate(kinds) if not i or kind != kinds[i - 1]]
    assert merged == ["text", "call", "output", "text"]
    assert Event("call", "print(3 * 4)") in events and Event("output", "12") in events
    words = "".join(event.text for event in events if event.kind == "text")
    assert words.replace("\n", "") == "I compute it.The answer is \\boxed{12}."
    assert sum(kind == "text" for kind in kinds) > 3  # it streams
    assert max(engine.asked) <= PIECE and engine.released == ["s"]
    assert [m.role for m in said] == ["assistant", "tool", "assistant"] and said[0].content.endswith("</tool_call>")
    assert trajectory.stop == "answer" and trajectory.metrics["tool_success"] == 1


async def test_the_trajectory_has_every_token_once(chat):
    text = f"I compute it.\n{CALL}"
    trajectory, *_ = await watch(chat, text, "12")
    expected = [*chat.encode(text), chat.turn_end, *chat.encode("12"), chat.turn_end]
    assert trajectory.tokens[trajectory.loss_mask].tolist() == expected
    assert (trajectory.logprobs[trajectory.loss_mask] == -np.array(expected, np.float32)).all()
    assert (trajectory.versions[trajectory.loss_mask] == 5).all()


async def test_the_budget_holds(chat):
    trajectory, *_ = await watch(chat, "one two three four five six seven eight nine", budget=episode.Budget(4, 11))
    assert trajectory.stop == "length" and trajectory.loss_mask.sum() == 11


async def test_a_call_that_cannot_be_read_is_told_with_its_reason(chat):
    *_, events, _ = await watch(chat, "<tool_call>nonsense</tool_call>", "Well.")
    assert [event.kind for event in events[:2]] == ["output", "text"] and "not valid JSON" in events[0].text


@pytest.mark.parametrize(
    ("text", "ended", "words"),
    [
        ("So <tool", False, "So "),
        ("So <tool", True, "So <tool"),
        ("So <tool_call>{", False, "So "),
        ("a < b", False, "a < b"),
        ("a <", False, "a "),
        ("na\ufffd", False, "na"),
        ("", False, ""),
    ],
)
def test_what_may_become_a_tag_is_held_back(text, ended, words):
    assert spoken(text, ended=ended) == words


@pytest.mark.parametrize(
    ("format", "text", "ended", "words"),
    [
        ("llama_json", '<think>so</think>{"name": "f"', False, "<think>so</think>"),
        ("llama_json", '{"na', False, ""),
        ("llama_json", "It is {1}.", False, "It is {1}."),
        ("pythonic", "[f(", True, ""),
        ("pythonic", "See [1]", False, "See [1]"),
    ],
)
def test_a_turn_that_is_a_call_is_hidden(format, text, ended, words):
    assert spoken(text, FORMATS[format], ended=ended) == words
