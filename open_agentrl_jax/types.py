"""What passes between the rooms: numpy arrays and text, nothing of JAX.

Letters used in shapes, here and everywhere: b batch, t tokens, d model, h heads, k kv heads,
g groups, n samples, f hidden, v vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32


@dataclasses.dataclass
class ToolCall:
    """One call the model wrote. `error` says why it could not be read; then `name` may be empty."""

    name: str = ""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""


@dataclasses.dataclass
class Message:
    """One chat message; `role` is system | user | assistant | tool."""

    role: str
    content: str
    tool_calls: list[ToolCall] = dataclasses.field(default_factory=list)
    reasoning: str = ""  # of an assistant, where it is kept apart from the content

    def to_chat(self) -> dict[str, Any]:
        """The dictionary that chat templates take."""
        chat: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            chat["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in self.tool_calls
            ]
        if self.reasoning:
            chat["reasoning_content"] = self.reasoning
        return chat


@dataclasses.dataclass
class Task:
    """One problem. `answer` is what the grader of `source` compares with; it is never shown to the model."""

    id: str
    messages: list[Message]
    answer: Any
    source: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample one completion.

    `seed` and the token's position in the whole sequence decide the draw, so that the same seed and prefix give the
    same tokens whatever else the engine is doing. `top_k` 0 and `top_p` 1 switch truncation off; `temperature` 0 is
    greedy.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclasses.dataclass
class Completion:
    """What an engine sampled; the stop token, where one was sampled, is the last of `ids`."""

    ids: Int32[np.ndarray, " t"]
    logprobs: Float32[np.ndarray, " t"]  # nats, under the distribution that was sampled from
    finish_reason: str  # "stop" | "length" | "abort"
    version: Int32[np.ndarray, " t"]  # weight version that sampled each token


@dataclasses.dataclass
class Score:
    """A grader's verdict. `status` "failed" means that the grader itself failed: it is never a wrong answer."""

    score: float
    accuracy: float
    prediction: str = ""
    status: str = "graded"  # "graded" | "failed"


@dataclasses.dataclass
class Turn:
    """The text view of one assistant turn and of the tools it called."""

    content: str  # all that was sampled, calls included, the stop token left off
    tool_calls: list[ToolCall] = dataclasses.field(default_factory=list)
    tool_outputs: list[str] = dataclasses.field(default_factory=list)
    tool_statuses: list[str] = dataclasses.field(default_factory=list)  # "ok" | "error" | "infrastructure", one a call
    words: str = ""  # `content` without its calls
    reply_role: str = "tool"  # of the outputs: "user" where the environment answered words, not calls
    seconds: float = 0.0
    reward: float = 0.0  # of the environment's step after this turn, unless it ended the episode


@dataclasses.dataclass
class TokenSequence:
    """Tokens in the order in which the policy read and sampled them, and the turns as text. Never tokenised again."""

    tokens: Int32[np.ndarray, " t"]  # prompt and all that followed, exactly as templated or sampled
    loss_mask: Bool[np.ndarray, " t"]  # True where the policy sampled the token (the stop token included)
    logprobs: Float32[np.ndarray, " t"]  # behaviour log-prob (nats) of tokens[i] given tokens[:i]; 0 off the mask
    versions: Int32[np.ndarray, " t"]  # weight version that sampled tokens[i]; -1 off the mask
    turns: list[Turn]

    @property
    def said(self) -> list[Message]:
        """The conversation after the prompt as text; calls are part of the text."""
        return [
            message
            for turn in self.turns
            for message in (
                Message("assistant", turn.content),
                *(Message(turn.reply_role, out) for out in turn.tool_outputs),
            )
        ]


@dataclasses.dataclass
class Outcome:
    """How an episode ended.

    `stop`: "answer" | "length" | "turns" | "time" | "exit" (a harness failed) | "aborted" | "error" | "client_..." (a
    harness sent requests that cannot be served, see agent.transcript).
    """

    stop: str
    reward: float = 0.0
    accuracy: float = 0.0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    prediction: str = ""  # the answer that the grader found
    error: str = ""  # of a fault: the traceback, or the last output of a harness

    @property
    def faulted(self) -> bool:
        """True where a user's code (tool, grader, environment, harness) failed; another attempt would fail as well."""
        return self.stop == "error" or self.stop.startswith("client_")

    @property
    def aborted(self) -> bool:
        """True where infrastructure or a user's code failed: the episode is masked, never scored."""
        return self.stop == "aborted" or self.faulted


@dataclasses.dataclass
class Trajectory(Outcome, TokenSequence):
    """An episode of ONE token sequence, never split into prompt and completion."""

    @property
    def sequences(self) -> list[TokenSequence]:
        """The trajectory itself, as an Episode has them."""
        return [self]


@dataclasses.dataclass(kw_only=True)
class Episode(Outcome):
    """An episode whose conversation was rewritten or forked, so that it is several token sequences.

    All sequences share reward and advantage. A token is sampled in one sequence and unmasked in the others, so that
    each is trained once; losses divide by the number of tokens of all sequences.
    """

    sequences: list[TokenSequence]
    stop: str = "answer"

    @property
    def turns(self) -> list[Turn]:
        """The turns of all sequences."""
        return [turn for sequence in self.sequences for turn in sequence.turns]

    @property
    def said(self) -> list[Message]:
        """The conversations of all sequences, one after another."""
        return [message for sequence in self.sequences for message in sequence.said]


@dataclasses.dataclass
class Group:
    """The n samples of one problem, in the order of their sample number."""

    task: Task
    trajectories: Sequence[Trajectory | Episode]
    position: int = 0  # place of the problem in the endless data stream

    @property
    def all_equal(self) -> bool:
        """True where the raw accuracies teach nothing: all equal, or fewer than two known."""
        return len({t.accuracy for t in self.trajectories if not t.aborted}) < 2


class UserError(Exception):
    """A mistake of the user's: one line that names file, field and cure. Commands print it and exit with code 2."""


class NothingToLearn(Exception):
    """The problems give no signal any more: RL ends early, and its result is kept."""
