"""A teacher behind an OpenAI-compatible endpoint: its HTTP client, and its policy for agent.episode.

Errors, replies that are no completion, and silence are retried with growing pauses and counted. A request that fails
for good raises `EngineError`, which masks the episode: it is never the model's mistake, and never an endless wait.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from open_agentrl_jax.agent.calls import parse_any_format
from open_agentrl_jax.agent.episode import Reply
from open_agentrl_jax.collect.journal import tokenless
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.types import Message, Sampling, ToolCall, Trajectory, Turn, UserError

ATTEMPTS = 6
LONGEST_PAUSE = 30.0  # seconds
MAX_BODY = 32 << 20  # bytes of one reply
IN_A_ROW = 25  # consecutive failed calls after which the command gives up
PASSING = {408, 409, 425, 429}  # statuses worth another attempt, besides 5xx
CURES = {
    401: "set OPENAI_API_KEY to a key that it takes",
    403: "set OPENAI_API_KEY to a key that may use this model",
    404: "check the address, which mostly ends in /v1, and the model's name",
}


class Nonsense(ValueError):
    """A reply that is no chat completion."""


class Failure(Exception):
    """A request failed; `passing` where another attempt may succeed."""

    def __init__(self, text: str, *, passing: bool):
        super().__init__(text)
        self.passing = passing


class ChatEndpoint:
    """Chat completions of one model; concurrent requests of one event loop are safe."""

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
            model: its name on the server.
            key: sent as a bearer token; empty: none.
            timeout: seconds of one attempt, all of it.
            pause: seconds; attempt n waits a random time of at most pause * 2**(n - 1).
            transport: in place of the network.

        Raises:
            UserError: `url` is not a URL of http or https.
        """
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError):
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UserError(f"endpoint {url!r} is not a URL; give one such as https://host/v1")
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
            EngineError: no usable reply after ATTEMPTS, or the server refuses this request.
            UserError: the server refuses every request (key, address, model), or IN_A_ROW calls failed.
        """
        body: dict[str, Any] = {"model": self.model, "messages": messages, "seed": sampling.seed}
        body |= {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
        if tools:
            body["tools"] = tools
        self.counts["calls"] += 1

        def count_retry(state: RetryCallState) -> None:
            self.counts["retries"] += 1

        try:
            reply = await AsyncRetrying(
                stop=stop_after_attempt(ATTEMPTS),
                wait=wait_random_exponential(multiplier=self._pause, max=LONGEST_PAUSE),
                retry=retry_if_exception(lambda error: isinstance(error, Failure) and error.passing),
                before_sleep=count_retry,
                reraise=True,
            )(self._attempt, body)
        except Failure as failure:
            self.counts["failed"] += 1
            self._row += 1
            if self._row >= IN_A_ROW:
                raise UserError(
                    f"endpoint {self.url}: {self._row} calls in a row failed, the last with {failure}; finished "
                    "replies are kept: run the same command again when the server is well"
                ) from failure
            raise EngineError(f"{self.url}: {failure}") from failure
        self._row = 0
        return reply

    async def _attempt(self, body: dict[str, Any]) -> Reply:
        """One request. Raises Failure, or UserError where the server will take no request."""
        try:
            async with asyncio.timeout(self._timeout):
                status, text = await self._post(body)
            if status == 200:
                return read_reply(text, body.get("tools", ()))
            reason = f"status {status}"
        except (httpx.HTTPError, TimeoutError) as error:
            status, reason, text = 0, type(error).__name__, str(error)
        except Nonsense as error:
            status, reason, text = 0, "nonsense", str(error)
        self.counts[reason] += 1
        detail = " ".join(text.split())[:200]
        if status in CURES:
            raise UserError(f"endpoint {self.url}: {reason} ({detail}); {CURES[status]}")
        raise Failure(f"{reason} ({detail})", passing=not 0 < status < 500 or status in PASSING)

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


def read_reply(text: str, tools: Sequence[dict[str, Any]] = ()) -> Reply:
    """Reads a chat completion.

    Args:
        text: the body of the response.
        tools: the schemas that were sent.

    Raises:
        Nonsense: the body is no completion, or has neither words nor calls.
    """
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
        content, calls = parse_any_format(content, tools)
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


class MessagePolicy:
    """A policy of agent.episode that exchanges messages; its trajectories have no tokens.

    The response budget counts the tokens that the server reports for its own turns.
    """

    def __init__(self, ask: Callable[[list[dict[str, Any]], Sampling], Awaitable[Reply]], sampling: Sampling):
        """Binds one episode.

        Args:
            ask: returns the next message; `ChatEndpoint.reply`, perhaps with a journal around it.
            sampling: `max_tokens` is set call by call.
        """
        self._ask, self._sampling = ask, sampling
        self._messages: list[Message] = []
        self.length = 0

    def start(self, messages: Sequence[Message]) -> None:
        """See episode.Policy."""
        self._messages = list(messages)

    async def reply(self, room: int) -> Reply:
        """See episode.Policy."""
        reply = await self._ask(wire(self._messages), dataclasses.replace(self._sampling, max_tokens=room))
        self.length += reply.tokens
        self._messages.append(Message("assistant", reply.content, reply.calls))
        return reply

    def extend(self, messages: Sequence[Message], limit: int) -> bool:
        """See episode.Policy; a server counts the tokens of messages itself."""
        self._messages += messages
        return True

    def trajectory(self, turns: list[Turn], stop: str, limit: int) -> Trajectory:
        """See episode.Policy."""
        metrics = {"response_length": float(self.length), "prompt_length": 0.0, "tool_tokens": 0.0}
        return tokenless(turns, stop, metrics=metrics)

    async def close(self) -> None:
        """Nothing is held."""
