"""The episode loop against a scripted engine: budgets, masks, order of the checks, failures."""

import asyncio

import numpy as np
import pytest

from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.environment import Step, ToolEnvironment, ToolResult
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.types import Completion, Message, Sampling, Score, Task, UserError

CALL = '<tool_call>\n{"name": "echo", "arguments": {"text": "%s"}}\n</tool_call>'
TASK = Task("t", [Message("user", "Ada has 1 card. How many?")], "1")


class Scripted:
    """An engine that says given texts, one a turn."""

    def __init__(self, chat, *texts):
        self.chat, self.texts, self.seen, self.released = chat, list(texts), [], []

    async def generate(self, ids, sampling, *, session=""):
        self.seen.append(list(ids))
        text = self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        said = [*self.chat.encode(text), self.chat.turn_end]
        reason = "stop" if len(said) <= sampling.max_tokens else "length"
        said = said[: sampling.max_tokens]
        return Completion(
            np.array(said, np.int32), -np.ones(len(said), np.float32), reason, np.full(len(said), 3, np.int32)
        )

    async def update_weights(self, path, version): ...

    async def release(self, session):
        self.released.append(session)


class Echo:
    name = "echo"
    schema = PythonTool.schema

    async def __call__(self, call, *, session=""):
        text = call.arguments["text"]
        await asyncio.sleep(0.05 if text == "slow" else 0)
        if text == "lost":
            return ToolResult("", "infrastructure")
        return ToolResult(text, "ok")


async def reward(task, text):
    right = task.answer in text
    return Score(1.0 if right else -1.0, float(right), text)


def play(tokenizer, *texts, budget=None, reward=reward, **kwargs):
    chat = Chat(tokenizer, [Echo.schema])
    engine = Scripted(chat, *texts)
    environment = ToolEnvironment([Echo()], reward, first_call_only=kwargs.pop("first_call_only", False))
    budget = budget or episode.Budget(max_turns=4, max_response=200, seconds=10)
    run = episode.run(engine, environment, chat, TASK, Sampling(0), budget, session="s", **kwargs)
    return asyncio.run(run), engine, chat


def test_ids_are_the_templates_and_only_sampled_tokens_train(tokenizer):
    t, engine, chat = play(tokenizer, CALL % "hi", "It is 1.")
    messages = [
        *TASK.messages,
        Message("assistant", CALL % "hi"),
        Message("tool", "hi"),
        Message("assistant", "It is 1."),
    ]
    assert t.tokens.tolist() == chat.encode(chat.render(messages, generate=False))
    trained = tokenizer.decode(t.tokens[t.loss_mask])
    assert trained == CALL % "hi" + "<|im_end|>It is 1.<|im_end|>"
    assert (t.logprobs[t.loss_mask] == -1).all() and (t.logprobs[~t.loss_mask] == 0).all()
    assert (t.versions[t.loss_mask] == 3).all() and (t.versions[~t.loss_mask] == -1).all()
    assert (t.stop, t.accuracy, t.reward) == ("answer", 1.0, 1.0)
    assert t.metrics["tool_calls"] == t.metrics["tool_success"] == 1 and t.metrics["num_turns"] == 2
    assert engine.seen[1] == engine.seen[0] + t.tokens[len(engine.seen[0]) : len(engine.seen[1])].tolist()
    assert engine.released == ["s"]


def test_calls_of_a_turn_run_side_by_side_and_answer_in_order(tokenizer):
    t, _, _ = play(tokenizer, "\n".join([CALL % "slow", CALL % "b", CALL % "slow"]), "It is 1.")
    assert t.turns[0].tool_outputs == ["slow", "b", "slow"]
    assert t.turns[0].seconds < 0.14


def test_an_unreadable_call_is_answered(tokenizer):
    t, _, _ = play(tokenizer, "<tool_call>oops</tool_call>", "It is 1.")
    assert "not valid JSON" in t.turns[0].tool_outputs[0]
    assert t.stop == "answer" and t.accuracy == 1 and t.metrics["tool_success"] == 0
    t, _, _ = play(tokenizer, "<tool_call>oops</tool_call>", unreadable_call_ends=True)  # what the reference does
    assert t.stop == "answer" and t.accuracy == 0


def test_an_unknown_tool_is_named(tokenizer):
    t, _, _ = play(tokenizer, CALL.replace("echo", "shell") % "x", "It is 1.")
    assert "no tool 'shell'; the tools are echo" in t.turns[0].tool_outputs[0]


def test_the_response_budget_ends_the_episode_first(tokenizer):
    t, _, _ = play(tokenizer, CALL % "hi", budget=episode.Budget(4, 10, 10))
    assert t.stop == "length" and t.metrics["response_length"] == 10 and t.loss_mask.sum() == 10
    t, _, _ = play(tokenizer, CALL % ("x" * 150), budget=episode.Budget(4, 260, 10))
    assert t.stop == "length" and t.turns[0].tool_outputs == ["x" * 150]
    assert tokenizer.decode(t.tokens).count("x" * 150) == 1  # the call's own; the answer did not fit and was dropped


def test_the_turn_limit_leaves_the_last_calls_unrun(tokenizer):
    t, _, _ = play(tokenizer, CALL % "a", CALL % "b", budget=episode.Budget(2, 200, 10))
    assert t.stop == "turns" and [len(turn.tool_outputs) for turn in t.turns] == [1, 0]


@pytest.mark.parametrize("texts", [(EngineError("gone"),), (CALL % "lost",)])
def test_a_failure_of_the_infrastructure_is_no_error_of_the_models(tokenizer, texts):
    """Fault 15 of the reference: a sandbox exception aborted the whole batch."""
    t, engine, _ = play(tokenizer, *texts)
    assert t.aborted and t.reward == 0 and t.accuracy == 0 and engine.released == ["s"]


