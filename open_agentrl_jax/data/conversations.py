"""SFT trajectories: conversations with every tool call and every tool result."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from open_agentrl_jax.data.rows import BadRow, Table, decode, read_table, write_parquet
from open_agentrl_jax.types import Message, ToolCall

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass
class Conversation:
    """One trajectory to learn from. `tools` are the schemas that the chat template shows."""

    id: str
    messages: list[Message]
    tools: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    source: str = ""


def read_conversations(path: str | os.PathLike[str]) -> Table[Conversation]:
    """Reads the SFT format of RECIPE.md 7: `messages` and `tools`, as nested columns or as JSON strings.

    Args:
        path: a jsonl, json or parquet file, a folder of them, or a Hub id.

    Returns:
        The conversations, with `.skipped` naming each row that was not used: one without an assistant message, with an
        unknown role, with an unreadable tool call, or with a tool result that no call asked for.

    Raises:
        UserError: as data.rows.read_table.
    """

    def convert(row: dict[str, Any], file: Path, number: int) -> Conversation:
        messages, tools = (_column(row.get(name), file) for name in ("messages", "tools"))
        if not isinstance(messages, list) or not messages:
            raise BadRow("no messages: the column must be a list of {role, content}")
        tools = tools or []
        if not isinstance(tools, list):
            raise BadRow("tools must be a list of schemas")
        tools = [t for t in map(decode, tools) if isinstance(t, dict)]
        source = str(row.get("data_source") or row.get("source") or file.stem)
        conversation = Conversation(
            f"{source}/{row.get('id') or number}", [from_chat(m) for m in messages], tools, source
        )
        _check(conversation.messages)
        return conversation

    return read_table(path, convert)


def write_conversations(
    path: str | os.PathLike[str], conversations: list[Conversation], extra: list[dict[str, Any]] | None = None
) -> None:
    """Writes the SFT parquet that `read_conversations` reads; `extra` adds columns, one dictionary a conversation."""
    rows = []
    for c, more in zip(conversations, extra or [{}] * len(conversations), strict=True):
        chat, tools = (_text(x) for x in ([m.to_chat() for m in c.messages], c.tools))
        rows.append({"id": c.id, "data_source": c.source, "messages": chat, "tools": tools, **more})
    write_parquet(path, rows)


def _text(value: Any) -> str:
    """JSON; half a surrogate pair, which a model can write and no file can hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


def _column(value: Any, file: Path) -> Any:
    """A column's value. Nulls of a nested parquet column come from its schema; any other null belongs to the row."""
    if file.suffix == ".parquet" and not isinstance(value, str):
        return prune(value)
    return decode(value)


def prune(value: Any) -> Any:
    """A copy without nulls: a parquet schema gives every row the keys of all other rows."""
    if isinstance(value, dict):
        return {k: prune(v) for k, v in value.items() if v is not None}
    return [prune(v) for v in value] if isinstance(value, list) else value


def from_chat(raw: Any) -> Message:
    """The inverse of Message.to_chat. Raises BadRow for anything that is no message."""
    raw = decode(raw)
    if not isinstance(raw, dict) or raw.get("role") not in ROLES:
        raise BadRow(f"a message must be an object whose role is one of {', '.join(ROLES)}")
    calls = decode(raw.get("tool_calls")) or []
    if not isinstance(calls, list):
        raise BadRow("tool_calls must be a list")
    content, reasoning = _words(raw.get("content")), _words(raw.get("reasoning_content") or raw.get("reasoning"))
    return Message(raw["role"], content, [_call(c) for c in calls], reasoning if raw["role"] == "assistant" else "")


def _words(content: Any) -> str:
    """The text of a content field: text, or a list of parts."""
    if content is None or isinstance(content, str | int | float):
        return "" if content is None else str(content)
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow("content must be text, or a list of text parts")
    return "".join(texts)  # type: ignore[arg-type]  (checked above)


def _call(raw: Any) -> ToolCall:
    raw = decode(raw)
    function = decode(raw.get("function", raw)) if isinstance(raw, dict) else None
    if not isinstance(function, dict) or not function.get("name"):
        raise BadRow("a tool call has no name")
    arguments = decode(function.get("arguments") or {})
    if not isinstance(arguments, dict):
        raise BadRow(f"the arguments of tool call {function['name']} are no object")
    return ToolCall(str(function["name"]), arguments)


def _check(messages: list[Message]) -> None:
    """Every conversation has something to train on, and every tool result an assistant before it."""
    previous = ""
    for message in messages:
        if message.role == "tool" and previous not in ("assistant", "tool"):
            raise BadRow("a tool result does not follow an assistant message")
        if message.role == "assistant" and not (message.content.strip() or message.tool_calls):
            raise BadRow("an assistant message is empty")
        previous = message.role
    if not any(m.role == "assistant" for m in messages):
        raise BadRow("no assistant message: nothing to train on")
