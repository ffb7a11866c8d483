"""A teacher behind an OpenAI-compatible endpoint: its HTTP side, and an episode told in messages instead of tokens.

Whatever the server does (errors, nonsense, silence) is retried with growing pauses, counted, and at last told as
`EngineError`, which masks the episode: it is never the model's mistake, and never a wait without end.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from open_agentrl_jax.agent.chat import parse_tool_calls
from open_agentrl_jax.agent.environment import Environment, Step
from open_agentrl_jax.agent.episode import Budget, after, record
from open_agentrl_jax.collect.journal import tokenless
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.types import Message, Sampling, Task, ToolCall, Trajectory, Turn, UserError

ATTEMPTS = 6
LONGEST_PAUSE = 30.0  # seconds
MAX_BODY = 32 << 20  # bytes of one reply
IN_A_ROW = 25  # calls that fail one after the other before the command gives up
PASSING = {408, 409, 425, 429}  # statuses that another attempt may cure, besides all from 500 on
CURES = {
    401: "set OPENAI_API_KEY to a key that it takes",
    403: "set OPENAI_API_KEY to a key that may use this model",
    404: "check --endpoint (it ends in /v1 mostly) and --endpoint_model",
}


@dataclasses.dataclass
class Reply:
    """One assistant message. `finish` is "stop" | "length" | "tool_calls" ...; `tokens` is 0 where it is not told."""

    content: str
    calls: list[ToolCall]
    finish: str
    tokens: int = 0


class Nonsense(ValueError):
    """A reply that is no chat completion."""


class ChatEndpoint:
    """Chat completions of one model. Safe to use many times at once from one event loop."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        timeout: float = 600.0,
        pause: float = 0.5,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        """Nothing is sent yet.

        Args:
            url: the base URL; `/chat/completions` is added.
            model: the name that the server knows it by.
            key: sent as a bearer token; empty: none.
            timeout: seconds of one attempt, all of it.
            pause: seconds before the second attempt; doubled each time, drawn between half and all of it.
            transport: in place of the network.
        """
        self.url, self.model, self._timeout, self._pause = url.rstrip("/"), model, timeout, pause
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits, transport=transport)
        self.counts: collections.Counter[str] = collections.Counter()  # calls, retries, and each kind of failure
        self._row = 0

    async def reply(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], sampling: Sampling) -> Reply:
        """The assistant's next message.

        Args:
            messages: in the protocol's form, see `wire`.
            tools: schemas.
            sampling: max_tokens, temperature, top_p and seed are sent; a server may ignore the seed.

        Raises:
            EngineError: no usable reply after ATTEMPTS, or the server will not take this request.
            UserError: the server will take none (key, address, model), or failed IN_A_ROW calls.
        """
        body: dict[str, Any] = {"model": self.model, "messages": messages, "seed": sampling.seed}
        body |= {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
        if tools:
            body["tools"] = tools
        self.counts["calls"] += 1
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self.counts["retries"] += 1
                await asyncio.sleep(min(LONGEST_PAUSE, self._pause * 2 ** (attempt - 1)) * random.uniform(0.5, 1))
            try:
                async with asyncio.timeout(self._timeout):
                    status, text = await self._post(body)
                if status == 200:
                    reply = read_reply(text)
                    self._row = 0
                    return reply
                reason = f"status {status}"
            except (httpx.HTTPError, TimeoutError) as error:
                status, reason = 0, type(error).__name__
                text = str(error)
            except Nonsense as error:
                status, reason, text = 0, "nonsense", str(error)
            self.counts[reason] += 1
            said = " ".join(text.split())[:200]
            if status in CURES:
                raise UserError(f"--endpoint {self.url}: {reason} ({said}); {CURES[status]}")
            if 0 < status < 500 and status not in PASSING:
                break
        self.counts["failed"] += 1
        self._row += 1
        if self._row >= IN_A_ROW:
            raise UserError(
                f"--endpoint {self.url}: {self._row} calls in a row failed, the last with {reason} ({said}); what was "
                "answered is kept, start the same command again when the server is well"
            )
        raise EngineError(f"{self.url}: {reason} ({said})")

    async def _post(self, body: dict[str, Any]) -> tuple[int, str]:
        async with self._http.stream("POST", f"{self.url}/chat/completions", json=body) as response:
            data = bytearray()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > MAX_BODY:
                    raise Nonsense(f"a reply of more than {MAX_BODY} bytes")
            return response.status_code, data.decode("utf-8", "replace")

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()


def read_reply(text: str) -> Reply:
    """Understands a chat completion. Raises Nonsense for anything that says neither words nor calls."""
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message = choice["message"]
        content = message.get("content") or ""
        raw = message.get("tool_calls") or []
        tokens = int((body.get("usage") or {}).get("completion_tokens") or 0)
        if not isinstance(content, str) or not isinstance(raw, list):
            raise TypeError("content or tool_calls of another type")
        calls = [_call(c["function"]) for c in raw]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Nonsense(f"{type(error).__name__} {error} in {text[:200]!r}") from error
    if not calls:  # a server without a parser of its own leaves the calls in the text
        content, calls = parse_tool_calls(content)
    if not content.strip() and not calls:
        raise Nonsense(f"neither words nor calls in {text[:200]!r}")
    return Reply(content.strip(), calls, str(choice.get("finish_reason") or "stop"), tokens)


def _call(function: dict[str, Any]) -> ToolCall:
    name, arguments = str(function["name"]), function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False)
        except (ValueError, RecursionError) as error:
            return ToolCall(name, error=f"the arguments are not valid JSON: {error}")
    return ToolCall(name, arguments) if isinstance(arguments, dict) else ToolCall(name, error="they must be an object")


