"""Chat template to tokens, and tool calls out of text. Sampled tokens are never tokenised again.

Calls follow the Hermes format of the Qwen templates: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from open_agentrl_jax.types import Message, ToolCall, UserError

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
MARK = "\u241fturn\u241f"  # stands in for an assistant's words where only what follows them is wanted


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Splits an assistant's text into its words and its tool calls.

    A call that cannot be read is a ToolCall whose `error` tells the model why; none is dropped. What stands inside a
    closed thinking block is a thought, not a call.

    Returns:
        The text outside the calls, stripped, and the calls in their order.
    """
    thought, closing, spoken = text.rpartition("</think>")
    calls = [_parse_call(match.group(0), match.group(1)) for match in CALL.finditer(spoken)]
    return (thought + closing + CALL.sub("", spoken)).strip(), calls


def _parse_call(whole: str, body: str) -> ToolCall:
    if not whole.endswith("</tool_call>"):
        return ToolCall(error="the call is not closed with </tool_call>")
    try:
        call = json.loads(body, strict=False)  # a raw line break inside a string is read, not refused
    except (ValueError, RecursionError) as error:
        return ToolCall(error=f"the call is not valid JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return ToolCall(error='the call must be an object {"name": string, "arguments": object}')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False)
        except (ValueError, RecursionError) as error:
            return ToolCall(name=call["name"], error=f"the arguments are not valid JSON: {error}")
    if not isinstance(arguments, dict):
        return ToolCall(name=call["name"], error="the arguments must be an object")
    return ToolCall(name=call["name"], arguments=arguments)


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Any, tools: Sequence[dict[str, Any]] = (), *, omit_newline: bool = False):
        """Binds a tokenizer and the tools' schemas.

        Args:
            tokenizer: of `transformers`, with a chat template.
            tools: schemas that the template shows.
            omit_newline: leave out what the template puts between the stop token and the tool message (a fault of the
                reference).

        Raises:
            UserError: no chat template, or one that does not end a turn with one token.
        """
        self.tokenizer = tokenizer
        self.tools = list(tools)
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; add chat_template to its "
                "tokenizer_config.json or a chat_template.jinja beside it"
            )
        after = self._after_assistant([], generate=False)
        ids = self.encode(after)
        if not ids or (ids[0] not in tokenizer.all_special_ids and ids[0] not in tokenizer.added_tokens_decoder):
            raise UserError(f"{tokenizer.name_or_path}: its chat template ends an assistant turn with no special token")
        self.turn_end = ids[0]
        self._turn_end_text = tokenizer.decode([self.turn_end])
        user = [Message("user", "?")]
        opened = self.render(user, generate=True).removeprefix(self.render(user, generate=False))
        self._opening = self.encode(opened)  # the header of an assistant turn
        self.ending = ids[1:]  # what the template puts after the last stop token of a conversation
        self._omit_newline = omit_newline
        self.stop_ids = tuple(sorted({self.turn_end} | {tokenizer.eos_token_id} - {None}))

    def encode(self, text: str) -> list[int]:
        """Text to ids, special tokens read as such, none added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens kept, the stop token at the end left off."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def render(self, messages: Sequence[Message], *, generate: bool) -> str:
        """The template's text of a conversation, tools included; `generate` opens the assistant's turn."""
        return self.tokenizer.apply_chat_template(
            [message.to_chat() for message in messages],
            tools=self.tools or None,
            tokenize=False,
            add_generation_prompt=generate,
        )

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant's first token goes."""
        return self.encode(self.render(messages, generate=True))

    def following(self, messages: Sequence[Message]) -> list[int]:
        """Ids between an assistant's stop token and its next turn: the end of the turn, and `messages`."""
        text = self._after_assistant(messages, generate=True).removeprefix(self._turn_end_text)
        return self.encode(text.lstrip("\n") if self._omit_newline else text)

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and which of them an assistant would have to produce.

        Those are each turn's tokens from the first one up to and with the stop token; the header that opens a turn,
        and all that system, user and tools say, are not.

        Raises:
            ValueError: the template did not render each assistant message as a turn of its own.
        """
        ids = self.encode(self.render(messages, generate=False))
        mask = [False] * len(ids)
        turns, place, header = 0, 0, self._opening
        while place < len(ids):
            if ids[place : place + len(header)] != header:
                place += 1
                continue
            start = place + len(header)
            place = ids.index(self.turn_end, start) + 1
            mask[start:place] = [True] * (place - start)
            turns += 1
        expected = sum(message.role == "assistant" for message in messages)
        if turns != expected:
            raise ValueError(f"{expected} assistant messages were rendered as {turns} turns")
        return ids, mask

    def shorten(self, text: str, max_tokens: int) -> str:
        """Text of at most about `max_tokens` tokens: the middle is cut, and the text says so."""
        if len(text.encode()) <= max_tokens:  # no token is shorter than a byte
            return text
        ids = self.encode(text)
        if len(ids) <= max_tokens:
            return text
        notice = f"\n[... {len(ids) - max_tokens} tokens cut from the middle ...]\n"
        keep = max(0, max_tokens - len(self.encode(notice)))
        head, tail = ids[: (keep + 1) // 2], ids[len(ids) - keep // 2 :]
        return self.tokenizer.decode(head) + notice + self.tokenizer.decode(tail)

    def _after_assistant(self, messages: Sequence[Message], *, generate: bool) -> str:
        # Rendered in a conversation of our own: templates treat the first and the last message in their own ways, and
        # only what stands after the mark is used.
        opening = [Message("user", "?"), Message("assistant", MARK)]
        return self.render([*opening, *messages], generate=generate).rpartition(MARK)[2]
