"""The two behaviours of a run: `robust`, as the paper means it, and `reference`, as the published code computes it.

Each field of `Behaviour` is a place where the two give different numbers. A run is wired with the functions of one of
them; no other code asks which it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from open_agentrl_jax.algorithms.advantages import group_relative
from open_agentrl_jax.reference.python_tool import shorten_output

TokenCount = Callable[[Any, Any], Any]  # (tokens of a micro-batch, number of micro-batches) -> denominator
TOOL_CHARACTERS = 256  # of a tool output in the published code


def residual_advantages(
    rewards: Float[np.ndarray, "g n"], *, normalize_std: bool = True, valid: Bool[np.ndarray, "g n"]
) -> Float[np.ndarray, "g n"]:
    """As `group_relative`, but equal rewards leave a rounding residue that the division by eps makes large."""
    n = rewards.shape[1]
    rewards = np.asarray(rewards, np.float32)
    mean, std = np.zeros((len(rewards), 1), np.float32), np.ones((len(rewards), 1), np.float32)
    if n > 1:
        # A running fp32 sum, which is what leaves the residue.
        mean = np.cumsum(rewards, axis=1, dtype=np.float32)[:, -1:] / np.float32(n)
        std = rewards.std(axis=1, ddof=1, keepdims=True)
    centred = rewards - mean
    return np.where(valid, centred / (std + 1e-6) if normalize_std else centred, 0).astype(np.float32)


def shifted_mask(mask: Sequence[bool]) -> list[bool]:
    """The SFT mask one token late: the first token of a turn never trains, the one after the turn does."""
    return [False, *mask[:-1]]


def mean_of_micro_batches(micro: Any, used: Any) -> Any:
    """What per-token losses are divided by: a token mean per micro-batch, averaged, so the split changes the loss."""
    return micro * used


def sum_of_micro_batches(micro: Any, used: Any) -> Any:
    """Likewise, but summed, so that the gradient clip takes effect earlier than it should."""
    return micro


def no_turn_bonus(score: float, num_turns: int, *, mode: str) -> float:
    """The score as it is: the published reward manager never passes the number of turns."""
    return score


def shorten_to_characters(text: str, max_tokens: int, chat: Any) -> str:
    """Keeps the first and last characters of a tool output."""
    return shorten_output(text, characters=TOOL_CHARACTERS)


def shorten_to_tokens(text: str, max_tokens: int, chat: Any) -> str:
    """Keeps the beginning and the end of a tool output, `max_tokens` tokens in all."""
    return chat.shorten(text, max_tokens=max_tokens)


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """What is computed where the paper and the published code differ."""

    mode: str  # of the graders and of prepare_code
    advantages: Callable[..., Float[np.ndarray, "g n"]]
    sft_mask: Callable[[Sequence[bool]], Sequence[bool]]
    sft_token_count: TokenCount | None  # None: the tokens of the mini-batch
    rl_token_count: TokenCount | None
    turn_bonus: Callable[..., float] | None  # None: rewards.shaping.turn_bonus
    shorten: Callable[..., str]  # (text, max_tokens, chat)
    newline_omitted: bool  # between the model's stop token and the tool message
    first_call_only: bool  # further calls of a turn vanish, and an unreadable call ends the episode

    def shortener(self, chat: Any, max_tokens: int) -> Callable[[str], str]:
        """Shortens one tool output to its budget."""
        return functools.partial(self.shorten, max_tokens=max_tokens, chat=chat)


ROBUST = Behaviour(
    mode="robust",
    advantages=group_relative,
    sft_mask=list,
    sft_token_count=None,
    rl_token_count=None,
    turn_bonus=None,
    shorten=shorten_to_tokens,
    newline_omitted=False,
    first_call_only=False,
)
REFERENCE = Behaviour(
    mode="reference",
    advantages=residual_advantages,
    sft_mask=shifted_mask,
    sft_token_count=sum_of_micro_batches,
    rl_token_count=mean_of_micro_batches,
    turn_bonus=no_turn_bonus,
    shorten=shorten_to_characters,
    newline_omitted=True,
    first_call_only=True,
)
BEHAVIOURS = {behaviour.mode: behaviour for behaviour in (ROBUST, REFERENCE)}
