"""Chat templates of our own, and a probe of whether a template shows tools, calls and their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from open_agentrl_jax.agent.calls import FORMATS
from open_agentrl_jax.storage import read_text
from open_agentrl_jax.types import Message, ToolCall, UserError

CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")
# ChatML with tools in the Hermes format. Thoughts of earlier turns are kept, so that a growing conversation is never
# rendered anew.
CHATML = """\
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- if tools or system %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
{{- ('\\n\\n' if system else '') + 'You can call these functions:\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' + (tool | tojson) }}
{%- endfor %}
{{- '\\n</tools>\\n\\nTo call a function, write a JSON object with its name and arguments:\\n<tool_call>\\n' +
'{"name": <name>, "arguments": <object>}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or loop.previtem.role != 'tool' %}
{{- '<|im_start|>user' }}
{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- elif not (loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' + (call.function.arguments | tojson) +
'}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CALL = ToolCall("probe_function", {"probe_argument": "probe value"})
SCHEMA = {
    "type": "function",
    "function": {
        "name": CALL.name,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_argument": {"type": "string", "description": "Text."}}},
    },
}
RESULT = "probe result"
CURE = "set model.template=own, or give a template file"


def use(tokenizer: Any, choice: str) -> None:
    """Sets the chat template of a tokenizer.

    Args:
        tokenizer: of `transformers`; changed in place.
        choice: "auto" keeps its own template, "own" sets CHATML, anything else is the path of a template file.

    Raises:
        UserError: the file cannot be read, or the tokenizer lacks the markers of CHATML.
    """
    if choice == "auto":
        return
    if choice != "own":
        try:
            tokenizer.chat_template = read_text(Path(choice))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"model.template={choice}: {error}; give auto, own or the path of a template file"
            ) from error
        return
    missing = [marker for marker in CHATML_MARKERS if marker not in tokenizer.get_vocab()]
    if missing:
        raise UserError(
            f"model.template=own: the tokenizer {tokenizer.name_or_path} has no {' and no '.join(missing)}; "
            "give the path of a template file that uses its own markers"
        )
    tokenizer.chat_template = CHATML


def call_format(
    render: Callable[[Sequence[Message], Sequence[dict[str, Any]]], str], body: Callable[[str], str], name: str
) -> str:
    """Finds how a template writes calls; refuses a template that leaves out tools, calls or results.

    Args:
        render: (messages, tools) -> text, by the template.
        body: the text of the last assistant turn of a rendering.
        name: of the tokenizer, for errors.

    Returns:
        The key of FORMATS that reads the rendered call back.

    Raises:
        UserError: the template fails on tools, ignores them, or writes calls in a format that FORMATS lacks.
    """
    user, call = Message("user", "?"), Message("assistant", "", [CALL])
    try:
        shown, called = render([user], [SCHEMA]), render([user, call], [SCHEMA])
        answered = render([user, call, Message("tool", RESULT)], [SCHEMA])
    except Exception as error:  # a template raises whatever it likes
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: its chat template fails on a tool call ({reason}); {CURE}") from error
    turn, names = called.removeprefix(shown), (CALL.name, *CALL.arguments)
    for what, text, parts in (
        ("the tools", shown, names),
        ("an assistant's tool calls", turn, (*names, *CALL.arguments.values())),
        ("tool results", answered, (RESULT,)),
    ):
        if not all(part in text for part in parts):
            raise UserError(f"{name}: its chat template ignores {what}; {CURE}")
    found = [key for key, form in FORMATS.items() if form.parse(body(called), [SCHEMA])[1] == [CALL]]
    if not found:
        known = ", ".join(FORMATS)
        raise UserError(f"{name}: its chat template writes tool calls in a format other than {known}; {CURE}")
    return found[0]
