"""An episode that is watched while it runs: for a person at a terminal, or a client of a server.

The loop is agent.episode's own. What is added lies around it: an engine that asks for a few tokens at a time and tells
them, and an environment that tells calls and outputs. Draws depend on seed and position, so watching changes nothing
but, at most, the last bit of a logit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.environment import Environment, Step
from open_agentrl_jax.rollout.engine import Engine
from open_agentrl_jax.types import Completion, Message, Sampling, Task, Trajectory

PIECE = 8  # tokens between two looks
CALL = "<tool_call>"


@dataclasses.dataclass(frozen=True)
class Event:
    """`kind`: "text" (more of the model's words) | "call" (its code, or all of it) | "output" (a tool's answer)."""

    kind: str
    text: str


Listener = Callable[[Event], Awaitable[None]]


class Watched:
    """An engine and an environment around others, telling a listener what happens."""

    def __init__(self, engine: Engine, environment: Environment, chat: Chat, listen: Listener):
        self._engine, self._environment, self._chat, self._listen = engine, environment, chat, listen
        self.tools = environment.tools

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, session: str = "") -> Completion:
        """See rollout.engine; `session` must be given, or every piece computes the prefix again."""
        parts: list[Completion] = []
        sampled: list[int] = []
        told = 0
        while True:
            room = sampling.max_tokens - len(sampled)
            piece = dataclasses.replace(sampling, max_tokens=min(PIECE, room))
            parts.append(await self._engine.generate([*ids, *sampled], piece, session=session))
            sampled += parts[-1].ids.tolist()
            ended = parts[-1].finish_reason != "length" or len(sampled) >= sampling.max_tokens
            words = spoken(self._chat.decode(sampled), ended=ended)
            if len(words) > told:
                await self._listen(Event("text", words[told:]))
                told = len(words)
            if ended:
                break
        columns = {n: np.concatenate([getattr(part, n) for part in parts]) for n in ("ids", "logprobs", "version")}
        return Completion(finish_reason=parts[-1].finish_reason, **columns)

    async def update_weights(self, path: str, version: int) -> None:
        """See rollout.engine."""
        await self._engine.update_weights(path, version)

    async def release(self, session: str) -> None:
        """See rollout.engine."""
        await self._engine.release(session)

    async def reset(self, task: Task) -> list[Message]:
        """See agent.environment."""
        return await self._environment.reset(task)

    async def step(self, message: Message) -> Step:
        """See agent.environment."""
        for call in message.tool_calls:
            code = call.arguments.get("code")
            if not call.error:  # the answer to one that cannot be read says why
                await self._listen(Event("call", code if isinstance(code, str) else f"{call.name}({call.arguments})"))
        step = await self._environment.step(message)
        for answer in step.messages:
            await self._listen(Event("output", answer.content))
        return step

    async def close(self) -> None:
        """See agent.environment."""
        await self._environment.close()


def spoken(text: str, *, ended: bool) -> str:
    """What of a turn's text is certain to be words: up to the first call, half a character or half a tag held back."""
    text = text.partition(CALL)[0] if CALL in text else text
    if ended:
        return text
    text = text.rstrip("\ufffd")
    for size in range(min(len(CALL) - 1, len(text)), 0, -1):
        if CALL.startswith(text[-size:]):
            return text[:-size]
    return text


async def reply(
    engine: Engine,
    chat: Chat,
    environment: Environment,
    history: Sequence[Message],
    sampling: Sampling,
    budget: episode.Budget,
    listen: Listener,
    *,
    session: str,
) -> Trajectory:
    """The agent's answer to a conversation: as many turns and tool calls as it takes.

    Args:
        engine: continues token sequences.
        chat: template and parser; it shows the tools of `environment`.
        environment: runs the calls; `ungraded`, say.
        history: the conversation so far; the last message is the user's.
        sampling: temperature, top-p, seed.
        budget: limits of the answer.
        listen: told each piece as it comes.
        session: names the answer to the engine.

    Returns:
        The trajectory; what it `said` is to be added to the history.
    """
    watched = Watched(engine, environment, chat, listen)
    task = Task(session, list(history), None)
    return await episode.run(watched, watched, chat, task, sampling, budget, session=session)
