"""The agent behind an OpenAI-compatible endpoint: POST /v1/chat/completions, GET /v1/models, GET /health.

The agent runs its own tools here. Calls and outputs are fenced blocks in the answer's text, so that any client shows
them; the messages themselves are under "agent" in the answer. Unsupported fields are refused by name.

A web page must not reach the agent through its visitor's browser. Without a token, only requests whose Host and Origin
are loopback names pass, which stops DNS rebinding; bodies must be declared as JSON, which stops forms of other sites.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import uuid
from typing import Any

from aiohttp import web

from open_agentrl_jax import guard
from open_agentrl_jax.rollout.engine import seed_of
from open_agentrl_jax.serve.protocol import DONE, STREAM, Chunks, event, read_json, read_text, refusal, usage
from open_agentrl_jax.serve.streaming import Event, Listener, Responder
from open_agentrl_jax.types import Message, Sampling, UserError

FENCES = {"text": "{}", "call": "\n```python\n{}\n```\n", "output": "```output\n{}\n```\n"}
ROLES = ("system", "user", "assistant")
UNSUPPORTED = ("tools", "functions", "logprobs", "response_format", "stop", "logit_bias")
FINISH = {"answer": "stop", "length": "length", "turns": "length", "time": "length"}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Address, bearer token ("" for none), and the temperature of requests that name none."""

    host: str
    port: int
    token: str
    temperature: float


@dataclasses.dataclass(frozen=True)
class Question:
    """A validated request."""

    messages: list[Message]
    sampling: Sampling
    max_tokens: int
    stream: bool


def read_question(body: Any, temperature: float) -> Question:
    """Validates a request body.

    Raises:
        UserError: a field is wrong or not supported.
    """
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise UserError("messages: missing; give a list of {role, content}")
    for name in UNSUPPORTED:
        if body.get(name):
            raise UserError(f"{name}: not supported here (the agent has its own tool); leave it out")
    if body.get("n", 1) not in (1, None):
        raise UserError("n: only 1 is supported; send the request again for another answer")
    messages = []
    for i, message in enumerate(body["messages"]):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        content = read_text(content, f"messages[{i}]")
        if role not in ROLES or content is None:
            raise UserError(f"messages[{i}]: give role ({', '.join(ROLES)}) and content as text")
        messages.append(Message(role, content))
    if messages[-1].role != "user":
        raise UserError("messages: the last one must be the user's")
    numbers = {"temperature": (temperature, 0, 10), "top_p": (1.0, 1e-6, 1), "seed": (0, 0, 2**62)}
    read: dict[str, float] = {}
    for name, (default, low, high) in numbers.items():
        value = default if body.get(name) is None else body[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise UserError(f"{name}: {value!r}; give a number from {low} to {high}")
        read[name] = value
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise UserError(f"max_tokens: {limit!r}; give a whole number")
    # Requests without a seed differ.
    seed = int(read["seed"]) if body.get("seed") is not None else uuid.uuid4().int
    sampling = Sampling(0, float(read["temperature"]), float(read["top_p"]), seed=seed_of(seed))
    return Question(messages, sampling, limit, bool(body.get("stream")))


def make_app(agent: Responder, spec: Spec) -> web.Application:
    """Builds the web application."""

    @web.middleware
    async def admit(request: web.Request, handler: Any) -> web.StreamResponse:
        if spec.token:
            given = request.headers.get("Authorization", "")
            if request.path != "/health" and not guard.matches(given, spec.token):
                return refusal(401, "a bearer token is needed: the server's CHAT_TOKEN")
        elif guard.foreign(request.headers):
            return refusal(403, "Host and Origin must be loopback names; set CHAT_TOKEN to allow others")
        try:
            return await handler(request)
        except UserError as error:
            return refusal(400, str(error))

    async def complete(request: web.Request) -> web.StreamResponse:
        question = read_question(await read_json(request), spec.temperature)
        answer = _Answer(agent.name)
        return await (_streamed if question.stream else _whole)(request, agent, question, answer)

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": agent.name, "object": "model", "owned_by": "run"}]})

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    app = web.Application(middlewares=[admit], client_max_size=8 * 2**20)
    app.add_routes(
        [web.post("/v1/chat/completions", complete), web.get("/v1/models", models), web.get("/health", health)]
    )
    return app


class _Answer(Chunks):
    """One answer as text with fenced blocks."""

    _begun = False

    def words(self, event: Event) -> str:
        """An event as text of the answer; the answer begins without white space."""
        text = FENCES[event.kind].format(event.text)
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return text


async def _played(agent: Responder, question: Question, listen: Listener) -> dict[str, Any]:
    trajectory = await agent.answer(question.messages, question.sampling, listen, max_tokens=question.max_tokens)
    if trajectory.aborted:
        raise RuntimeError("the sandbox or the engine failed, or the answer took too long; try again")
    prompt = int(trajectory.metrics["prompt_length"])
    response = int(trajectory.metrics["response_length"])
    details = {"stop": trajectory.stop, "messages": [message.to_chat() for message in trajectory.said]}
    return {"finish": FINISH[trajectory.stop], "usage": usage(prompt, response), "agent": details}


async def _whole(request: web.Request, agent: Responder, question: Question, answer: _Answer) -> web.StreamResponse:
    text: list[str] = []

    async def listen(event: Event) -> None:
        text.append(answer.words(event))

    try:
        played = await _played(agent, question, listen)
    except RuntimeError as error:
        return refusal(503, str(error))
    message = {"role": "assistant", "content": "".join(text)}
    return answer.whole(message, **played)


async def _streamed(request: web.Request, agent: Responder, question: Question, answer: _Answer) -> web.StreamResponse:
    response = web.StreamResponse(headers=STREAM)

    async def listen(event: Event) -> None:
        if text := answer.words(event):
            await response.write(answer.chunk({"content": text}))

    await response.prepare(request)
    await response.write(answer.chunk({"role": "assistant", "content": ""}))
    try:
        played = await _played(agent, question, listen)
        await response.write(answer.chunk({}, **played))
    except (RuntimeError, UserError) as error:  # the status line is already sent
        await response.write(event({"error": {"message": str(error)}}))
    await response.write(DONE)
    await response.write_eof()
    return response


async def serve(agent: Responder, spec: Spec) -> None:
    """Serves until cancelled; prints the address.

    Raises:
        UserError: other machines can reach the address and there is no token, or the port is taken.
    """
    if not spec.token and not guard.loopback(spec.host):
        raise UserError(f"host {spec.host}: other machines can reach it, so a token is needed: set CHAT_TOKEN")
    # A client that disconnects cancels its answer.
    runner = web.AppRunner(make_app(agent, spec), handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, spec.host, spec.port)
        try:
            await site.start()
        except OSError as error:
            raise UserError(f"port {spec.port}: {error.strerror}; give another port") from None
        port = runner.addresses[0][1]
        print(f"http://{spec.host}:{port}/v1  model {agent.name}", flush=True)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    finally:
        await runner.cleanup()
