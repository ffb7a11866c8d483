"""Which templates are taken, which format of calls they write, and our own template beside any ChatML tokenizer."""

import copy

import pytest

from open_agentrl_jax.agent import templates
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.types import Message, ToolCall, UserError

BARE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + BARE
EACH_CALL = "{% for c in m.tool_calls or [] %}{% set f = c.function %}CALL{% endfor %}<|im_end|>"
WRITTEN = {
    "hermes": '<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}</tool_call>',
    "qwen_xml": "<tool_call>\n<function={{ f.name }}>\n"
    "{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n"
    "</parameter>\n{% endfor %}</function>\n</tool_call>",
    "llama_json": '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}',
    "pythonic": "[{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %})]",
    "unknown": "{{ f.name }} with {{ f.arguments }}",
}


def written(name):
    return TOOLS.replace("<|im_end|>", EACH_CALL.replace("CALL", WRITTEN[name]))


def using(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize("name", ["hermes", "qwen_xml", "llama_json", "pythonic"])
def test_the_format_is_the_one_the_template_writes(tokenizer, name):
    chat = Chat(using(tokenizer, written(name)), [PythonTool.schema])
    assert chat.call_format == name
    call = ToolCall(PythonTool.name, {"code": "x = '1'\nprint(x)"})
    ids, mask = chat.conversation([Message("user", "q"), Message("assistant", "", [call])])
    sampled = chat.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert chat.parse(sampled) == ("", [call])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (BARE, "ignores the tools"),
        (TOOLS, "ignores an assistant's tool calls"),
        (written("hermes").replace("in messages", "in messages if m.role != 'tool'"), "ignores tool results"),
        (written("unknown"), "in a format other than hermes"),
        (
            TOOLS.replace("{{ m.content }}", "{{ m.content if not m.tool_calls else m.missing.part }}"),
            "fails on a tool call",
        ),
    ],
)
def test_a_template_that_loses_tools_is_refused_by_name(tokenizer, template, reason):
    with pytest.raises(UserError, match=rf"{reason}.*; set model.template=own, or give a template file"):
        Chat(using(tokenizer, template), [PythonTool.schema])
    Chat(using(tokenizer, BARE))  # nothing is lost where no tools are shown


def test_own_gives_any_chatml_tokenizer_a_template_with_tools(tokenizer):
    other = using(tokenizer, BARE)
    templates.use(other, "own")
    chat = Chat(other, [PythonTool.schema])
    call = ToolCall(PythonTool.name, {"code": "print('<tool_call>')"})
    messages = [Message("system", "Be brief."), Message("user", "q"), Message("assistant", "So:", [call, call])]
    text = chat.render([*messages, Message("tool", "1"), Message("tool", "1")], generate=True)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call") and text.count("Be brief.") == 1
    assert PythonTool.schema["function"]["description"] in text
    assert text.endswith("</tool_response>\n<tool_response>\n1\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert chat.parse(text.split("assistant\n")[1].split("<|im_end|>")[0]) == ("So:", [call, call])


def test_own_needs_the_markers_of_chatml():
    class Other:
        name_or_path = "other"

        def get_vocab(self):
            return {"<|im_end|>": 1}

    with pytest.raises(UserError, match=r"other has no <\|im_start\|>; give the path"):
        templates.use(Other(), "own")


def test_a_template_from_a_file(tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    (tmp_path / "mine.jinja").write_text(templates.CHATML)
    templates.use(other, str(tmp_path / "mine.jinja"))
    assert other.chat_template == templates.CHATML
    templates.use(other, "auto")
    assert other.chat_template == templates.CHATML
    with pytest.raises(UserError, match=r"model.template=nowhere: .*No such file.*; give auto, own or the path"):
        templates.use(other, "nowhere")
