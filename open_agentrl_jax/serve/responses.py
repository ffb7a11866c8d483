"""The Responses API in terms of chat completions: requests become chat bodies, answers become response objects."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from open_agentrl_jax.agent.transcript import Answer
from open_agentrl_jax.serve.protocol import event, write_calls
from open_agentrl_jax.types import UserError

UNSUPPORTED = ("background", "conversation", "prompt", "include_obfuscation")


def as_chat(body: Any, kept: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The body of chat/completions that asks for the same.

    Args:
        body: of a request to /responses.
        kept: the conversations that `previous_response_id` may continue.

    Raises:
        UserError: a field or an input item is not supported.
    """
    if not isinstance(body, dict):
        raise UserError("the body is not an object")
    for name in UNSUPPORTED:
        if body.get(name):
            raise UserError(f"{name}: not supported; leave it out")
    if ((body.get("text") or {}).get("format") or {}).get("type", "text") != "text":
        raise UserError("text.format: only text is supported; leave it out")
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        raise UserError("input: missing; give a text or a list of items")
    messages: list[dict[str, Any]] = []
    if previous := body.get("previous_response_id"):
        if previous not in kept:
            raise UserError(f"previous_response_id: {previous!r} is of no response of this episode")
        messages = [dict(message) for message in kept[previous]]
    elif body.get("instructions"):
        messages = [{"role": "system", "content": body["instructions"]}]
    for i, item in enumerate(items):
        _add(messages, item, f"input[{i}]")
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.get("tools") or [])]
    shared = {name: body[name] for name in ("model", "tool_choice", "parallel_tool_calls") if name in body}
    return {**shared, "messages": messages, "tools": tools, "max_tokens": body.get("max_output_tokens")}


def _add(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """Appends an input item; the words and calls of one assistant turn are items of their own."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "reasoning":
        return
    if kind == "function_call":
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", []), call]
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind == "message":
        messages.append({"role": item.get("role"), "content": item.get("content")})
    else:
        raise UserError(f"{where}: items of type {kind!r} are not supported")


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise UserError(f"{where}: only tools of type function are supported; run others in the client")
    names = ("name", "description", "parameters")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


class Made:
    """One response: whole, or as the events of a stream."""

    def __init__(self, model: str):
        self.id = f"resp_{uuid.uuid4().hex}"
        self.message: dict[str, Any] = {}  # of the assistant, in the form of chat completions
        self._item, self._number, self._text, self._opened = f"msg_{uuid.uuid4().hex}", 0, "", False
        self._common = {"id": self.id, "object": "response", "created_at": time.time(), "model": model}
        self._common |= {"error": None, "instructions": None, "metadata": {}, "tools": [], "tool_choice": "auto"}
        self._common |= {"parallel_tool_calls": True, "temperature": None, "top_p": None}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The response object."""
        calls = write_calls(answer.calls)
        self.message = {"role": "assistant", "content": answer.content, **({"tool_calls": calls} if calls else {})}
        output = [self._words(answer.content)] if answer.content or not calls else []
        for call in calls:
            item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call["id"]}
            output.append({**item, **call["function"], "status": "completed"})
        cut = answer.finish == "length"
        total = answer.prompt_tokens + answer.completion_tokens
        return {
            **self._common,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "usage": {
                "input_tokens": answer.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": answer.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": total,
            },
        }

    def begin(self) -> bytes:
        """The first event."""
        started = {**self._common, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        return self._event("response.created", response=started)

    def words(self, text: str) -> bytes:
        """Events for more text."""
        made = b""
        if not self._opened:
            self._opened = True
            item = {**self._words(""), "status": "in_progress", "content": []}
            part = {"type": "output_text", "text": "", "annotations": []}
            made += self._event("response.output_item.added", output_index=0, item=item)
            made += self._event("response.content_part.added", **self._place(), part=part)
        self._text += text
        return made + self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def end(self, answer: Answer) -> bytes:
        """The last events."""
        whole, made = self.whole(answer), b""
        if whole["output"] and whole["output"][0]["type"] == "message":
            made += b"" if self._opened else self.words(answer.content)
            part = whole["output"][0]["content"][0]
            made += self._event("response.output_text.done", **self._place(), text=answer.content, logprobs=[])
            made += self._event("response.content_part.done", **self._place(), part=part)
        for i, item in enumerate(whole["output"]):
            if item["type"] == "function_call":
                made += self._event("response.output_item.added", output_index=i, item={**item, "arguments": ""})
                place = {"item_id": item["id"], "output_index": i}
                made += self._event(
                    "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
                )
            made += self._event("response.output_item.done", output_index=i, item=item)
        return made + self._event(f"response.{whole['status']}", response=whole)

    def _words(self, text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": []}
        return {"type": "message", "id": self._item, "role": "assistant", "status": "completed", "content": [part]}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)
