"""Tool calls in an assistant's text, in the formats that model families write them.

A format is a pure function from text to the words around the calls and the calls. FORMATS lists them; agent.chat picks
the one that reads back a call its chat template has rendered.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from open_agentrl_jax.types import ToolCall

JSON = json.JSONDecoder(strict=False)  # accepts a raw line break inside a string, which models write in code
Parsed = tuple[str, list[ToolCall]]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_TAG = re.compile(r"<tool_call>|<think>|</think>")
_END = re.compile(r"</tool_call>|(?=<tool_call>)|\Z")
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*(?=</tool_call>)", re.DOTALL)
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=[^>\n]+>|\Z))\s*", re.DOTALL
)
UNCLOSED = "the call is not closed with </tool_call>"
_WRAPPER = re.compile(r"<\|python_tag\|>|<\|(?:python|tool_call)_(?:start|end)\|>|</?function_calls>")
_PYTHONIC = re.compile(r"\s*\[?\s*[A-Za-z_][\w.]*\(")


def hermes(text: str, tools: Sequence[Mapping[str, Any]] = ()) -> Parsed:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen2.5, Qwen3 and our own template."""
    return _tagged(text, _json_block)


def qwen_xml(text: str, tools: Sequence[Mapping[str, Any]] = ()) -> Parsed:
    """`<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`: Qwen3-Coder and Qwen3.5.

    A value is text unless the schema in `tools` declares another type; such a value is decoded as JSON.
    """
    return _tagged(text, lambda text, start: _xml_block(text, start, tools))


def llama_json(text: str, tools: Sequence[Mapping[str, Any]] = ()) -> Parsed:
    """A whole turn `{"name": ..., "parameters": {...}}`, several separated by semicolons: Llama 3."""
    thoughts, body = _without_thoughts(text)
    bare = _WRAPPER.sub("", body).strip()
    if not re.match(r'\{\s*"(?:name|type|function)"', bare):
        return text.strip(), []
    calls, place = [], 0
    while place < len(bare):
        try:
            call, place = JSON.raw_decode(bare, place)
        except (ValueError, RecursionError) as error:
            calls.append(ToolCall(error=f"the call is not valid JSON: {error}"))
            break
        calls.append(_call(call, ("parameters", "arguments")))
        place = re.compile(r"[\s;,]*").match(bare, place).end()  # type: ignore[union-attr]  (matches the empty string)
    return thoughts.strip(), calls


def pythonic(text: str, tools: Sequence[Mapping[str, Any]] = ()) -> Parsed:
    """A whole turn `[f(x=1), g(y="a")]` of Python calls with literal keyword arguments: Llama 4, LFM2, OLMo 3."""
    thoughts, body = _without_thoughts(text)
    bare = _WRAPPER.sub("", body).strip()
    if not _PYTHONIC.match(bare) or (bare == body.strip() and not bare.startswith("[")):
        return text.strip(), []
    source = bare if bare.startswith("[") else f"[{','.join(bare.splitlines())}]"
    try:
        tree = ast.parse(source, mode="eval").body
        assert isinstance(tree, ast.List)
        return thoughts.strip(), [_python_call(node) for node in tree.elts]
    except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError) as error:
        return thoughts.strip(), [ToolCall(error=f"the calls are not a list of Python calls: {error}")]


@dataclasses.dataclass(frozen=True)
class Format:
    """A way of writing calls."""

    parse: Callable[..., Parsed]  # (text, tools) -> words, calls
    opening: str  # text that begins a call, for displays that hide raw calls
    whole: bool = False  # calls make up the whole turn, apart from thoughts


FORMATS: dict[str, Format] = {
    "hermes": Format(hermes, OPEN),
    "qwen_xml": Format(qwen_xml, OPEN),
    "llama_json": Format(llama_json, '{"name"', whole=True),
    "pythonic": Format(pythonic, "[", whole=True),
}


def parse_tool_calls(text: str, *, format: str = "hermes", tools: Sequence[Mapping[str, Any]] = ()) -> Parsed:
    """Splits an assistant's text into its words and its tool calls.

    A call that cannot be read becomes a ToolCall whose `error` explains why; no call is dropped. Calls inside a
    `<think>...</think>` pair are part of the thought and are not executed; an opening tag without a closing one, or the
    reverse, hides nothing. Tags inside a string of a call are part of that string.

    Args:
        text: one assistant turn, without its stop token.
        format: a key of FORMATS.
        tools: the schemas that the model saw; formats without types need them to decode values.

    Returns:
        The text outside the calls, stripped, and the calls in order.
    """
    return FORMATS[format].parse(text, tools)


def parse_any_format(text: str, tools: Sequence[Mapping[str, Any]]) -> Parsed:
    """Parses text whose format is unknown: the first format that reads calls of known tools, else Hermes.

    Args:
        text: one assistant turn.
        tools: the schemas that the model saw. An answer that only looks like a call names none of them.
    """
    names = {tool.get("function", tool).get("name") for tool in tools}
    for format in FORMATS.values():
        words, calls = format.parse(text, tools)
        if calls and all(call.name in names and not call.error for call in calls):
            return words, calls
    return hermes(text)


