"""The OpenAI chat protocol: bodies to messages and back. Shared by the agent's endpoint and the capturing one."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from open_agentrl_jax.types import Message, ToolCall, UserError

TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image_url", "input_image", "image")


class ImageError(UserError):
    """A message holds something other than text."""


async def read_json(request: web.Request) -> Any:
    """The body of a request.

    Raises:
        UserError: it is not JSON, or not declared as JSON (a form of another site's page is not).
    """
    if "Content-Type" not in request.headers:
        raise UserError("Content-Type is missing; send application/json")
    if request.content_type != "application/json" or "Content-Encoding" in request.headers:
        error = {"message": "send the body as Content-Type: application/json, without Content-Encoding"}
        raise web.HTTPUnsupportedMediaType(text=json.dumps({"error": error}), content_type="application/json")
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None


def read_text(content: Any, where: str) -> str | None:
    """Text given as a string or as text parts; None if it is neither.

    Raises:
        ImageError: a part is an image.
        UserError: the text is no valid Unicode.
    """
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = [part.get("type") for part in content]
        if any(kind in IMAGE_PARTS for kind in kinds):
            raise ImageError(f"{where}: holds an image; the model reads text only")
        content = "".join(str(p.get("text", "")) for p in content) if all(k in TEXT_PARTS for k in kinds) else None
    if not isinstance(content, str):
        return None
    if any("\ud800" <= letter <= "\udfff" for letter in content):
        raise UserError(f"{where}: content has half a surrogate pair, which is not text")
    return content


def read_messages(given: Any) -> list[Message]:
    """The messages of a request, calls and tool results included.

    Results stand in the order of the calls, whatever the order in which the client sends them.

    Raises:
        UserError: a message is malformed, or a result answers no call.
    """
    if not isinstance(given, list) or not given:
        raise UserError("messages: missing; give a list of {role, content}")
    messages: list[Message] = []
    calls: list[str] = []  # ids of the calls of the last assistant message
    results: list[tuple[int, Message]] = []
    for i, item in enumerate(given):
        where = f"messages[{i}]"
        role = item.get("role") if isinstance(item, dict) else None
        text = read_text(item.get("content"), where) if isinstance(item, dict) else None
        if role == "assistant" and item.get("content") is None:
            text = ""
        if role not in ("system", "developer", "user", "assistant", "tool") or text is None:
            raise UserError(f"{where}: give role (system, user, assistant, tool) and content as text")
        if role == "tool":
            if item.get("tool_call_id") not in calls:
                raise UserError(f"{where}: tool_call_id {item.get('tool_call_id')!r} is of no call of the turn before")
            results.append((calls.index(item["tool_call_id"]), Message("tool", text)))
            continue
        messages += [message for _, message in sorted(results, key=lambda result: result[0])]
        results = []
        made = Message("system" if role == "developer" else role, text)
        if role == "assistant":
            wanted = item.get("tool_calls") or []
            calls = [str(call.get("id")) if isinstance(call, dict) else "" for call in wanted]
            made.tool_calls = [_read_call(call, where) for call in wanted]
        messages.append(made)
    return messages + [message for _, message in sorted(results, key=lambda result: result[0])]


def _read_call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call needs function.name and function.arguments")
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (ValueError, TypeError) as error:
        return ToolCall(function["name"], error=f"the arguments are not valid JSON: {error}")
    return ToolCall(function["name"], arguments if isinstance(arguments, dict) else {})


def write_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls as the protocol writes them, each with a new id."""
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in calls
    ]


class Chunks:
    """The fields that the whole answer and its chunks share."""

    def __init__(self, model: str):
        self.common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        """One server-sent event."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return event({**self.common, "object": "chat.completion.chunk", "choices": [choice], **more})

    def whole(self, message: dict[str, Any], finish: str, **more: Any) -> web.Response:
        """The answer in one piece."""
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return web.json_response({**self.common, "object": "chat.completion", "choices": [choice], **more})


DONE = b"data: [DONE]\n\n"
STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}


def event(data: dict[str, Any], name: str = "") -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Token counts as the protocol names them."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def refusal(status: int, text: str, *, kind: str = "invalid_request_error", code: str | None = None) -> web.Response:
    """An error as the protocol writes it."""
    return web.json_response({"error": {"message": text, "type": kind, "code": code}}, status=status)
