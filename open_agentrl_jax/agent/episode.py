"""The multi-turn loop: one problem, one environment, one policy.

`play` serves every policy that answers messages turn by turn. TokenPolicy samples from an engine and keeps one token
sequence; collect.endpoint.MessagePolicy talks to a chat API. After each turn the loop checks, in the order of the
reference: response budget, turn limit, no call. Then the calls run; their outputs are dropped if they do not fit.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import traceback
from collections.abc import Awaitable, Sequence
from typing import Protocol, TypeVar

from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.environment import Environment, Step
from open_agentrl_jax.agent.streams import Streams
from open_agentrl_jax.rollout.engine import Engine, EngineError
from open_agentrl_jax.types import Message, Sampling, Task, ToolCall, Trajectory, Turn, UserError

T = TypeVar("T")
GRADING_SECONDS = 60.0  # for grading an episode whose seconds ran out
MAX_TRACEBACK = 8000  # characters kept of a traceback, its end


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of an episode; lengths are tokens."""

    max_turns: int = 16
    max_response: int = 20480  # everything after the prompt, tool tokens included
    seconds: float = 1800.0


@dataclasses.dataclass
class Reply:
    """One assistant turn."""

    content: str  # the words around the calls
    calls: list[ToolCall]
    finish: str  # "stop" | "length" | "tool_calls" ...
    tokens: int = 0  # sampled; 0 where the policy does not count them
    text: str = ""  # everything that was sampled, calls included; "" where only `content` is known


class Policy(Protocol):
    """Answers one conversation, turn by turn."""

    @property
    def length(self) -> int:
        """Response tokens so far, as far as the policy counts them."""
        ...

    def start(self, messages: Sequence[Message]) -> None:
        """Takes the prompt."""
        ...

    async def reply(self, room: int) -> Reply:
        """Samples a turn of at most `room` tokens. Raises EngineError where the infrastructure fails."""
        ...

    def extend(self, messages: Sequence[Message], limit: int) -> bool:
        """Takes the environment's answer; False where the response would reach `limit` tokens."""
        ...

    def trajectory(self, turns: list[Turn], stop: str, limit: int) -> Trajectory:
        """The episode so far, with its token streams and length metrics."""
        ...

    async def close(self) -> None:
        """Releases what the policy holds for the episode."""
        ...


class TokenPolicy:
    """Samples from an engine. Ids of the prompt, of turns and of outputs grow into one sequence, never re-tokenised."""

    def __init__(self, engine: Engine, chat: Chat, sampling: Sampling, session: str = ""):
        """Binds one episode.

        Args:
            engine: continues token sequences.
            chat: template and parser.
            sampling: temperature and the like; `max_tokens` and `stop_ids` are set turn by turn.
            session: names the episode to the engine.
        """
        self._engine, self._chat, self._sampling, self._session = engine, chat, sampling, session
        self._streams = Streams()
        self._prompt = 0

    @property
    def length(self) -> int:
        """See Policy."""
        return len(self._streams) - self._prompt

    def start(self, messages: Sequence[Message]) -> None:
        """See Policy."""
        self._streams.add(self._chat.prompt(messages))
        self._prompt = len(self._streams)

    async def reply(self, room: int) -> Reply:
        """See Policy."""
        sampling = dataclasses.replace(self._sampling, max_tokens=room, stop_ids=self._chat.stop_ids)
        completion = await self._engine.generate(self._streams.tokens, sampling, session=self._session)
        if completion.finish_reason == "abort":
            raise EngineError("the engine aborted the request")
        self._streams.add_sampled(completion)
        text = self._chat.decode(completion.ids.tolist())
        return Reply(*self._chat.parse(text), completion.finish_reason, len(completion.ids), text)

    def extend(self, messages: Sequence[Message], limit: int) -> bool:
        """See Policy."""
        ids = self._chat.following(messages)
        if self.length + len(ids) >= limit:
            return False
        self._streams.add(ids)
        return True

    def trajectory(self, turns: list[Turn], stop: str, limit: int) -> Trajectory:
        """See Policy."""
        response, streams = self.length, self._streams
        if streams.tokens and streams.tokens[-1] in self._chat.stop_ids and response < limit:
            streams.add(self._chat.ending)
        metrics = {
            "response_length": float(response),
            "prompt_length": float(self._prompt),
            "tool_tokens": float(response - streams.sampled),
        }
        return Trajectory(**vars(streams.sequence(turns)), stop=stop, metrics=metrics)

    async def close(self) -> None:
        """See Policy."""
        await self._engine.release(self._session)


class Fault(Exception):
    """A tool, grader or environment raised; the cause holds its exception."""


async def run(
    engine: Engine,
    environment: Environment,
    chat: Chat,
    task: Task,
    sampling: Sampling,
    budget: Budget,
    *,
    session: str = "",
    unreadable_call_ends: bool = False,
) -> Trajectory:
    """Plays one episode with a token engine; see TokenPolicy and `play`."""
    policy = TokenPolicy(engine, chat, sampling, session)
    return await play(policy, environment, task, budget, unreadable_call_ends=unreadable_call_ends)


