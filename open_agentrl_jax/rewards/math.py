"""Grades the answer of a mathematical problem: exact arithmetic first, math-verify in a killable worker after.

`robust` reads the last box anywhere in the final message (without one, an explicit "the answer is ...") and compares
values. `reference` is what the reference code computes: the last box within the last 100 characters, as a string.
Both score +1 for right and -1 for wrong; accuracy is 1 or 0. A grader that could not decide gives status "failed".
"""

from __future__ import annotations

import collections
import functools
import logging
import re

from open_agentrl_jax.rewards import pool
from open_agentrl_jax.rewards.answers import clean, compare, sides, split_unit, value
from open_agentrl_jax.types import Score

log = logging.getLogger(__name__)
MAX_ANSWER = 2000  # characters: a longer box is no final answer, and is wrong unless it is the truth's very text
MAX_DEPTH = 40  # nested brackets: a deeper answer would end the parser's stack, and no answer is that deep
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_STATED = re.compile(
    r"(?:^|\n)\s*#{4}(?=\s*(?P<mark>[^\n]+))"
    r"|\b(?:final\s+answer|answer|result|solution)\b\**(?:\s*(?:is|:|=)[:\s*]*(?=(?P<said>[^\n]+))|\s*(?=(?P<shown>\$|\\[(\[])))",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_AFTERTHOUGHT = re.compile(r"\.(?:\s|$)|,?\s(?:because|since|which|where|when|so)\b", re.IGNORECASE)
_NUMERIC = re.compile(
    r"(?:[\d\s.+*/^()!{}-]|\\(?:sqrt|frac|pi)(?![a-zA-Z]))*\d(?:[\d\s.+*/^()!{}-]|\\pi)*"
)  # a side without unknowns
_TAIL = 4000  # characters of the end of a message in which an answer without a box is looked for


def grade(text: str, ground_truth: str | list[str], *, mode: str = "robust") -> Score:
    """Grades the final message of an episode. Takes microseconds to 5 s: call it in a thread, not in an event loop.

    Args:
        text: the final message, as the model wrote it; thinking before `</think>` is left out in robust mode.
        ground_truth: the right answer, with or without its box; of a list, any one.
        mode: "robust" | "reference".

    Returns:
        Score of +1 / -1, accuracy 1 / 0, and the prediction as it stood in the text ("" where there is none).
        Where no verdict was reached: score and accuracy 0, status "failed".
    """
    truths = [str(truth) for truth in (ground_truth if isinstance(ground_truth, list) else [ground_truth])]
    reference = _reference(text, truths)
    if mode == "reference":
        return reference
    if mode != "robust":
        raise ValueError(f"math grading mode {mode!r} is neither robust nor reference")
    robust = _robust(text, truths)
    if robust.accuracy != reference.accuracy or robust.status == "failed":
        log.info(
            "math graders disagree: robust %s, reference %s, truth %r, prediction %r, text ends %r",
            robust.status if robust.status == "failed" else robust.accuracy,
            reference.accuracy,
            truths[0][:200],
            robust.prediction[:200],
            text[-300:],
        )
    return robust


def _reference(text: str, truths: list[str]) -> Score:
    """The reference's rule, faults included: braces counted without regard to escapes, no normalisation at all."""
    tail = text[-300:][-100:]
    start = tail.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(tail)) if start >= 0 else ():
        depth += (tail[i] == "{") - (tail[i] == "}")
        if depth == 0:
            return _score(tail[start + 7 : i] in truths, tail[start + 7 : i])
    return _score(False, "")


def _robust(text: str, truths: list[str]) -> Score:
    prediction = extract(text)
    if prediction is None:
        return _score(False, "")
    failed, together = False, chain(text.rpartition("</think>")[2])
    for answer in [prediction] if together is None else [prediction, together]:
        for truth in truths:
            boxed = chain(truth) or last_box(truth)
            try:
                if equivalent(answer, truth if boxed is None else boxed):
                    return _score(True, answer[:MAX_ANSWER])
            except pool.WorkerFailed:
                failed = True
    return Score(0.0, 0.0, prediction[:MAX_ANSWER], "failed") if failed else _score(False, prediction[:MAX_ANSWER])


def _score(right: bool, prediction: str) -> Score:
    return Score(1.0 if right else -1.0, float(right), prediction)


