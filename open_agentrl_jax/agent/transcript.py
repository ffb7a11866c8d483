"""Maps the requests of a foreign agent onto token sequences that are never tokenised again.

Each request of the chat API carries the whole conversation. The transcript of an episode compares it with what it has
rendered and sampled before:

 - The conversation extends a sequence: only the new messages are tokenised; sampled ids stay as they are.
 - It extends an earlier state of a sequence (a retry, parallel samples, sub-agents): a fork, which repeats the ids up
   to there without training on them again.
 - Neither (compaction, dropped thoughts, other tools): a new sequence, whose prompt is rendered from the messages.

All sequences belong to one episode and share its reward; every sampled token is trained in exactly one of them.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from open_agentrl_jax.agent.calls import FORMATS, spoken
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.episode import Budget
from open_agentrl_jax.agent.streams import Streams
from open_agentrl_jax.rollout.engine import Engine, EngineError, in_pieces, joined, seed_of
from open_agentrl_jax.types import Completion, Episode, Message, Sampling, ToolCall, Turn, UserError

PIECE = 8  # tokens per engine call where the text is watched while it is sampled
PARALLEL = 8  # concurrent requests of one episode
GIVES_UP = 16  # refused requests in a row after which the harness is stopped
STATUS = {  # why a request is refused, which is also why the episode stops -> HTTP status and error code
    "length": (400, "context_length_exceeded"),
    "turns": (400, "episode_over"),
    "time": (400, "episode_over"),
    "client_model": (404, "model_not_found"),
    "client_images": (400, "unsupported_content"),
    "client_request": (400, "invalid_request"),
    "client_flood": (429, "rate_limit_exceeded"),
}
Listener = Callable[[str], Awaitable[None]]  # receives more text of the answer


class Refusal(Exception):
    """A request that is not answered. `reason` is a key of STATUS."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion that a client asks for."""

    messages: list[Message]
    tools: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    max_tokens: int = 0  # 0: as many as fit
    stop: tuple[str, ...] = ()  # texts that end the answer and are left out of it
    one_call: bool = False  # return the first call only


@dataclasses.dataclass
class Answer:
    """What the client receives."""

    content: str
    calls: list[ToolCall]
    finish: str  # "stop" | "length" | "tool_calls"
    prompt_tokens: int
    completion_tokens: int


@dataclasses.dataclass
class Strand:
    """One growing sequence of the episode."""

    chat: Chat
    session: str
    seed: int
    streams: Streams
    messages: list[Message]  # that the streams hold
    prompt: int  # tokens of the prompt
    inherited: int = 0  # tokens repeated from the sequence that this one forks from
    cuts: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (messages, tokens) after each turn
    turns: list[Turn] = dataclasses.field(default_factory=list)
    busy: bool = False


class Chats:
    """Chat templates by the tools they show, made when first needed."""

    def __init__(self, chat: Chat):
        self._chat = chat
        self._made: dict[str, Chat] = {_key(chat.tools): chat}

    def __call__(self, tools: Sequence[dict[str, Any]]) -> Chat:
        """The chat that shows `tools`. Raises Refusal where the template cannot."""
        key = _key(tools)
        if key not in self._made:
            try:
                self._made[key] = self._chat.showing(tools)
            except UserError as error:
                raise Refusal("client_request", f"tools: {error}") from error
        return self._made[key]