async def play(
    policy: Policy, environment: Environment, task: Task, budget: Budget, *, unreadable_call_ends: bool = False
) -> Trajectory:
    """Plays one episode to its end.

    Args:
        policy: answers the messages.
        environment: runs tools and grades.
        task: the problem.
        budget: limits of the episode.
        unreadable_call_ends: a fault of the reference: a turn whose first call cannot be read is the last one.

    Returns:
        The trajectory. `stop` is "aborted" where engine, sandbox or grader reported a failure, or the seconds ran out
        before the first turn was sampled, and "error" where a tool, grader or environment raised: then `error` holds
        the traceback. Neither is scored. Where the seconds run out later, `stop` is "time": the turns that were
        sampled until then are graded like those of a response that is too long; an unfinished turn is lost.
        `metrics` has response_length, num_turns, tool_calls, tool_success, ...

    Raises:
        UserError: raised by policy or environment to end the whole command.
    """
    started = time.monotonic()
    turns: list[Turn] = []
    end, stop, error, timed_out = Step([]), "", "", False
    first_call = -1.0  # response tokens sampled up to and with the first call
    clock = asyncio.timeout(budget.seconds)
    try:
        async with clock:
            policy.start(await _guarded(environment.reset(task)))
            while not stop:
                turn_started = time.monotonic()
                reply = await policy.reply(budget.max_response - policy.length)
                turn = Turn(reply.text or reply.content, reply.calls, words=reply.content)
                turns.append(turn)
                if reply.calls and first_call < 0:
                    first_call = float(policy.length)
                if reply.finish == "length" or policy.length >= budget.max_response:
                    stop = "length"
                elif len(turns) >= budget.max_turns:
                    stop = "turns" if reply.calls else "answer"
                elif not reply.calls or (unreadable_call_ends and reply.calls[0].error):
                    stop = "answer"
                answered = Message("assistant", reply.content, [] if stop else reply.calls)
                end = await _guarded(environment.step(answered))
                stop = _after(end, stop, reply.calls, len(turns) < budget.max_turns)
                if not stop or end.results:
                    _record(turn, end)
                if not stop:
                    turn.reward = end.reward
                    if end.failed:
                        raise EngineError("a tool failed for a reason that is not the model's")
                    if not policy.extend(end.messages, budget.max_response):
                        stop = "length"
                        if reply.calls:
                            end = await _guarded(environment.step(Message("assistant", reply.content)))
                turn.seconds = time.monotonic() - turn_started
    except (EngineError, TimeoutError) as failure:
        stop, timed_out = "aborted", isinstance(failure, TimeoutError)
        if clock.expired() and turns:
            with contextlib.suppress(EngineError, TimeoutError, Fault):
                async with asyncio.timeout(GRADING_SECONDS):
                    end = await _guarded(environment.step(Message("assistant", reply.content)))
                stop = "time"
    except Fault as fault:
        stop, error = "error", _traceback(fault)
    finally:
        try:
            await _guarded(environment.close())
        except Fault as fault:
            stop, error = "error", error or _traceback(fault)
        finally:
            await policy.close()
    if end.failed and stop != "error":
        stop = "aborted"
    trajectory = policy.trajectory(turns, stop, 0 if stop in ("aborted", "error") else budget.max_response)
    trajectory.error = error
    if not trajectory.aborted:
        trajectory.reward, trajectory.accuracy, trajectory.prediction = end.reward, end.accuracy, end.prediction
    statuses = [status for turn in turns for status in turn.tool_statuses]
    trajectory.metrics |= {
        "num_turns": float(len(turns)),
        "tool_calls": float(len(statuses)),
        "tool_success": float(sum(status == "ok" for status in statuses)),
        "first_call": first_call,
        "seconds": time.monotonic() - started,
        "timed_out": float(timed_out),
    }
    return trajectory


async def _guarded(work: Awaitable[T]) -> T:
    """Awaits the user's code. Whatever it raises becomes a Fault, except what ends an episode or a command."""
    try:
        return await work
    except (EngineError, UserError):
        raise
    except Exception as error:
        raise Fault from error


def _traceback(fault: Fault) -> str:
    assert fault.__cause__ is not None  # _guarded sets it
    return "".join(traceback.format_exception(fault.__cause__))[-MAX_TRACEBACK:]


def _record(turn: Turn, step: Step) -> None:
    """Keeps in a turn what the environment answered to it."""
    turn.tool_outputs = [message.content for message in step.messages]
    turn.tool_statuses = [result.status for result in step.results]
    if step.messages:
        turn.reply_role = step.messages[0].role


def _after(step: Step, stop: str, calls: Sequence[ToolCall], more: bool) -> str:
    """Why the episode ends after a step, "" where it goes on.

    Args:
        step: what the environment answered.
        stop: the reason known before the step.
        calls: of the turn.
        more: whether another turn is allowed.
    """
    if stop == "answer" and not calls and not step.done and more:
        return ""
    return stop or ("answer" if step.done else "")