def spoken(text: str, form: Format = FORMATS["hermes"], *, ended: bool) -> str:
    """The part of an unfinished turn that is certain to be words.

    Raw calls are hidden; a half-written character or tag at the end is held back until the turn ends.
    """
    if form.whole:
        thoughts, closing, body = text.rpartition("</think>")
        begun = body.lstrip()
        if begun.startswith(form.opening) or (not ended and form.opening.startswith(begun)):
            text = thoughts + closing
        return text if ended else text.rstrip("\ufffd")
    text = text.partition(form.opening)[0]
    if ended:
        return text
    text = text.rstrip("\ufffd")
    for size in range(min(len(form.opening) - 1, len(text)), 0, -1):
        if form.opening.startswith(text[-size:]):
            return text[:-size]
    return text


def _tagged(text: str, read: Callable[[str, int], tuple[ToolCall, int]]) -> Parsed:
    """Scans for blocks that begin with OPEN; `read` decodes the one whose body starts at an index and finds its end."""
    blocks: list[tuple[int, int, ToolCall]] = []
    place, thought = 0, -1  # thought: where an open thinking block begins
    while tag := _TAG.search(text, place):
        place = tag.end()
        if tag[0] == OPEN:
            call, end = read(text, tag.end())
            blocks.append((tag.start(), end, call))
            if not call.error or thought < 0:  # a thought may mention the tag without writing a call
                place = end
        elif tag[0] == "<think>":
            thought = tag.start() if thought < 0 else thought
        elif thought >= 0:  # the blocks since the opening tag are drafts inside the thought
            blocks = [block for block in blocks if block[0] < thought]
            thought = -1
    starts, ends = [0, *(end for _, end, _ in blocks)], [*(start for start, _, _ in blocks), len(text)]
    words = "".join(text[start:end] for start, end in zip(starts, ends, strict=True))
    return words.strip(), [call for _, _, call in blocks]


def _json_block(text: str, start: int) -> tuple[ToolCall, int]:
    """Decodes the JSON first, so that a tag inside one of its strings does not end the block."""
    begin = len(text) - len(text[start:].lstrip())
    try:
        value, end = JSON.raw_decode(text, begin)
    except (ValueError, RecursionError) as error:
        closed, end = _end(text, start)
        return ToolCall(error=f"the call is not valid JSON: {error}" if closed else UNCLOSED), end
    rest = end
    closed, end = _end(text, end)
    if not closed:
        return ToolCall(error=UNCLOSED), end
    if text[rest:end].removesuffix(CLOSE).strip():
        return ToolCall(error="the call is not valid JSON: text follows the object"), end
    return _call(value, ("arguments",)), end


def _xml_block(text: str, start: int, tools: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, int]:
    match = _FUNCTION.match(text, start)
    if match is None:
        closed, end = _end(text, start)
        return ToolCall(error="the call has no <function=name>...</function>" if closed else UNCLOSED), end
    name, body, end = match[1].strip(), match[2], match.end() + len(CLOSE)
    types = _types(name, tools)
    arguments, place = {}, 0
    while parameter := _PARAMETER.match(body, place):
        key, value, place = parameter[1].strip(), parameter[2], parameter.end()
        if types.get(key, "string") != "string":
            try:
                value = JSON.decode(value)
            except (ValueError, RecursionError) as error:
                return ToolCall(name, error=f"parameter {key} is not a valid {types[key]}: {error}"), end
        arguments[key] = value
    if body[place:].strip():
        return ToolCall(name, error="the parameters are not written as <parameter=name>value</parameter>"), end
    return ToolCall(name, arguments), end


def _end(text: str, start: int) -> tuple[bool, int]:
    """Whether a block is closed, and where it ends: after its closing tag, else before the next block."""
    match = _END.search(text, start)
    assert match is not None  # the pattern matches the end of the text
    return match[0] == CLOSE, match.end()


def _types(name: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Declared JSON type of each parameter of a function; unions and missing types are left out."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {
                k: v["type"] for k, v in properties.items() if isinstance(v, Mapping) and isinstance(v.get("type"), str)
            }
    return {}


def _call(value: Any, keys: Sequence[str]) -> ToolCall:
    """A decoded object as a call; `keys` are the names under which the arguments may stand."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return ToolCall(error=f'the call must be an object {{"name": string, "{keys[0]}": object}}')
    arguments = next((value[key] for key in keys if key in value), {})
    if isinstance(arguments, str):
        try:
            arguments = JSON.decode(arguments)
        except (ValueError, RecursionError) as error:
            return ToolCall(value["name"], error=f"the arguments are not valid JSON: {error}")
    if not isinstance(arguments, dict):
        return ToolCall(value["name"], error="the arguments must be an object")
    return ToolCall(value["name"], arguments)


def _python_call(node: ast.AST) -> ToolCall:
    if not isinstance(node, ast.Call):
        return ToolCall(error="each entry of the list must be a call")
    name = ast.unparse(node.func)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        return ToolCall(name, error="the arguments must be given by keyword")
    try:
        return ToolCall(name, {str(k.arg): ast.literal_eval(_Constants().visit(k.value)) for k in node.keywords})
    except (ValueError, TypeError) as error:
        return ToolCall(name, error=f"the arguments must be literals: {error}")


class _Constants(ast.NodeTransformer):
    """JSON's names for constants, which models write among Python's."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node


def _without_thoughts(text: str) -> tuple[str, str]:
    """The thinking blocks of a text, and the rest."""
    return "".join(_THOUGHT.findall(text)), _THOUGHT.sub("", text)
