"""An episode whose words, calls and outputs reach a listener while it runs: a terminal, or a client of a server.

The loop is agent.episode's. Around it stand an engine that samples a few tokens at a time and an environment that
reports calls and outputs. Draws depend on seed and position, so streaming changes at most the last bit of a logit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.calls import FORMATS
from open_agentrl_jax.agent.calls import spoken as spoken
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.environment import Environment, Step
from open_agentrl_jax.rollout.engine import Engine, in_pieces, joined
from open_agentrl_jax.types import Completion, Message, Sampling, Task, Trajectory

PIECE = 8  # tokens between two events


@dataclasses.dataclass(frozen=True)
class Event:
    """`kind`: "text" (more words of the model) | "call" (its code, or all of it) | "output" (a tool's answer)."""

    kind: str
    text: str


Listener = Callable[[Event], Awaitable[None]]


class Responder(Protocol):
    """Answers conversations; see run.chat_agent."""

    name: str

    async def answer(
        self, history: list[Message], sampling: Sampling, listen: Listener, *, max_tokens: int = 0
    ) -> Trajectory:
        """Streams the answer to `listen`; `max_tokens` 0: as many as the agent's budget allows."""
        ...


class Watched:
    """An engine and an environment around others, which report events to a listener."""

    def __init__(self, engine: Engine, environment: Environment, chat: Chat, listen: Listener):
        self._engine, self._environment, self._chat, self._listen = engine, environment, chat, listen
        self.tools = environment.tools

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, session: str = "") -> Completion:
        """See rollout.engine; `session` must be given, or every piece computes the prefix again."""
        parts: list[Completion] = []
        sampled: list[int] = []
        shown = 0
        async for part in in_pieces(self._engine, ids, sampling, session=session, size=PIECE):
            parts.append(part)
            sampled += part.ids.tolist()
            ended = part.finish_reason != "length" or len(sampled) >= sampling.max_tokens
            words = spoken(self._chat.decode(sampled), FORMATS[self._chat.call_format], ended=ended)
            if len(words) > shown:
                await self._listen(Event("text", words[shown:]))
                shown = len(words)
        return joined(parts)

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
            if not call.error:  # the output for an unreadable call explains the error
                await self._listen(Event("call", code if isinstance(code, str) else f"{call.name}({call.arguments})"))
        step = await self._environment.step(message)
        for answer in step.messages:
            await self._listen(Event("output", answer.content))
        return step

    async def close(self) -> None:
        """See agent.environment."""
        await self._environment.close()


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
        listen: receives each event.
        session: names the answer to the engine.

    Returns:
        The trajectory; its `said` messages belong to the history from then on.
    """
    watched = Watched(engine, environment, chat, listen)
    task = Task(session, list(history), None)
    return await episode.run(watched, watched, chat, task, sampling, budget, session=session)
