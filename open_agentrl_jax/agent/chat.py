"""Chat template to tokens, and tool calls out of text. Sampled tokens are never tokenised again.

Text from outside (problems, tool outputs, training rows, schemas) may contain the text of a special token, such as
`<|im_end|>`. Chat breaks it with a space before rendering, so that only the template and the policy produce special
tokens and nobody else can open or close a turn.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from open_agentrl_jax.agent import templates
from open_agentrl_jax.agent.calls import parse_tool_calls as parse_tool_calls
from open_agentrl_jax.types import Message, ToolCall, UserError

MARK = "\u241fturn\u241f"  # placeholder for an assistant's words
THINK = "<think>"


class Chat:
    """A tokenizer with its chat template and the tools it shows."""

    def __init__(self, tokenizer: Any, tools: Sequence[dict[str, Any]] = (), *, omit_newline: bool = False):
        """Binds a tokenizer and the tools' schemas, and probes the template.

        Args:
            tokenizer: of `transformers`, with a chat template.
            tools: schemas that the template shows.
            omit_newline: leave out what the template puts between the stop token and the tool message (a fault of the
                reference).

        Raises:
            UserError: no chat template, one that does not end a turn with one token, or, where there are tools, one
                that ignores tools, calls or results.
        """
        self.tokenizer = tokenizer
        self.tools = list(tools)
        self._omit_newline = omit_newline
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; set model.template=own, or add "
                "chat_template to its tokenizer_config.json or a chat_template.jinja beside it"
            )
        added = tokenizer.added_tokens_decoder
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        texts = sorted({text for text in special if len(text) > 1} | {MARK}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)))
        ids = self.encode(self._after_assistant([], generate=False))
        if not ids or (ids[0] not in tokenizer.all_special_ids and ids[0] not in added):
            raise UserError(f"{tokenizer.name_or_path}: its chat template ends an assistant turn with no special token")
        self.turn_end = ids[0]
        self._turn_end_text = tokenizer.decode([self.turn_end])
        self.ending = ids[1:]  # what the template puts after the last stop token of a conversation
        self.stop_ids = tuple(sorted({self.turn_end} | {tokenizer.eos_token_id} - {None}))
        self._header, self._opened = self._find_header()
        self.call_format = "hermes"
        if self.tools:
            name = str(tokenizer.name_or_path)
            self.call_format = templates.call_format(self._render, lambda text: self._turns(text)[-1][1], name)

    def showing(self, tools: Sequence[dict[str, Any]]) -> Chat:
        """The same template with other tools."""
        return Chat(self.tokenizer, tools, omit_newline=self._omit_newline)

    def encode(self, text: str) -> list[int]:
        """Text to ids. Special tokens in the text become special ids; none are added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text with special tokens, without a stop token at the end."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """Splits a sampled turn into its words and its calls, in the format of the template.

        A turn begins inside a thought where the template's generation prompt opens one.
        """
        opened = THINK if self._opened.rstrip().endswith(THINK) else ""
        words, calls = parse_tool_calls(opened + text, format=self.call_format, tools=self.tools)
        return words.removeprefix(opened).lstrip(), calls

    def neutral(self, value: Any) -> Any:
        """A copy of text, or of nested lists and dictionaries of text, in which no special token is spelled out."""
        if isinstance(value, str):
            return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", value)
        if isinstance(value, dict):
            return {self.neutral(key): self.neutral(inner) for key, inner in value.items()}
        return [self.neutral(inner) for inner in value] if isinstance(value, list) else value

    def render(
        self, messages: Sequence[Message], *, generate: bool, tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        """The template's text of a conversation, its text made neutral.

        Args:
            messages: the conversation.
            generate: open an assistant turn at the end.
            tools: schemas to show in place of the chat's own.
        """
        shown = self.tools if tools is None else tools
        return self._apply([self.neutral(message.to_chat()) for message in messages], shown, generate)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant's first token goes."""
        return self.encode(self.render(messages, generate=True))

    def following(self, messages: Sequence[Message]) -> list[int]:
        """Ids between an assistant's stop token and its next turn: the end of the turn, and `messages`."""
        text = self._after_assistant(messages, generate=True).removeprefix(self._turn_end_text)
        return self.encode(text.lstrip("\n") if self._omit_newline else text)

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and a mask of the tokens that an assistant has to produce.

        The mask covers each assistant turn from its first token through its stop token. Headers and all text of system,
        user and tools are off the mask. Turns are tokenised apart from what surrounds them, as an episode does it: a
        turn that begins with a line break does not merge with the header's.

        Args:
            messages: the conversation.
            tools: the schemas that this conversation shows; None: the chat's own.

        Raises:
            ValueError: the template did not render each assistant message as a turn of its own, or failed.
        """
        try:
            text = self.render(messages, generate=False, tools=tools)
        except Exception as error:  # a template raises whatever it likes
            raise ValueError(f"the chat template fails: {' '.join(str(error).split())}") from error
        ids: list[int] = []
        mask: list[bool] = []
        turns, place = self._turns(text), 0
        expected = sum(message.role == "assistant" for message in messages)
        if len(turns) != expected:
            raise ValueError(f"{expected} assistant messages were rendered as {len(turns)} turns")
        for start, turn in turns:
            context, sampled = self.encode(text[place:start]), [*self.encode(turn), self.turn_end]
            ids += context + sampled
            mask += [False] * len(context) + [True] * len(sampled)
            place = start + len(turn) + len(self._turn_end_text)
        rest = self.encode(text[place:])
        return ids + rest, mask + [False] * len(rest)

    def shows_reasoning(self) -> bool:
        """Whether the template renders the reasoning of a last assistant message."""
        messages = [Message("user", "?"), Message("assistant", "!", reasoning=MARK)]
        return MARK in self._render(messages, [])

    def shorten(self, text: str, max_tokens: int) -> str:
        """Text of at most about `max_tokens` tokens: the middle is replaced by a notice."""
        if len(text.encode()) <= max_tokens:  # no token is shorter than a byte
            return text
        ids = self.encode(self.neutral(text))
        if len(ids) <= max_tokens:
            return text
        notice = f"\n[... {len(ids) - max_tokens} tokens cut from the middle ...]\n"
        keep = max(0, max_tokens - len(self.encode(notice)))
        head, tail = ids[: (keep + 1) // 2], ids[len(ids) - keep // 2 :]
        return self.tokenizer.decode(head) + notice + self.tokenizer.decode(tail)

    def _apply(self, chat: list[dict[str, Any]], tools: Sequence[dict[str, Any]], generate: bool) -> str:
        return self.tokenizer.apply_chat_template(
            chat, tools=self.neutral(list(tools)) or None, tokenize=False, add_generation_prompt=generate
        )

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        """Renders messages of our own, which may hold MARK."""
        return self._apply([message.to_chat() for message in messages], tools, False)

    def _after_assistant(self, messages: Sequence[Message], *, generate: bool) -> str:
        # Rendered in a conversation of our own: templates treat the first and the last message in their own ways, and
        # only what stands after the mark is used.
        opening = [Message("user", "?").to_chat(), Message("assistant", MARK).to_chat()]
        chat = [*opening, *(self.neutral(message.to_chat()) for message in messages)]
        return self._apply(chat, self.tools, generate).rpartition(MARK)[2]

    def _find_header(self) -> tuple[str, str]:
        """The text that begins every assistant turn, and what the generation prompt adds to it, such as `<think>`."""
        user, mark = Message("user", "?"), Message("assistant", MARK)
        before = self.render([user], generate=False)
        opened = self.render([user], generate=True).removeprefix(before)
        turns = [
            self._render(messages, self.tools).partition(MARK)[0].removeprefix(before)
            for messages in ([user, mark], [user, mark, user])
        ]
        same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(opened, *turns, strict=False))
        header = opened[: sum(1 for _ in same)]
        if self._special.search(header):
            return header, opened.removeprefix(header)
        # The generation prompt has no special token of its own: a turn begins after the last one before it.
        text = before + turns[-1]
        last = max((match.start() for match in self._special.finditer(text)), default=len(text))
        return text[last:], ""

    def _turns(self, text: str) -> list[tuple[int, str]]:
        """Where each assistant turn of a rendering begins, and its text up to the stop token."""
        found: list[tuple[int, str]] = []
        place = 0
        while self._header and (place := text.find(self._header, place)) >= 0:
            place += len(self._header)
            if self._opened and text.startswith(self._opened, place):
                place += len(self._opened)
            end = text.find(self._turn_end_text, place)
            if end < 0:
                break
            found.append((place, text[place:end]))
            place = end + len(self._turn_end_text)
        return found
