"""Templates to tokens and back; ids equal the template's own rendering; calls are read or told why not."""

import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_agentrl_jax.agent.chat import Chat, parse_tool_calls
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.types import Message, ToolCall, UserError

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "qwen3-tokenizer"
CALL = ToolCall(PythonTool.name, {"code": "print(1 + 2)"})


def conversation():
    return [
        Message("user", "Ada has 1 card and finds 2 more. How many now?"),
        Message("assistant", "I add.", [CALL, CALL]),
        Message("tool", "3\n"),
        Message("tool", "3\n"),
        Message("assistant", "The answer is \\boxed{3}."),
    ]


def grown(chat, messages):
    """The ids as an episode grows them: a prompt, sampled turns with their stop token, what follows each."""
    ids = chat.prompt(messages[:1])
    place = 1
    while place < len(messages):
        said = chat.render([messages[0], messages[place]], generate=False)
        said = said.rpartition(chat.render(messages[:1], generate=True))[2] or said
        text = said[: said.rindex(chat.tokenizer.decode([chat.turn_end]))]
        text = text.removeprefix("<think>\n\n</think>\n\n") if place + 1 < len(messages) else text
        ids += [*chat.encode(text), chat.turn_end]
        place += 1
        tools = []
        while place < len(messages) and messages[place].role == "tool":
            tools.append(messages[place])
            place += 1
        ids += chat.following(tools) if tools else chat.ending
    return ids


@pytest.mark.parametrize("kind", ["tokenizer", "thinking_tokenizer"])
def test_grown_ids_equal_the_templates_rendering(kind, request):
    """Fault 11 of the reference: it omits the newline after the model's stop token."""
    chat = Chat(request.getfixturevalue(kind), [PythonTool.schema])
    messages = conversation()
    assert grown(chat, messages) == chat.encode(chat.render(messages, generate=False))


def test_the_reference_fault_is_there_when_asked_for(tokenizer):
    right, wrong = Chat(tokenizer), Chat(tokenizer, omit_newline=True)
    tool = [Message("tool", "3")]
    assert right.following(tool) == right.encode("\n") + wrong.following(tool)


@pytest.mark.skipif(not SHARED.exists(), reason="the real Qwen3 tokenizer is not part of the project")
def test_the_real_qwen3_template():
    from transformers import AutoTokenizer

    chat = Chat(AutoTokenizer.from_pretrained(SHARED), [PythonTool.schema])
    messages = conversation()
    assert grown(chat, messages) == chat.encode(chat.render(messages, generate=False))
    ids, mask = chat.conversation(messages)
    trained = chat.tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert trained.startswith("I add.\n<tool_call>") and trained.endswith("\\boxed{3}.<|im_end|>")


def test_what_trains_of_a_conversation(tokenizer):
    """Fault 2 of the reference: the first assistant token never trained, the one after each turn did."""
    chat = Chat(tokenizer, [PythonTool.schema])
    ids, mask = chat.conversation(conversation())
    runs, run = [], []
    for token, trains in [*zip(ids, mask, strict=True), (0, False)]:
        if trains:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    call = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(1 + 2)"}}\n</tool_call>'
    assert runs == [f"I add.\n{call}\n{call}<|im_end|>", "The answer is \\boxed{3}.<|im_end|>"]


def test_a_tokenizer_without_template_is_refused(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template; add chat_template"):
        Chat(bare)


def test_a_call_with_words_around_it():
    content, calls = parse_tool_calls('Let me see. <tool_call>{"name": "f", "arguments": {"x": [1]}}</tool_call> So.')
    assert content == "Let me see.  So." and calls == [ToolCall("f", {"x": [1]})]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<tool_call>{bad}</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "f"', "not closed"),
        ("<tool_call>[1]</tool_call>", "must be an object"),
        ('<tool_call>{"arguments": {}}</tool_call>', "must be an object"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "arguments must be an object"),
        ('<tool_call>{"name": "f", "arguments": "{"}</tool_call>', "arguments are not valid JSON"),
        ('<tool_call>{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "f", "arguments": "' + "9" * 5000 + '"}</tool_call>', "arguments are not valid JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON"),
    ],
)
def test_an_unreadable_call_says_why(text, told):
    """Fault 13 of the reference: one unparseable call ended the episode silently."""
    _, (call,) = parse_tool_calls(text)
    assert told in call.error


def test_good_and_bad_calls_of_one_turn_all_survive():
    good = '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>'
    content, calls = parse_tool_calls(f"{good}\n<tool_call>oops</tool_call>\n{good}")
    assert content == "" and [bool(c.error) for c in calls] == [False, True, False]
    assert calls[0].arguments == {"x": 1}


def test_a_raw_line_break_in_code_is_read():
    _, (call,) = parse_tool_calls('<tool_call>{"name": "f", "arguments": {"code": "a\nb"}}</tool_call>')
    assert call.arguments["code"] == "a\nb"


def test_a_thought_is_not_a_call():
    thought = '<think>maybe <tool_call>{"name": "f"}</tool_call></think>'
    content, calls = parse_tool_calls(f"{thought}No.")
    assert calls == [] and content == f"{thought}No."


@given(st.text(max_size=60))
def test_no_text_breaks_the_parser(text):
    content, calls = parse_tool_calls(f"<tool_call>{text}</tool_call>")
    assert isinstance(content, str) and all(isinstance(c, ToolCall) for c in calls)


@given(code=st.text(max_size=40))
def test_calls_survive_the_round_trip(code):
    text = f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': {'code': code}})}\n</tool_call>"
    if "</tool_call>" not in code and "<tool_call>" not in code and "</think>" not in code:
        assert parse_tool_calls(text) == ("", [ToolCall("f", {"code": code})])


def test_long_output_is_cut_in_the_middle_and_says_so(tokenizer):
    """Fault 5 of the reference: 256 characters, silently."""
    chat = Chat(tokenizer)
    text = " ".join(str(i) for i in range(500))
    short = chat.shorten(text, 60)
    assert len(chat.encode(short)) <= 64
    assert short.startswith("0 1 2") and short.endswith("499") and "tokens cut from the middle" in short
    assert chat.shorten("brief", 60) == "brief"
