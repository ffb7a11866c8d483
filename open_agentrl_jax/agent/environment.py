"""What an episode talks to: protocols of tools, rewards and environments, and the one made of tools and a reward."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from open_agentrl_jax.types import Message, Score, Task, ToolCall


@dataclasses.dataclass
class ToolResult:
    """What a call gave. `status`: "ok" | "error" (the model's) | "infrastructure" (never the model's)."""

    text: str
    status: str = "ok"
    seconds: float = 0.0


class Tool(Protocol):
    """Something the model may call. `schema` is the JSON schema that the chat template shows."""

    name: str
    schema: dict[str, Any]

    async def __call__(self, call: ToolCall, *, session: str = "") -> ToolResult: ...


class Reward(Protocol):
    """Grades the final message of an episode."""

    async def __call__(self, task: Task, text: str) -> Score: ...


async def ungraded(task: Task, text: str) -> Score:
    """The reward where nobody asks for one."""
    return Score(0.0, 0.0)


@dataclasses.dataclass
class Step:
    """What the environment answers: messages for the model, or the end with its score."""

    messages: list[Message]
    reward: float = 0.0
    done: bool = False
    accuracy: float = 0.0
    results: list[ToolResult] = dataclasses.field(default_factory=list)
    failed: bool = False  # the infrastructure failed: the trajectory is masked
    prediction: str = ""


class Environment(Protocol):
    """One episode's world. It ends the episode with `done`; until then its messages are what the model reads next.

    A message without calls is an answer: ToolEnvironment grades it. An environment that does not end there, such as a
    game or somebody who asks on, answers with user messages. Out of turns or tokens, the last words come without calls,
    and whatever the step gives is the end.
    """

    tools: list[dict[str, Any]]  # the schemas that the chat template shows

    async def reset(self, task: Task) -> list[Message]: ...

    async def step(self, message: Message) -> Step: ...

    async def close(self) -> None: ...


class ToolEnvironment:
    """Tools that run the calls of a turn side by side, and a reward that grades the message without calls."""

    def __init__(
        self,
        tools: Sequence[Tool],
        reward: Reward,
        *,
        shorten: Callable[[str], str] = str,
        session: str = "",
        first_call_only: bool = False,
    ):
        """Binds one episode's tools.

        Args:
            tools: what may be called.
            reward: grades the final message.
            shorten: cuts a tool's output to its budget.
            session: the episode's name, passed on to the tools.
            first_call_only: a fault of the reference: further calls vanish.
        """
        self.tools = [tool.schema for tool in tools]
        self._tools = {tool.name: tool for tool in tools}
        self._reward, self._shorten, self._session = reward, shorten, session
        self._first_call_only = first_call_only

    async def reset(self, task: Task) -> list[Message]:
        """The problem's messages."""
        self._task = task
        return task.messages

    async def step(self, message: Message) -> Step:
        """Runs the calls of `message`, or grades it where it has none."""
        calls = message.tool_calls[:1] if self._first_call_only else message.tool_calls
        if not calls:
            score = await self._reward(self._task, message.content)
            return Step(
                [], score.score, True, score.accuracy, failed=score.status == "failed", prediction=score.prediction
            )
        results = await asyncio.gather(*(self._run(call) for call in calls))
        messages = [Message("tool", self._shorten(result.text)) for result in results]
        return Step(messages, results=results, failed=any(result.status == "infrastructure" for result in results))

    async def close(self) -> None:
        """Ends what the tools keep for this episode (`release(session)`, where a tool has it)."""
        for tool in self._tools.values():
            if (release := getattr(tool, "release", None)) is not None:
                await release(self._session)

    async def _run(self, call: ToolCall) -> ToolResult:
        if call.error:
            return ToolResult(f"Error: {call.error}", "error")
        tool = self._tools.get(call.name)
        if tool is None:
            return ToolResult(f"Error: there is no tool {call.name!r}; the tools are {', '.join(self._tools)}", "error")
        return await tool(call, session=self._session)