def test_a_grader_that_fails_aborts(tokenizer):
    async def broken(task, text):
        return Score(0, 0, status="failed")

    t, _, _ = play(tokenizer, "It is 1.", reward=broken)
    assert t.aborted


class Broken(ToolEnvironment):
    """Raises where it is asked to."""

    where = ""

    async def reset(self, task):
        return self.raising("reset") or await super().reset(task)

    async def step(self, message):
        return self.raising("step") or await super().step(message)

    async def close(self):
        self.raising("close")

    def raising(self, place):
        if place == self.where:
            raise TimeoutError(f"in {place}") if place == "step" else KeyError(f"in {place}")


@pytest.mark.parametrize("where", ["reset", "step", "close", "tool", "grader"])
def test_code_of_the_user_that_raises_ends_its_episode_and_no_other(tokenizer, where):
    async def bad_reward(task, text):
        raise ValueError("in grader")

    class BadTool(Echo):
        async def __call__(self, call, *, session=""):
            raise ZeroDivisionError("in tool")

    chat = Chat(tokenizer, [Echo.schema])
    engine = Scripted(chat, CALL % "hi", "It is 1.")
    tool, score = (BadTool() if where == "tool" else Echo()), (bad_reward if where == "grader" else reward)
    environment = Broken([tool], score)
    environment.where = where
    t = asyncio.run(episode.run(engine, environment, chat, TASK, Sampling(0), episode.Budget(), session="s"))
    assert t.stop == "error" and t.aborted and (t.reward, t.accuracy) == (0, 0) and not t.metrics["timed_out"]
    assert t.error.startswith("Traceback") and f"in {where}" in t.error and engine.released == ["s"]


def test_a_user_error_still_ends_the_command(tokenizer):
    async def refusing(task, text):
        raise UserError("no key")

    with pytest.raises(UserError, match="no key"):
        play(tokenizer, "It is 1.", reward=refusing)


def test_an_episode_out_of_time_is_graded_by_the_turns_that_it_has(tokenizer):
    t, _, _ = play(tokenizer, CALL % "slow", "It is 1.", budget=episode.Budget(4, 200, 0.02))
    assert (t.stop, t.aborted, t.reward, t.metrics["timed_out"]) == ("time", False, -1.0, 1.0)
    assert tokenizer.decode(t.tokens[t.loss_mask]) == CALL % "slow" + "<|im_end|>"


def test_a_first_turn_that_takes_all_the_time_is_not_graded(tokenizer, monkeypatch):
    async def hang(*_, **__):
        await asyncio.sleep(10)

    monkeypatch.setattr(Scripted, "generate", hang)
    t, _, _ = play(tokenizer, budget=episode.Budget(4, 200, 0.02))
    assert (t.stop, t.reward, t.metrics["timed_out"]) == ("aborted", 0.0, 1.0)


def test_a_grader_that_hangs_when_time_runs_out_aborts_the_episode(tokenizer, monkeypatch):
    async def hang(*_):
        await asyncio.sleep(10)

    monkeypatch.setattr(episode, "GRADING_SECONDS", 0.02)
    t, _, _ = play(tokenizer, "It is 1.", reward=hang, budget=episode.Budget(4, 200, 0.02))
    assert (t.stop, t.reward) == ("aborted", 0.0)


def test_an_empty_answer_is_an_empty_answer(tokenizer):
    """Fault 14 of the reference: an empty generation returned the whole prompt."""
    t, _, _ = play(tokenizer, "")
    assert t.loss_mask.sum() == 1 and t.turns[0].content == "" and t.accuracy == 0


class Guessing:
    """A game in words: higher or lower, until the number is named or given up by a call."""

    tools = ()

    async def reset(self, task):
        return task.messages

    async def step(self, message):
        if message.tool_calls:
            return Step([], -1.0, True)
        guess = int(message.content)
        if guess == 7:
            return Step([], 1.0, True, 1.0, prediction=message.content)
        return Step([Message("user", "higher" if guess < 7 else "lower")], -0.5)

    async def close(self): ...


def guess(tokenizer, *texts, **budget):
    chat = Chat(tokenizer)
    budget = episode.Budget(**{"max_turns": 4, "max_response": 200, "seconds": 10, **budget})
    return asyncio.run(episode.run(Scripted(chat, *texts), Guessing(), chat, TASK, Sampling(0), budget)), chat


def test_an_environment_may_answer_words_with_words(tokenizer):
    t, chat = guess(tokenizer, "3", "9", "7")
    messages = [Message("assistant", "3"), Message("user", "higher"), Message("assistant", "9")]
    messages += [Message("user", "lower"), Message("assistant", "7")]
    assert t.said == messages and (t.stop, t.reward, t.accuracy, t.prediction) == ("answer", 1.0, 1.0, "7")
    ids, mask = chat.conversation([*TASK.messages, *messages])
    assert t.tokens.tolist() == ids and t.loss_mask.tolist() == mask
    assert t.metrics["num_turns"] == 3 and t.metrics["tool_calls"] == 0


def test_a_game_that_is_not_ended_ends_by_its_budget(tokenizer):
    t, _ = guess(tokenizer, "3", "4", "5", max_turns=2)
    assert (t.stop, len(t.turns), t.reward) == ("answer", 2, -0.5)
    assert [m.content for m in t.said] == ["3", "higher", "4"]  # no more than the tokens say
    t, _ = guess(tokenizer, "3", "4", max_response=4)
    assert (t.stop, len(t.turns), t.reward) == ("length", 1, -0.5)
    t, _ = guess(tokenizer, CALL % "I give up")
    assert (t.stop, t.reward) == ("answer", -1.0)