def wire(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages in the form of the protocol: arguments as text, and an id that ties each result to its call."""
    sent: list[dict[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        entry = message.to_chat()
        if message.role == "tool":
            entry["tool_call_id"] = waiting.pop(0) if waiting else "call_unknown"
        for i, call in enumerate(entry.get("tool_calls", [])):
            call["id"] = f"call_{len(sent)}_{i}"
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        waiting = [call["id"] for call in entry["tool_calls"]] if "tool_calls" in entry else waiting
        sent.append(entry)
    return sent


async def converse(
    ask: Callable[[list[dict[str, Any]], Sampling], Awaitable[Reply]],
    environment: Environment,
    task: Task,
    sampling: Sampling,
    budget: Budget,
) -> Trajectory:
    """Plays one episode with a teacher that takes and gives messages; the rules are those of `agent.episode.run`.

    Args:
        ask: gives the next message (`ChatEndpoint.reply`, perhaps remembered).
        environment: runs the tools and grades.
        task: the problem.
        sampling: `max_tokens` is set here, call by call.
        budget: its max_response counts the teacher's own tokens only, as far as the server tells them.

    Returns:
        A trajectory without tokens.
    """
    started = time.monotonic()
    turns: list[Turn] = []
    end, stop, spent, first_call, timed_out = Step([]), "", 0, -1.0, False
    try:
        async with asyncio.timeout(budget.seconds):
            messages = list(await environment.reset(task))
            while not stop:
                turn_started = time.monotonic()
                limit = dataclasses.replace(sampling, max_tokens=budget.max_response - spent)
                reply = await ask(wire(messages), limit)
                spent += reply.tokens
                turn = Turn(reply.content, reply.calls)
                turns.append(turn)
                message = Message("assistant", reply.content, reply.calls)
                messages.append(message)
                if reply.calls and first_call < 0:
                    first_call = float(spent)
                if reply.finish == "length" or spent >= budget.max_response:
                    stop = "length"
                elif len(turns) >= budget.max_turns:
                    stop = "turns" if reply.calls else "answer"
                elif not reply.calls:
                    stop = "answer"
                end = await environment.step(Message("assistant", reply.content) if stop else message)
                stop = after(end, stop, reply.calls, len(turns) < budget.max_turns)
                if not stop or end.results:
                    record(turn, end)
                if not stop:
                    if end.failed:
                        raise EngineError("a tool failed for a reason that is not the model's")
                    messages += end.messages
                turn.seconds = time.monotonic() - turn_started
    except (EngineError, TimeoutError) as error:
        stop, timed_out = "aborted", isinstance(error, TimeoutError)
    finally:
        await environment.close()
    statuses = [status for turn in turns for status in turn.tool_statuses]
    return tokenless(
        turns,
        "aborted" if end.failed else stop,
        reward=end.reward,
        accuracy=end.accuracy,
        prediction=end.prediction,
        metrics={
            "response_length": float(spent),
            "prompt_length": 0.0,
            "num_turns": float(len(turns)),
            "tool_calls": float(len(statuses)),
            "tool_success": float(sum(status == "ok" for status in statuses)),
            "first_call": first_call,
            "tool_tokens": 0.0,
            "seconds": time.monotonic() - started,
            "timed_out": float(timed_out),
        },
    )
