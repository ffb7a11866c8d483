"""Grades the letter of a multiple-choice problem."""

from __future__ import annotations

import logging
import re

from open_agentrl_jax.reference import choice as published
from open_agentrl_jax.rewards.math import last_box
from open_agentrl_jax.types import Score

log = logging.getLogger(__name__)
# "A", "A.", "(A)", "**A**", "\text{A}", "A) 5 cm", "Option A", "A: because ..."
_LETTER = re.compile(
    r"(?:option|choice|answer)?[\s:]*[(\[]?([A-Za-z])(?:$|[)\].:,](?:\s.*)?$|\s*[-=].*$)", re.IGNORECASE | re.DOTALL
)
_STATED = re.compile(
    r"\b(?i:answer|option|choice)\b(?:\s+(?:is|would\s+be|must\s+be))?[\s:*]*(?i:option\s+|choice\s+)?[\s*$]*(?:\\text\{)?[(\[]?(?!I\s+[a-z])([A-Z])\b(?!['’])",
)
# What follows a letter in a list of guesses, which is no answer.
_MORE = r"(?:[\s()\[\].,:;/&|*=-]|\b(?:and|or)\b)"
_GUESSES = re.compile(rf"{_MORE}+(?:[A-Ja-j]\b{_MORE}*)+")
_OR_ANOTHER = re.compile(
    r"[)\]*]*\s*(?:,|/|&|\bor\b|\band\b)[\s(\[*]*(?:or\b[\s(\[*]*)?[A-J]\b(?=\s*(?:$|[.,;!)*/&]|or\b|and\b))"
)
_WRAPPERS = re.compile(r"\\(?:textbf|text|mathrm|mathbf|boxed)\s*|[{}$*\\`]")


def grade(text: str, ground_truth: str, *, mode: str = "robust") -> Score:
    """Grades the final message of a multiple-choice problem.

    Args:
        text: the final message; robust mode ignores thinking before `</think>`.
        ground_truth: the letter, as "A", "A." or "(A)".
        mode: "robust" reads the letter of the last box; without a box, of the last "answer is X" or of a message that
            is nothing but a letter. "reference": `reference.choice`.

    Returns:
        Score of +1 / -1, accuracy 1 / 0, and the letter read ("" where there is none); status "failed" where the right
        answer holds no letter.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in _GRADERS:
        raise ValueError(f"choice grading mode {mode!r} must be one of {', '.join(_GRADERS)}")
    return _GRADERS[mode](text, str(ground_truth))


def _robust(text: str, ground_truth: str) -> Score:
    truth, prediction = letter(ground_truth), extract(text)
    if not truth:
        log.warning("the right answer %r of a choice problem holds no letter", ground_truth)
        return Score(0.0, 0.0, prediction, "failed")
    right = prediction == truth
    return Score(1.0 if right else -1.0, float(right), prediction)


_GRADERS = {"robust": _robust, "reference": lambda text, truth: published.grade(text, [truth])}


def extract(text: str) -> str:
    """The letter of a final message as a capital; "" where there is none."""
    body = text.rpartition("</think>")[2]
    boxed = last_box(body)
    if boxed is not None:
        return letter(boxed)
    tail, stated = body[-4000:], None
    for stated in _STATED.finditer(tail):  # noqa: B007 (the last one is wanted)
        pass
    if stated:
        return "" if _OR_ANOTHER.match(tail, stated.end()) else stated[1]
    return letter(body) if len(body) < 100 else ""


def letter(answer: str) -> str:
    """The letter of a short answer such as "(b)", "B." or "\\\\text{B) 5 cm}", as a capital; "" where there is none."""
    text = _WRAPPERS.sub("", answer[:500]).strip()
    found = _LETTER.match(text)
    return found[1].upper() if found and not _GUESSES.fullmatch(text, found.end(1)) else ""
