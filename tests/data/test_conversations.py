import json

import pytest

from open_agentrl_jax.data.conversations import Conversation, prune, read_conversations, write_conversations
from open_agentrl_jax.data.prompts import read_conversations as also_here
from open_agentrl_jax.data.rows import write_parquet
from open_agentrl_jax.types import Message, ToolCall, UserError

TOOL = {
    "type": "function",
    "function": {"name": "python", "parameters": {"type": "object", "properties": {"code": {"type": "string"}}}},
}
CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "print(6 * 7)"}}}
CHAT = [
    {"role": "system", "content": "Use the tool."},
    {"role": "user", "content": "What is 6 times 7?"},
    {"role": "assistant", "content": "I compute.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "42"},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "\\boxed{42}"},
]
MESSAGES = [
    Message("system", "Use the tool."),
    Message("user", "What is 6 times 7?"),
    Message("assistant", "I compute.", [ToolCall("python", {"code": "print(6 * 7)"})] * 2),
    Message("tool", "42"),
    Message("tool", "42"),
    Message("assistant", "\\boxed{42}"),
]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_nested_and_json_columns_and_both_kinds_of_arguments(tmp_path):
    spelled = json.loads(json.dumps(CHAT))
    spelled[2]["tool_calls"][0]["function"]["arguments"] = '{"code": "print(6 * 7)"}'
    spelled[2]["tool_calls"][1] = {"name": "python", "arguments": {"code": "print(6 * 7)"}}
    spelled[1]["content"] = [{"type": "text", "text": "What is 6 "}, {"type": "text", "text": "times 7?"}]
    rows = [
        {"messages": CHAT, "tools": [TOOL]},
        {"messages": json.dumps(CHAT), "tools": json.dumps([TOOL])},
        {"messages": spelled, "tools": [json.dumps(TOOL)]},
    ]
    table = read_conversations(write(tmp_path / "a.jsonl", rows))
    assert [c.messages for c in table] == [MESSAGES] * 3
    assert [c.tools for c in table] == [[TOOL]] * 3
    assert [c.id for c in table] == ["a/1", "a/2", "a/3"]


def test_a_parquet_with_its_nulls(tmp_path):
    chat = json.loads(json.dumps(CHAT))
    chat[2]["tool_calls"][1]["function"]["arguments"] = {"text": "other"}  # the schema gives each call both keys
    write_parquet(tmp_path / "a.parquet", [{"messages": chat, "tools": [TOOL]}])
    (c,) = read_conversations(tmp_path / "a.parquet")
    assert [call.arguments for call in c.messages[2].tool_calls] == [{"code": "print(6 * 7)"}, {"text": "other"}]
    assert c.messages[0] == MESSAGES[0] and c.tools == [TOOL]


def test_what_is_written_is_read_back_equal(tmp_path):
    written = [Conversation("s/1", MESSAGES, [TOOL], "s"), Conversation("t/x", MESSAGES[:3] + MESSAGES[5:], [], "t")]
    write_conversations(tmp_path / "a.parquet", written, [{"accuracy": 1.0}, {"accuracy": 0.0}])
    assert [(c.messages, c.tools, c.source) for c in also_here(tmp_path / "a.parquet")] == [
        (c.messages, c.tools, c.source) for c in written
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no messages"),
        ({"messages": []}, "no messages"),
        ({"messages": "text"}, "no messages"),
        ({"messages": CHAT[:2]}, "nothing to train on"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role"),
        ({"messages": [*CHAT[:2], CHAT[3], CHAT[5]]}, "does not follow"),
        ({"messages": [CHAT[1], {"role": "assistant", "content": " "}]}, "empty"),
        ({"messages": [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]}, "no name"),
        ({"messages": [CHAT[1], {**CHAT[2], "tool_calls": [{"name": "p", "arguments": "[1]"}]}]}, "no object"),
        ({"messages": CHAT, "tools": {"a": 1}}, "list of schemas"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, CHAT[5]]}, "list of text parts"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(tmp_path, row, reason):
    file = write(tmp_path / "a.jsonl", [{"messages": CHAT}, row])
    table = read_conversations(file)
    assert len(table) == 1 and table.skipped[0].startswith(f"{file} row 2: ") and reason in table.skipped[0]


def test_nothing_of_a_row_is_lost_silently(tmp_path):
    call = {"name": "python", "arguments": '{"code": "a\nb", "seed": null}'}  # a raw line break in JSON text
    chat = [
        {"role": "user", "content": ["What is ", {"type": "text", "text": "6 times 7?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "I need code.", "tool_calls": [call]},
        {"role": "tool", "content": 42},
        {"role": "assistant", "content": "42"},
    ]
    right = [
        Message("user", "What is 6 times 7?"),
        Message("assistant", "", [ToolCall("python", {"code": "a\nb", "seed": None})], reasoning="I need code."),
        Message("tool", "42"),
        Message("assistant", "42"),
    ]
    schema = {"type": "function", "function": {"name": "python", "parameters": {"default": None}}}
    (c,) = read_conversations(write(tmp_path / "a.jsonl", [{"messages": chat, "tools": [schema]}]))
    assert c.messages == right and c.tools == [schema]
    write_conversations(tmp_path / "b.parquet", [c])
    (c,) = read_conversations(tmp_path / "b.parquet")
    assert c.messages == right and c.tools == [schema]


def test_no_row_at_all_is_an_error(tmp_path):
    with pytest.raises(UserError, match="empty"):
        read_conversations(write(tmp_path / "a.jsonl", [{"messages": CHAT[:2]}]))


def test_prune():
    assert prune({"a": None, "b": [{"c": None, "d": 0}], "e": ""}) == {"b": [{"d": 0}], "e": ""}
