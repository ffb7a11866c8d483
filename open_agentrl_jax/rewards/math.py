"""Grades the answer of a mathematics problem: exact arithmetic first, then math-verify in a worker that can be killed.

The answer is the last box of the final message, wherever it stands; a message without a box must announce its answer
("the answer is ..."). A box counts even where words after it state another answer, because the prompt requests a box
and a rule that weighs words against it would reward hedging. Score +1 / -1, accuracy 1 / 0; status "failed" where no
verdict was reached.
"""

from __future__ import annotations

import collections
import functools
import logging
import re

from open_agentrl_jax.reference import math as published
from open_agentrl_jax.rewards import pool
from open_agentrl_jax.rewards.answers import clean, compare, sides, split_unit, value
from open_agentrl_jax.types import Score

log = logging.getLogger(__name__)
MAX_ANSWER = 2000  # characters: a longer box is no answer, unless it is the truth verbatim
MAX_DEPTH = 40  # nested brackets: deeper ones exhaust the parser's stack, and no answer is that deep
_TAIL = 4000  # characters at the end of a message in which an answer without a box is searched
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_STATED = re.compile(
    r"(?:^|\n)\s*#{4}(?=\s*(?P<mark>[^\n]+))"
    r"|(?:答案|结果)\s*(?:是|为|:|：|=)+\s*(?=(?P<chinese>[^\n]+))"
    r"|\b(?:final\s+answer|answer|result|solution)\b\**(?:\s*(?:is|:|=)[:\s*]*(?=(?P<said>[^\n]+))|\s*(?=(?P<shown>\$|\\[(\[])))",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_AFTERTHOUGHT = re.compile(
    r"\.(?:\s|$)|[。；;，]\s*(?:\D|$)|,?\s(?:because|since|which|where|when|so)\b", re.IGNORECASE
)
# Joins boxes to one list: "\boxed{1} and \boxed{2}", "x=\boxed{3} or x=\boxed{-1}".
_AND = "(?:and|or|和|或者|或)"
_JOINT = re.compile(rf"(?:[,;，；、]{_AND}?|{_AND})(?:[a-zA-Z](?:_\w|_\{{\w+\}})?=)?")
# One side of an equation without unknowns.
_NUMERIC = re.compile(r"(?:[\d\s.+*/^()!{}-]|\\(?:sqrt|frac|pi)(?![a-zA-Z]))*\d(?:[\d\s.+*/^()!{}-]|\\pi)*")


def grade(text: str, ground_truth: str | list[str], *, mode: str = "robust") -> Score:
    """Grades the final message of an episode. Takes microseconds to 5 s: call it in a thread, not in an event loop.

    Args:
        text: the final message as the model wrote it; robust mode ignores thinking before `</think>`.
        ground_truth: the right answer, with or without its box; of a list, any one.
        mode: "robust" | "reference" (`reference.math`).

    Returns:
        Score of +1 / -1, accuracy 1 / 0, and the prediction as it stands in the text ("" where there is none). Without
        a verdict: score and accuracy 0, status "failed".

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in _GRADERS:
        raise ValueError(f"math grading mode {mode!r} must be one of {', '.join(_GRADERS)}")
    truths = [str(truth) for truth in (ground_truth if isinstance(ground_truth, list) else [ground_truth])]
    return _GRADERS[mode](text, truths)


def _robust(text: str, truths: list[str]) -> Score:
    score, reference = _compared(text, truths), published.grade(text, truths)
    if score.accuracy != reference.accuracy or score.status == "failed":
        log.info(
            "math graders disagree: robust %s, reference %s, truth %r, prediction %r, text ends %r",
            score.status if score.status == "failed" else score.accuracy,
            reference.accuracy,
            truths[0][:200],
            score.prediction[:200],
            text[-300:],
        )
    return score


_GRADERS = {"robust": _robust, "reference": published.grade}


def _compared(text: str, truths: list[str]) -> Score:
    """The last box against each truth; boxes joined to a list count as the list, too."""
    prediction = extract(text)
    if prediction is None:
        return _score(False, "")
    answers, failed = [prediction], False
    body = _single_backslashes(text.rpartition("</think>")[2])
    if (together := chain(body)) is not None:
        alternatives = re.search(r"\\boxed\{[^{}]*\}[\s$]*(?:\\text\{)?\s*(?:or|或)\b", text[-_TAIL:])
        answers = [together] if alternatives else [prediction, together]  # "3 or 4" does not answer 4
    elif (sentence := _boxes_of(re.split(r"[!?。\n]|\.\s", body.strip(" .。\n"))[-1])) is not None:
        answers.append(sentence)  # "\boxed{2} for (a) and \boxed{3} for (b)"
    for answer in answers:
        for truth in truths:
            boxed = chain(truth) or (_boxes_of(truth) if len(truth) < 200 else None) or last_box(truth)
            try:
                if equivalent(answer, truth if boxed is None else boxed):
                    return _score(True, answer[:MAX_ANSWER])
            except pool.WorkerFailed:
                failed = True
    return Score(0.0, 0.0, prediction[:MAX_ANSWER], "failed") if failed else _score(False, prediction[:MAX_ANSWER])


def _score(right: bool, prediction: str) -> Score:
    return Score(1.0 if right else -1.0, float(right), prediction)


def extract(text: str) -> str | None:
    """The answer of a final message; None where there is none.

    It is the last box; without one the last "answer is X", "Answer: X", "答案是 X" or "#### X"; else the message itself
    where it is nothing but an answer.
    """
    body = _single_backslashes(text.rpartition("</think>")[2])
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
        said = stated["mark"] or stated["said"] or stated["chinese"] or rest
        said = _AFTERTHOUGHT.split(said.strip(), maxsplit=1)[0].strip(" *")
        return said.rpartition(" is ")[2]
    bare = body.strip()
    if len(bare) <= MAX_ANSWER and (formula := _FORMULA.fullmatch(bare)):
        return next(g for g in formula.groups() if g)
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", bare)
    short = bare and len(bare) <= 100 and "\n" not in bare and "\\boxed" not in bare
    return bare if short and len(words) <= 2 else None


def last_box(text: str) -> str | None:
    """The content of the last closed \\boxed{} or \\fbox{}; escaped braces do not count. None where there is none."""
    found = _boxes(text)
    return text[found[-1][1] : found[-1][2]] if found else None


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(start, start of content, end of content) of each closed box, by start of content. One pass, in linear time."""
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
    """The last boxes of `text` as one list where only commas, "and", "or" and names stand between; None for one box."""
    found = _boxes(text[-_TAIL:])
    tail, parts = text[-_TAIL:], []
    for (_, begin, end), (following, _, _) in zip(found[-2::-1], found[:0:-1], strict=False):
        between = re.sub(r"\\q?quad|\\text\w*|\\[()\[\]]|[\s${}]", "", tail[end:following])
        if not _JOINT.fullmatch(between):
            break
        parts.insert(0, tail[begin:end])
    return ", ".join([*parts, tail[found[-1][1] : found[-1][2]]]) if parts else None


def _boxes_of(text: str) -> str | None:
    """All boxes of a truth or a sentence as one list, whatever stands between; None for fewer than two."""
    parts, end = [], -1
    for start, begin, close in _boxes(text[-_TAIL:]):
        if start > end:  # nested boxes are part of the outer one
            parts.append(text[-_TAIL:][begin:close])
            end = close
    return ", ".join(parts) if len(parts) > 1 else None


def _single_backslashes(text: str) -> str:
    """Text whose boxes are written with doubled backslashes, as in JSON, with single ones."""
    doubled = "\\\\boxed" in text and not re.search(r"(?<!\\)\\boxed", text)
    return text.replace("\\\\", "\\") if doubled else text


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


@functools.lru_cache(maxsize=1 << 16)  # the samples of one problem mostly give the same few answers
def _equivalent(prediction: str, truth: str) -> bool:
    verdict = compare(prediction, truth)
    if verdict is not None:
        return verdict
    *before, last = sides(clean(prediction))
    known = [side for side in before if _NUMERIC.fullmatch(side)] if "=" not in truth else []
    pair = (prediction, truth)
    if _failures[pair] >= 2:  # once may be a busy machine; a pair that failed twice is not tried again
        raise pool.WorkerFailed("failed twice before")
    try:
        if not all(pool.shared().ask(side, last) for side in known):
            return False  # "\\sqrt{2} = 5" does not mean 5
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
    """One spelling for answers that differ only in spelling: the key of a majority vote."""
    text = split_unit(clean(prediction[:MAX_ANSWER]))[0]
    read = value(text) if _depth(text) <= MAX_DEPTH else None
    return "".join(text.split()) if read is None else repr(read)
