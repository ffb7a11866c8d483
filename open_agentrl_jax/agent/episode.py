"""The multi-turn loop: one problem, one environment, one token sequence.

Order of the checks after each generation, as in the reference: the response budget, the turn limit, no call; then the
calls are run, and their answers dropped where they do not fit. A turn without calls is the last one unless the
environment goes on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.environment import Environment, Step
from open_agentrl_jax.rollout.engine import Engine, EngineError
from open_agentrl_jax.types import Message, Sampling, Task, ToolCall, Trajectory, Turn


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of an episode; lengths are tokens."""

    max_turns: int = 16
    max_response: int = 20480  # all after the prompt, tool tokens included
    seconds: float = 1800.0


@dataclasses.dataclass
class _Sequence:
    """The growing trajectory: ids with their streams, kept in step."""

    tokens: list[int]
    mask: list[bool]
    logprobs: list[float]
    versions: list[int]

    def add(self, ids, sampled=False, logprobs=None, versions=None) -> None:
        self.tokens += [int(i) for i in ids]
        self.mask += [sampled] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else [float(x) for x in logprobs]
        self.versions += [-1] * len(ids) if versions is None else [int(x) for x in versions]

    def trajectory(self, turns: list[Turn], stop: str) -> Trajectory:
        return Trajectory(
            tokens=np.asarray(self.tokens, np.int32),
            loss_mask=np.asarray(self.mask, bool),
            logprobs=np.asarray(self.logprobs, np.float32),
            versions=np.asarray(self.versions, np.int32),
            turns=turns,
            stop=stop,
        )


def record(turn: Turn, step: Step) -> None:
    """Notes in a turn what the environment answered to it."""
    turn.tool_outputs = [message.content for message in step.messages]
    turn.tool_statuses = [result.status for result in step.results]
    if step.messages:
        turn.reply_role = step.messages[0].role


def after(step: Step, stop: str, calls: Sequence[ToolCall], more: bool) -> str:
    """Why the episode ends after a step, "" where it goes on.

    Args:
        step: what the environment answered.
        stop: why it was to end before that.
        calls: of the turn.
        more: whether another turn is allowed.
    """
    if stop == "answer" and not calls and not step.done and more:
        return ""
    return stop or ("answer" if step.done else "")


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
    """Plays one episode to its end.

    Args:
        engine: continues token sequences.
        environment: runs tools and grades.
        chat: template and parser.
        task: the problem.
        sampling: temperature and the like; `max_tokens` and `stop_ids` are set here, turn by turn.
        budget: limits of the episode.
        session: names the episode to engine and tools.
        unreadable_call_ends: a fault of the reference: a turn whose first call cannot be read is the last one.

    Returns:
        The trajectory. `stop` is "aborted" where engine, sandbox or grader failed or the seconds ran out: such a
        trajectory carries no score. `metrics` has response_length, num_turns, tool_calls, tool_success, ...
    """
    started = time.monotonic()
    turns: list[Turn] = []
    end = Step([])
    sequence = _Sequence([], [], [], [])
    prompt_length = response_length = 0
    first_call = -1.0  # response tokens sampled before and with the first call
    try:
        async with asyncio.timeout(budget.seconds):
            sequence.add(chat.prompt(await environment.reset(task)))
            prompt_length = len(sequence.tokens)
            stop = ""
            while not stop:
                turn_started = time.monotonic()
                room = budget.max_response - (len(sequence.tokens) - prompt_length)
                completion = await engine.generate(
                    sequence.tokens,
                    dataclasses.replace(sampling, max_tokens=room, stop_ids=chat.stop_ids),
                    session=session,
                )
                if completion.finish_reason == "abort":
                    raise EngineError("the engine aborted the request")
                sequence.add(completion.ids, True, completion.logprobs, completion.version)
                text = chat.decode(completion.ids.tolist())
                content, calls = chat.parse(text)
                turn = Turn(text, calls)
                turns.append(turn)
                response_length = len(sequence.tokens) - prompt_length
                if calls and first_call < 0:
                    first_call = float(response_length)
                if completion.finish_reason == "length" or response_length >= budget.max_response:
                    stop = "length"
                elif len(turns) >= budget.max_turns:
                    stop = "turns" if calls else "answer"
                elif not calls or (unreadable_call_ends and calls[0].error):
                    stop = "answer"
                end = await environment.step(Message("assistant", content, [] if stop else calls))
                stop = after(end, stop, calls, len(turns) < budget.max_turns)
                if not stop or end.results:
                    record(turn, end)
                if not stop:
                    if end.failed:
                        raise EngineError("a tool failed for a reason that is not the model's")
                    following = chat.following(end.messages)
                    if response_length + len(following) >= budget.max_response:
                        stop = "length"
                        if calls:
                            end = await environment.step(Message("assistant", content))
                    else:
                        sequence.add(following)
                turn.seconds = time.monotonic() - turn_started
    except (EngineError, TimeoutError) as error:
        trajectory = sequence.trajectory(turns, "aborted")
        trajectory.metrics["timed_out"] = float(isinstance(error, TimeoutError))
    else:
        closed = sequence.tokens[-1] in chat.stop_ids
        if closed and response_length < budget.max_response:
            sequence.add(chat.ending)
        trajectory = sequence.trajectory(turns, "aborted" if end.failed else stop)
        trajectory.reward, trajectory.accuracy, trajectory.prediction = end.reward, end.accuracy, end.prediction
    finally:
        await environment.close()
        await engine.release(session)
    statuses = [status for turn in turns for status in turn.tool_statuses]
    trajectory.metrics |= {
        "response_length": float(response_length),
        "prompt_length": float(prompt_length),
        "num_turns": float(len(turns)),
        "tool_calls": float(len(statuses)),
        "tool_success": float(sum(status == "ok" for status in statuses)),
        "first_call": first_call,
        "tool_tokens": float(response_length - sum(sequence.mask)),
        "seconds": time.monotonic() - started,
    }
    return trajectory