class Transcript:
    """The sequences of one episode."""

    def __init__(
        self,
        engine: Engine,
        chats: Chats,
        sampling: Sampling,
        budget: Budget,
        *,
        max_prompt: int,
        session: str,
        max_sampled: int = 0,
    ):
        """Begins an empty episode.

        Args:
            engine: continues token sequences.
            chats: templates and parsers.
            sampling: temperature and the like of every answer; what a client wishes is ignored, because tokens must
                come from the distribution that is trained.
            budget: `max_turns` completions; `max_response` tokens after the prompt, per sequence.
            max_prompt: a sequence has at most `max_prompt + budget.max_response` tokens.
            session: names the episode to the engine.
            max_sampled: sampled tokens of all sequences together; 0: no limit of its own.
        """
        self._engine, self._chats, self._sampling, self._budget = engine, chats, sampling, budget
        self._context, self._session, self._max_sampled = max_prompt + budget.max_response, session, max_sampled
        self._strands: list[Strand] = []
        self._audit: list[tuple[Strand, int, np.ndarray]] = []  # where the ids of each completion belong
        self._begun = self._running = self._forks = 0
        self._refused: collections.Counter[str] = collections.Counter()
        self._in_a_row = 0
        self._first_call = -1.0
        self.closed = ""  # reason for which every further request is refused
        self.last_refusal = ""  # reason of the newest refusal, "" after an answer
        self.failed = False  # the engine failed the newest request
        self.last_words = ""  # content of the newest answer
        self.cut = False  # the newest answer ended because its sequence has no more room
        self.hopeless = asyncio.Event()  # set once the client only sends requests that are refused

    async def complete(self, request: Request, listen: Listener | None = None) -> Answer:
        """Answers one request.

        Args:
            request: the conversation and its tools.
            listen: receives the content piece by piece; together the pieces are the content of the answer.

        Raises:
            Refusal: the budget is used up, or the request cannot be served.
            EngineError: the infrastructure failed.
        """
        if self.closed or len(self._audit) + self._running >= self._budget.max_turns:
            self.closed = self.closed or "turns"
            raise self.refuse(self.closed, f"the episode is over ({self.closed}): no further request is answered")
        if self._max_sampled and self._sampled() >= self._max_sampled:
            raise self.refuse("length", f"the episode has sampled its {self._max_sampled} tokens")
        if self._running >= PARALLEL:
            raise self.refuse("client_flood", f"{PARALLEL} requests of this episode are running; wait for one of them")
        self._running += 1
        strand = None
        try:
            strand, context = self._place(request)
            room = self._room(strand, context, request)
            self._begun += 1
            strand.busy = True
            answer = await self._answer(strand, context, room, request, listen)
        except Refusal as refusal:
            raise self.refuse(refusal.reason, str(refusal)) from None
        except EngineError:
            self.failed = True
            raise
        finally:
            self._running -= 1
            if strand is not None:
                strand.busy = False
        self.last_refusal, self.failed, self._in_a_row, self.last_words = "", False, 0, answer.content
        self.cut = answer.finish == "length" and answer.completion_tokens != request.max_tokens
        return answer

    @property
    def answered(self) -> int:
        """Number of answers so far."""
        return len(self._audit)

    def refuse(self, reason: str, message: str) -> Refusal:
        """Counts a refused request and returns its exception."""
        self._refused[reason] += 1
        self._in_a_row += 1
        self.last_refusal = reason
        if self._in_a_row >= GIVES_UP:
            self.hopeless.set()
        return Refusal(reason, message)

    def _place(self, request: Request) -> tuple[Strand, list[int]]:
        """The sequence that a request continues, and the ids between what it holds and the answer."""
        chat = self._chats(request.tools)
        found: tuple[int, bool, Strand, int] | None = None
        for strand in self._strands:
            for count, tokens in strand.cuts if strand.chat is chat else ():
                if count < len(request.messages) and strand.messages[:count] == request.messages[:count]:
                    whole = not strand.busy and (count, tokens) == strand.cuts[-1]
                    if found is None or (count, whole) > found[:2]:
                        found = count, whole, strand, tokens
        try:
            if found is None:
                return self._strand(chat, Streams(), [], 0), chat.prompt(request.messages)
            count, whole, strand, tokens = found
            following = chat.following(request.messages[count:])
        except Exception as error:  # a template raises whatever it likes
            raise Refusal("client_request", f"messages: the chat template fails: {_line(error)}") from error
        if not whole:
            held = strand.streams.tokens[:tokens]
            strand = self._strand(chat, Streams(held), strand.messages[:count], strand.prompt)
        ended = strand.streams.tokens[-1] in chat.stop_ids
        return strand, [*([] if ended else [chat.turn_end]), *following]

    def _strand(self, chat: Chat, streams: Streams, messages: list[Message], prompt: int) -> Strand:
        """A new sequence, not yet part of the episode."""
        number = len(self._strands)
        seed = seed_of(self._sampling.seed, self._begun) if number else self._sampling.seed
        session = f"{self._session}/{self._begun}" if number or self._begun else self._session
        return Strand(chat, session, seed, streams, list(messages), prompt, inherited=len(streams))

    def _room(self, strand: Strand, context: list[int], request: Request) -> int:
        """Tokens that the answer may have. Raises Refusal where there is no room."""
        prompt = strand.prompt or len(context)
        limit = min(self._budget.max_response, self._context - prompt)
        room = limit - (len(strand.streams) + len(context) - prompt)
        if room <= 0:
            length = len(strand.streams) + len(context)
            raise Refusal("length", f"the conversation has {length} tokens, the limit is {prompt + max(limit, 0)}")
        if self._max_sampled:
            room = min(room, self._max_sampled - self._sampled())
        return min(room, request.max_tokens or room)

    async def _answer(
        self, strand: Strand, context: list[int], room: int, request: Request, listen: Listener | None
    ) -> Answer:
        began, chat = time.monotonic(), strand.chat
        if strand not in self._strands:
            self._strands.append(strand)
            self._forks += strand.inherited > 0
        completion, text = await self._sample(strand, [*strand.streams.tokens, *context], room, request, listen)
        if self.closed:
            raise Refusal(self.closed, "the episode ended while the answer was sampled")
        content, calls = chat.parse(text)
        if any(call.error for call in calls):  # the API has no place for it: the client reads what was written
            content, calls = text.strip(), []
        calls = calls[:1] if request.one_call else calls
        self._reply(strand, request.messages[len(strand.messages) :])
        strand.prompt = strand.prompt or len(context)
        strand.streams.add(context)
        self._audit.append((strand, len(strand.streams), completion.ids))
        strand.streams.add_sampled(completion)
        strand.turns.append(Turn(text, calls, seconds=time.monotonic() - began))
        strand.messages = [*request.messages, Message("assistant", content, calls)]
        strand.cuts.append((len(strand.messages), len(strand.streams)))
        if calls and self._first_call < 0:
            self._first_call = float(sum(self._response(strand) for strand in self._strands))
        finish = "length" if completion.finish_reason == "length" else "tool_calls" if calls else "stop"
        prompt = len(strand.streams) - len(completion.ids)
        return Answer(content, calls, finish, prompt, len(completion.ids))

    async def _sample(
        self, strand: Strand, ids: list[int], room: int, request: Request, listen: Listener | None
    ) -> tuple[Completion, str]:
        """Samples up to a stop token, a stop text or the end of the room; returns the answer's text as well."""
        chat, form, shown = strand.chat, FORMATS[strand.chat.call_format], ""
        sampling = dataclasses.replace(self._sampling, max_tokens=room, stop_ids=chat.stop_ids, seed=strand.seed)
        held = max((len(stop) for stop in request.stop), default=1) - 1  # may be the beginning of a stop text
        parts: list[Completion] = []
        text = ""
        size = PIECE if listen or request.stop else room
        async for part in in_pieces(self._engine, ids, sampling, session=strand.session, size=size):
            if part.finish_reason == "abort":
                raise EngineError("the engine aborted the request")
            parts.append(part)
            text = chat.decode([i for piece in parts for i in piece.ids.tolist()])
            if (place := _first(text, request.stop)) >= 0:
                parts[-1] = _up_to_stop(chat, parts, request.stop)
                text = text[:place]
                break
            if listen is not None:
                words = spoken(text[: len(text) - held], form, ended=False).strip()
                if len(words) > len(shown) and words.startswith(shown):
                    await listen(words[len(shown) :])
                    shown = words
        if listen is not None:
            content, calls = chat.parse(text)
            content = text.strip() if any(call.error for call in calls) else content
            if content.startswith(shown) and content != shown:
                await listen(content[len(shown) :])
        return joined(parts), text

    def _reply(self, strand: Strand, messages: Sequence[Message]) -> None:
        """Keeps what the client answered to the last turn of a sequence."""
        if strand.turns and messages:
            turn = strand.turns[-1]
            turn.tool_outputs = [message.content for message in messages]
            turn.reply_role = messages[0].role
            turn.tool_statuses = ["ok" for message in messages if message.role == "tool"]

    def _response(self, strand: Strand) -> int:
        """Tokens of a sequence after its prompt, without what it repeats from another."""
        return len(strand.streams) - max(strand.prompt, strand.inherited)

    def _sampled(self) -> int:
        return sum(strand.streams.sampled for strand in self._strands)

    async def release(self) -> None:
        """Frees what the engine holds for the episode."""
        for strand in self._strands:
            await self._engine.release(strand.session)

    async def close(self, stop: str) -> Episode:
        """Ends the episode; running requests are refused.

        Returns:
            The episode, not graded. Its metrics hold `retokenised` (sampled tokens whose ids are not those that the
            engine returned) and `trained_twice`, both 0, `sequences`, `forks` and `refused`.
        """
        self.closed = self.closed or stop
        await self.release()
        strands = [strand for strand in self._strands if strand.turns]
        response = float(sum(self._response(strand) for strand in strands))
        changed = sum(
            int((np.asarray(strand.streams.tokens[start : start + len(ids)]) != ids).sum())
            for strand, start, ids in self._audit
        )
        for strand in strands:
            limit = min(self._budget.max_response, self._context - strand.prompt)
            if strand.streams.tokens[-1] in strand.chat.stop_ids and len(strand.streams) - strand.prompt < limit:
                strand.streams.add(strand.chat.ending)
        made = Episode(sequences=[strand.streams.sequence(strand.turns) for strand in strands], stop=stop)
        sampled = float(sum(sequence.loss_mask.sum() for sequence in made.sequences))
        made.metrics = {
            "response_length": response,
            "prompt_length": float(strands[0].prompt if strands else 0),
            "tool_tokens": response - sampled,
            "num_turns": float(len(made.turns)),
            "tool_calls": float(sum(len(turn.tool_calls) for turn in made.turns)),
            "tool_success": float(sum(len(turn.tool_statuses) for turn in made.turns)),  # calls that were answered
            "first_call": self._first_call,
            "sequences": float(len(strands)),
            "forks": float(self._forks),
            "refused": float(self._refused.total()),
            "retokenised": float(changed),
            "trained_twice": sampled - sum(len(ids) for _, _, ids in self._audit),
        }
        return made


def _first(text: str, stops: Sequence[str]) -> int:
    """Where the first stop text begins, -1 where none occurs."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=-1)


def _up_to_stop(chat: Chat, parts: Sequence[Completion], stops: Sequence[str]) -> Completion:
    """The last part, cut after the token that completes a stop text: later tokens are shown to nobody."""
    before = [i for part in parts[:-1] for i in part.ids.tolist()]
    last = parts[-1]
    ids = last.ids.tolist()
    kept = next(n for n in range(1, len(ids) + 1) if _first(chat.decode([*before, *ids[:n]]), stops) >= 0)
    return Completion(last.ids[:kept], last.logprobs[:kept], "stop", last.version[:kept])


def _key(tools: Sequence[dict[str, Any]]) -> str:
    return json.dumps(list(tools), sort_keys=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
