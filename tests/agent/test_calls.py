"""Tool calls of each format: read, or returned with an error that explains why not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_agentrl_jax.agent.chat import parse_tool_calls
from open_agentrl_jax.types import ToolCall

SCHEMA = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}, "n": {"type": "integer"}}},
    },
}


def hermes(code):
    return f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': {'code': code}})}\n</tool_call>"


def qwen_xml(code):
    return f"<tool_call>\n<function=f>\n<parameter=code>\n{code}\n</parameter>\n</function>\n</tool_call>"


def llama_json(code):
    return json.dumps({"name": "f", "parameters": {"code": code}})


def pythonic(code):
    return f"[f(code={code!r})]"


WRITERS = {"hermes": hermes, "qwen_xml": qwen_xml, "llama_json": llama_json, "pythonic": pythonic}
CODES = ["print(1)", "print('</tool_call>')", "'<tool_call>'", "'</think>'", "'<think>'", "a\n\n b", "", "\n", "{", "]"]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("format", WRITERS)
def test_calls_survive_the_round_trip(format, code):
    assert parse_tool_calls(WRITERS[format](code), format=format) == ("", [ToolCall("f", {"code": code})])


@given(code=st.text(max_size=40))
def test_any_json_string_survives_the_round_trip(code):
    assert parse_tool_calls(hermes(code)) == ("", [ToolCall("f", {"code": code})])
    assert parse_tool_calls(llama_json(code), format="llama_json") == ("", [ToolCall("f", {"code": code})])


@pytest.mark.parametrize("format", WRITERS)
@given(text=st.text(max_size=60))
def test_no_text_breaks_a_parser(format, text):
    for whole in (text, f"<tool_call>{text}</tool_call>", f"[f({text}", f'{{"name": {text}'):
        content, calls = parse_tool_calls(whole, format=format)
        assert isinstance(content, str) and all(isinstance(c, ToolCall) for c in calls)


@pytest.mark.parametrize("format", WRITERS)
def test_an_answer_is_no_call(format):
    for answer in ("The answer is \\boxed{3}.", '{"x": 1}', "[1, 2]", "print(3)"):
        assert parse_tool_calls(answer, format=format) == (answer, [])


def test_a_call_with_words_around_it():
    content, calls = parse_tool_calls('Let me see. <tool_call>{"name": "f", "arguments": {"x": [1]}}</tool_call> So.')
    assert content == "Let me see.  So." and calls == [ToolCall("f", {"x": [1]})]


@pytest.mark.parametrize(
    ("format", "text", "reason"),
    [
        ("hermes", "<tool_call>{bad}</tool_call>", "not valid JSON"),
        ("hermes", '<tool_call>{"name": "f"', "not closed"),
        ("hermes", '<tool_call>{"name": "f"}', "not closed"),
        ("hermes", '<tool_call>{"name": "f"} more</tool_call>', "text follows"),
        ("hermes", "<tool_call>[1]</tool_call>", "must be an object"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "must be an object"),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "arguments must be an object"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{"}</tool_call>', "arguments are not valid JSON"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>", "not valid JSON"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "' + "9" * 5000 + '"}</tool_call>', "arguments are not"),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON"),
        ("qwen_xml", "<tool_call>{}</tool_call>", "no <function=name>"),
        ("qwen_xml", "<tool_call><function=f><parameter=x>1", "not closed"),
        ("qwen_xml", "<tool_call><function=f>stray</function></tool_call>", "parameters are not written as"),
        ("qwen_xml", "<tool_call><function=f><parameter=n>x</parameter></function></tool_call>", "not a valid integer"),
        ("llama_json", '{"name": "f", "parameters": {"x": ', "not valid JSON"),
        ("llama_json", '{"name": "f", "parameters": [1]}', "arguments must be an object"),
        ("pythonic", "[f(x=", "not a list of Python calls"),
        ("pythonic", "[f(1)]", "given by keyword"),
        ("pythonic", "[f(x=g())]", "must be literals"),
    ],
)
def test_an_unreadable_call_explains_why(format, text, reason):
    """Fault 13 of the reference: one unparseable call ended the episode silently."""
    _, (call,) = parse_tool_calls(text, format=format, tools=[SCHEMA])
    assert reason in call.error


def test_good_and_bad_calls_of_one_turn_all_survive():
    good = '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>'
    content, calls = parse_tool_calls(f"{good}\n<tool_call>oops</tool_call>\n{good}")
    assert content == "" and [bool(c.error) for c in calls] == [False, True, False]
    assert calls[0].arguments == {"x": 1}


def test_a_raw_line_break_in_code_is_read():
    _, (call,) = parse_tool_calls('<tool_call>{"name": "f", "arguments": {"code": "a\nb"}}</tool_call>')
    assert call.arguments["code"] == "a\nb"


CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"<think>maybe {CALL}</think>No.", f"<think>maybe {CALL}</think>No.", 0),
        (f"<think>a</think>{CALL}<think>b</think>", "<think>a</think><think>b</think>", 1),
        (f"<think>the <tool_call> tag</think>{CALL}", "<think>the <tool_call> tag</think>", 1),
        (f"<think>open {CALL}", "<think>open", 1),
        (f"{CALL}</think>", "</think>", 1),
        (f"<think>{hermes('</think>')}</think>No.", f"<think>{hermes('</think>')}</think>No.", 0),
    ],
)
def test_only_closed_thoughts_hide_calls(text, content, calls):
    found = parse_tool_calls(text)
    assert found == (content, [ToolCall("f", {})] * calls)


def test_values_of_qwen_xml_follow_the_schema():
    text = "<tool_call><function=f><parameter=code>1</parameter><parameter=n>2</parameter></function></tool_call>"
    assert parse_tool_calls(text, format="qwen_xml", tools=[SCHEMA])[1] == [ToolCall("f", {"code": "1", "n": 2})]
    assert parse_tool_calls(text, format="qwen_xml")[1] == [ToolCall("f", {"code": "1", "n": "2"})]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("llama_json", '<|python_tag|>{"name": "f", "parameters": {"n": 1}}; {"name": "f", "parameters": {"n": 1}}'),
        ("pythonic", "<|tool_call_start|>[f(n=1), f(n=1)]<|tool_call_end|>"),
        ("pythonic", "<function_calls>\nf(n=1)\nf(n=1)\n</function_calls>"),
    ],
)
def test_parallel_calls_and_wrappers(format, text):
    assert parse_tool_calls(f"<think>t</think>{text}", format=format) == (
        "<think>t</think>",
        [ToolCall("f", {"n": 1})] * 2,
    )


def test_pythonic_reads_the_constants_of_json():
    assert parse_tool_calls("[f(x=true, y=null, z=[False])]", format="pythonic")[1] == [
        ToolCall("f", {"x": True, "y": None, "z": [False]})
    ]