def extract(text: str) -> str | None:
    """The answer that a final message gives: its last box; else the last "answer is X", "Answer: X" or "#### X"; else
    the message itself where it is nothing but an answer. None where there is none."""
    body = text.rpartition("</think>")[2]
    boxed = last_box(body)
    if boxed is not None:
        return boxed
    if unbraced := re.findall(r"\\boxed\s+([^\s{}$\\.,]+)", body[-_TAIL:]):
        return unbraced[-1]
    tail, stated = body[-_TAIL:], None
    for stated in _STATED.finditer(tail):  # noqa: B007 (the last one is wanted)
        pass
    if stated:
        rest = tail[stated.end() :].lstrip()
        if formula := _FORMULA.match(rest):
            return next(g for g in formula.groups() if g)
        said = _AFTERTHOUGHT.split((stated["mark"] or stated["said"] or rest).strip(), maxsplit=1)[0].strip(" *")
        return said.rpartition(" is ")[2]
    bare = body.strip()
    if len(bare) <= MAX_ANSWER and (formula := _FORMULA.fullmatch(bare)):
        return next(g for g in formula.groups() if g)
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", bare)
    short = bare and len(bare) <= 100 and "\n" not in bare and "\\boxed" not in bare
    return bare if short and len(words) <= 2 else None


def last_box(text: str) -> str | None:
    """The content of the last closed \\boxed{} or \\fbox{}, escaped braces not counted; None where there is none."""
    found = _boxes(text)
    return text[found[-1][1] : found[-1][2]] if found else None


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(start, start of content, end of content) of each closed box, by start of content.

    One pass, so that a megabyte of opened boxes takes no longer than a megabyte of anything else.
    """
    found, open_braces = [], []
    for m in _BOX_OR_BRACE.finditer(text) if "box" in text else ():
        token = m[0]
        if token == "}":
            start, begin = open_braces.pop() if open_braces else (-1, -1)
            if begin >= 0:
                found.append((start, begin, m.start()))
        elif token[-1] == "{" and token != "\\{":
            open_braces.append((m.start(), m.end()) if len(token) > 1 else (-1, -1))
    return sorted(found, key=lambda box: box[1])


def chain(text: str) -> str | None:
    """The last boxes of `text` as one list where only commas, "and" or "or" part them; None for a single box."""
    found = _boxes(text[-_TAIL:])
    tail, parts = text[-_TAIL:], []
    for (_, begin, end), (following, _, _) in zip(found[-2::-1], found[:0:-1], strict=False):
        between = re.sub(r"\\q?quad|\\text\w*|\\[()\[\]]|[\s${}]", "", tail[end:following])
        if between not in (",", "and", "or", ",and", ",or"):
            break
        parts.insert(0, tail[begin:end])
    return ", ".join([*parts, tail[found[-1][1] : found[-1][2]]]) if parts else None


def equivalent(prediction: str, truth: str) -> bool:
    """Whether two answers mean the same.

    Raises:
        pool.WorkerFailed: no verdict within the deadline.
    """
    prediction, truth = prediction.strip(), truth.strip()
    if prediction == truth:
        return bool(truth)
    if max(len(prediction), len(truth)) > MAX_ANSWER or _depth(prediction) > MAX_DEPTH:
        return False
    return _equivalent(prediction, truth)


@functools.lru_cache(maxsize=1 << 16)  # the n samples of a problem mostly give the same few answers
def _equivalent(prediction: str, truth: str) -> bool:
    verdict = compare(prediction, truth)
    if verdict is not None:
        return verdict
    *before, last = sides(clean(prediction))
    known = [side for side in before if _NUMERIC.fullmatch(side)] if "=" not in truth else []
    pair = (prediction, truth)
    if _failures[pair] >= 2:  # once may be a busy machine; an answer that fails twice is not waited for again
        raise pool.WorkerFailed("failed twice before")
    try:
        if not all(pool.shared().ask(side, last) for side in known):
            return False  # "\\sqrt{2} = 5" is no way to say 5
        return pool.shared().ask(clean(prediction), clean(truth))
    except pool.WorkerFailed:
        _failures[pair] += 1
        raise


_failures: collections.Counter[tuple[str, str]] = collections.Counter()


def _depth(text: str) -> int:
    depth = most = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        most = max(most, depth)
    return most


def canonical(prediction: str) -> str:
    """One spelling for answers that differ only in spelling: the key under which votes are counted."""
    text = split_unit(clean(prediction[:MAX_ANSWER]))[0]
    read = value(text) if _depth(text) <= MAX_DEPTH else None
    return "".join(text.split()) if read is None else repr(read)
