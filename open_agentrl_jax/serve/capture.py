"""An OpenAI endpoint for agents in training: it answers with the policy and keeps the tokens of every answer.

Each episode has a base URL and a key of its own, and its requests reach its own transcript (agent/transcript.py) alone.
Served are POST chat/completions and responses (whole and streamed, tools, parallel calls, stop) and GET models.
A request that cannot be served gets an error that no client repeats, apart from 429 (too many at once) and 503 (the
engine failed).
"""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from aiohttp import web

from open_agentrl_jax import guard
from open_agentrl_jax.agent.harness import Access
from open_agentrl_jax.agent.transcript import STATUS, Answer, Refusal, Request, Transcript
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.serve import responses
from open_agentrl_jax.serve.protocol import (
    DONE,
    STREAM,
    Chunks,
    ImageError,
    read_json,
    read_messages,
    refusal,
    usage,
    write_calls,
)
from open_agentrl_jax.types import UserError

MODEL = "policy"  # the only model that is served
MAX_BODY = 32 << 20  # bytes
UNSUPPORTED = ("functions", "logprobs", "logit_bias", "audio", "web_search_options")


@dataclasses.dataclass
class _Opened:
    key: str
    transcript: Transcript
    kept: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)  # response id -> its conversation


class Capture:
    """The endpoint. It lives in the event loop that starts it."""

    def __init__(self) -> None:
        self._episodes: dict[str, _Opened] = {}
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY)
        app.add_routes(
            [
                web.post("/{episode}/v1/chat/completions", self._chat),
                web.post("/{episode}/v1/responses", self._respond),
                web.get("/{episode}/v1/models", self._models),
            ]
        )
        # A client that disconnects cancels its request.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        self._address = ""

    async def start(self, host: str = "127.0.0.1") -> None:
        """Listens on a free port of `host`."""
        await self._runner.setup()
        await web.TCPSite(self._runner, host, 0).start()
        self._address = f"http://{host}:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Stops listening."""
        await self._runner.cleanup()

    async def open(self, transcript: Transcript) -> Access:
        """Admits an episode; the first one starts the endpoint."""
        if not self._address:
            self._address = "starting"
            await self.start()
        while self._address == "starting":
            await _moment()
        name, key = secrets.token_hex(8), f"sk-{secrets.token_hex(24)}"
        self._episodes[name] = _Opened(key, transcript)
        return Access(f"{self._address}/{name}/v1", key, MODEL)

    def shut(self, access: Access) -> None:
        """Refuses the key of an episode from now on."""
        self._episodes.pop(access.url.split("/")[-2], None)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        opened = self._episodes.get(request.match_info.get("episode", ""))
        if opened is None or not guard.matches(request.headers.get("Authorization", ""), opened.key):
            message = "unknown episode or key: use OPENAI_BASE_URL and OPENAI_API_KEY of the environment"
            return refusal(401, message, kind="authentication_error", code="invalid_api_key")
        try:
            try:
                return await handler(request)
            except ImageError as error:
                raise opened.transcript.refuse("client_images", str(error)) from None
            except UserError as error:
                raise opened.transcript.refuse("client_request", str(error)) from None
        except Refusal as error:
            status, code = STATUS.get(error.reason, (400, "episode_over"))
            kind = "rate_limit_error" if status == 429 else "invalid_request_error"
            return refusal(status, str(error), kind=kind, code=code)
        except EngineError as error:
            return refusal(503, f"the engine failed: {error}", kind="server_error", code="engine_failed")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        opened = self._episodes[request.match_info["episode"]]
        body = await read_json(request)
        wanted = read_request(opened.transcript, body)
        made = Chunks(MODEL)
        if not body.get("stream"):
            answer = await opened.transcript.complete(wanted)
            return made.whole(message_of(answer), answer.finish, usage=counts(answer))
        response = web.StreamResponse(headers=STREAM)

        async def listen(text: str) -> None:
            if not response.prepared:  # refusals are sent with a status of their own, before the first word
                await response.prepare(request)
                await response.write(made.chunk({"role": "assistant", "content": ""}))
            if text:
                await response.write(made.chunk({"content": text}))

        answer = await opened.transcript.complete(wanted, listen)
        await listen("")
        for i, call in enumerate(write_calls(answer.calls)):
            await response.write(made.chunk({"tool_calls": [{"index": i, **call}]}))
        await response.write(made.chunk({}, answer.finish))
        if (body.get("stream_options") or {}).get("include_usage"):
            await response.write(made.chunk({}, choices=[], usage=counts(answer)))
        await response.write(DONE)
        await response.write_eof()
        return response

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        opened = self._episodes[request.match_info["episode"]]
        body = await read_json(request)
        chat = responses.as_chat(body, opened.kept)
        wanted = read_request(opened.transcript, chat)
        made = responses.Made(MODEL)
        if not body.get("stream"):
            whole = made.whole(await opened.transcript.complete(wanted))
            opened.kept[made.id] = [*chat["messages"], made.message]
            return web.json_response(whole)
        response = web.StreamResponse(headers=STREAM)

        async def listen(text: str) -> None:
            if not response.prepared:
                await response.prepare(request)
                await response.write(made.begin())
            await response.write(made.words(text))

        answer = await opened.transcript.complete(wanted, listen)
        if not response.prepared:
            await response.prepare(request)
            await response.write(made.begin())
        await response.write(made.end(answer))
        opened.kept[made.id] = [*chat["messages"], made.message]
        await response.write_eof()
        return response

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "run"}]})


async def _moment() -> None:
    import asyncio

    await asyncio.sleep(0.01)


def read_request(transcript: Transcript, body: Any) -> Request:
    """Validates a body of chat/completions.

    Sampling parameters are ignored: the answers are trained on, so the run's own sampling decides.

    Raises:
        Refusal: another model is named.
        UserError: a field is wrong or not supported.
    """
    if not isinstance(body, dict):
        raise UserError("the body is not an object")
    if body.get("model", MODEL) != MODEL:
        raise transcript.refuse("client_model", f"model {body['model']!r} is not served; use OPENAI_MODEL={MODEL}")
    for name in UNSUPPORTED:
        if body.get(name):
            raise UserError(f"{name}: not supported; leave it out")
    if body.get("n", 1) not in (1, None):
        raise UserError("n: only 1 is supported; send the request again for another answer")
    if (body.get("response_format") or {}).get("type", "text") != "text":
        raise UserError("response_format: only text is supported; leave it out")
    messages = read_messages(body.get("messages"))
    if messages[-1].role == "assistant":
        raise UserError("messages: the last one must not be the assistant's")
    tools, choice = body.get("tools") or [], body.get("tool_choice") or "auto"
    if choice not in ("auto", "none"):
        raise UserError("tool_choice: only auto and none are supported; the policy decides what it calls")
    if not isinstance(tools, list) or not all(_is_tool(tool) for tool in tools):
        raise UserError('tools: give a list of {"type": "function", "function": {"name": ..., "parameters": ...}}')
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise UserError(f"max_tokens: {limit!r}; give a whole number")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise UserError("stop: give a text or a list of texts")
    one_call = body.get("parallel_tool_calls") is False
    return Request(messages, tools if choice == "auto" else [], limit, tuple(stop), one_call)


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def message_of(answer: Answer) -> dict[str, Any]:
    """The assistant's message of an answer."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content or None, "refusal": None}
    return message | ({"tool_calls": write_calls(answer.calls)} if answer.calls else {"content": answer.content})


def counts(answer: Answer) -> dict[str, int]:
    """The usage of an answer."""
    return usage(answer.prompt_tokens, answer.completion_tokens)
