"""Reads problem files as tasks: a reader per format and a prompt template per source, both chosen for each row.

The data that grades a problem stays in `Task.answer` and never enters a prompt. docs/graders.md lists the formats.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from open_agentrl_jax.data.conversations import Conversation as Conversation
from open_agentrl_jax.data.conversations import from_chat
from open_agentrl_jax.data.conversations import read_conversations as read_conversations
from open_agentrl_jax.data.rows import BadRow, Table, decode, read_table, write_parquet
from open_agentrl_jax.rewards.choice import letter
from open_agentrl_jax.rewards.graders import check_truth
from open_agentrl_jax.rewards.math import chain, last_box
from open_agentrl_jax.text import read_literal
from open_agentrl_jax.types import Message, Task, UserError

TaskTable = Table[Task]
TOOL_HINT = (
    "You may run Python with the tool to calculate, search or test a claim. Decide on a plan before the first call, "
    "and use the tool to carry it out or to check it, not instead of thinking."
)


@dataclasses.dataclass(frozen=True)
class Template:
    """The prompt for problems of a source, and the grader of their answers: math | choice | code."""

    preamble: str
    ending: str
    grader: str = "math"

    def render(self, problem: str, *, tools: bool) -> str:
        """The user message for a problem."""
        return "\n\n".join([self.preamble, problem.strip(), f"{TOOL_HINT} {self.ending}" if tools else self.ending])


_BOX = "Finish with the result alone in \\boxed{}."
TEMPLATES: dict[str, Template] = {
    "gsm8k": Template(
        "Here is a word problem with everyday quantities.",
        "Finish with the number alone, without its unit, in \\boxed{}.",
    ),
    "aime": Template(
        "Here is a problem from a mathematics contest. Its answer is an integer from 0 to 999.",
        "Finish with that integer in \\boxed{}.",
    ),
    "gpqa": Template(
        "Here is a graduate-level science question with four options, of which one is right.",
        "Finish with the letter of the right option in \\boxed{}.",
        "choice",
    ),
    "choice": Template(
        "Here is a multiple-choice question, of which one option is right.",
        "Finish with the letter of the right option in \\boxed{}.",
        "choice",
    ),
    "code": Template(
        "Here is a programming problem.",
        "Finish with the whole program in one ```python block. It is run on tests that you do not see.",
        "code",
    ),
    "science": Template(
        "Here is a question from the natural sciences.", f"Work in SI units unless told otherwise. {_BOX}"
    ),
    "math": Template("Here is a mathematics problem.", _BOX),
}
# the first pattern found in "<ability> <source>" selects the template; mathematics is the default
_FAMILIES = (
    ("code", r"\bcode|coding|leetcode|livecodebench|codeforces|program"),
    ("gpqa", r"gpqa"),
    ("choice", r"choice"),
    ("gsm8k", r"gsm8k"),
    ("aime", r"(?<!beyond)(?<!beyond.)aime"),  # answers of BeyondAIME may exceed 999
    ("science", r"scien|physic|chemi|biolog"),
    ("math", r""),
)


def family(source: str, ability: str = "") -> str:
    """The key of TEMPLATES for a source name and a row's `ability`."""
    text = f"{ability} {source}".lower()
    return next(name for name, pattern in _FAMILIES if re.search(pattern, text))


@dataclasses.dataclass
class Problem:
    """A parsed row. `messages` is set if the row contains a whole conversation, which is kept unchanged."""

    text: str
    answer: Any
    source: str = ""
    family: str = ""
    id: str = ""
    messages: list[Message] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


Reader = Callable[[dict[str, Any]], Problem]  # of a row with lower-case column names; raises BadRow if unusable


def read_tasks(
    path: str | os.PathLike[str],
    *,
    format: str | Reader = "auto",
    tools: bool = True,
    source: str = "",
    check: bool = True,
) -> TaskTable:
    """Reads the problems of a file, a folder or a Hub data set.

    Args:
        path: jsonl, json or parquet; rows of several sources may be mixed in one file.
        format: "auto" detects the format of each row by its columns; a name of FORMATS, or a reader, applies to all.
        tools: False omits the sentence about the tool from the prompts (tool-free evaluation).
        source: source of rows without one; empty: the name of their file.
        check: reject rows with an answer that their grader cannot grade; False for a custom grader.

    Returns:
        The tasks; `.skipped` lists the unused rows. `extra` contains "problem" (the bare text), "grader" (math | choice
        | code), "family" and further data of the row.

    Raises:
        UserError: there is nothing at `path`, a file is damaged, the format is unknown, no row is usable, or more than
            1 % of the rows are bad.
    """
    if format != "auto" and isinstance(format, str) and format not in FORMATS:
        raise UserError(f"data format {format!r} is unknown; use auto, one of {', '.join(FORMATS)}, or module:function")
    fixed = FORMATS.get(format) if isinstance(format, str) else format
    seen: set[str] = set()

    def convert(row: dict[str, Any], file: Path, number: int) -> Task:
        columns = {str(k).lower().strip(): v for k, v in row.items()}
        problem = (fixed or _detect(columns))(columns)
        origin = problem.source or source or file.stem
        name = problem.family or family(origin, str(columns.get("ability") or ""))
        template = TEMPLATES[name]
        if not problem.text.strip():
            raise BadRow("no prompt")
        if _empty(problem.answer):
            raise BadRow("no answer")
        if check and (reason := check_truth(template.grader, problem.answer)):
            raise BadRow(f"no usable answer: {reason}")
        text = template.render(problem.text, tools=tools)
        messages = problem.messages or [Message("user", text)]
        label = f"{origin}/{problem.id or number}"
        if label in seen:
            label = f"{label}#{file.name}:{number}"
        seen.add(label)
        extra = {"problem": problem.text, "grader": template.grader, "family": name, **problem.extra}
        return Task(label, messages, problem.answer, origin, extra)

    return read_table(path, convert)


def write_tasks(path: str | os.PathLike[str], tasks: list[Task], columns: list[dict[str, Any]] | None = None) -> None:
    """Writes tasks as an RL parquet (RECIPE.md 7) that `read_tasks` reads back to equal tasks.

    The prompt column contains the bare problem, and reading applies the template; a conversation, or a prompt that no
    template made, is kept whole (`extra_info.verbatim`). `columns` adds columns, one dictionary per task.
    """
    rows = []
    for task, more in zip(tasks, columns or [{}] * len(tasks), strict=True):
        extra = dict(task.extra)
        bare = extra.pop("problem", None)
        whole = bare is None or len(task.messages) != 1
        prompt = [m.to_chat() for m in task.messages] if whole else [{"role": "user", "content": bare}]
        truth = task.answer if isinstance(task.answer, str) else json.dumps(task.answer, ensure_ascii=False)
        extra |= {"id": task.id, "verbatim": True} if whole else {"id": task.id}
        if isinstance(task.answer, dict):
            extra["tests_are_text"] = bool(extra.get("tests_are_text"))
        rows.append(
            {
                "data_source": task.source,
                "prompt": prompt,
                "ability": extra.get("family", ""),
                "reward_model": {"ground_truth": truth, "style": "rule"},
                "extra_info": json.dumps(extra, ensure_ascii=False),
                **more,
            }
        )
    write_parquet(path, rows)


def _empty(value: Any) -> bool:
    return (
        value is None
        or value != value
        or (isinstance(value, str | list | dict) and not value)
        or str(value).strip() == ""
    )


def _text(value: Any) -> str:
    """A cell as text; 70.0, the form of 70 in a column of floats, becomes "70"."""
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _pick(row: dict[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if name in row and not _empty(row[name])), None)


def _gsm8k(row: dict[str, Any]) -> Problem:
    worked, mark, answer = _text(row.get("answer")).rpartition("####")
    if not mark:
        raise BadRow("the answer does not end in '#### N'")
    extra = {"solution": worked.strip()} if worked.strip() else {}
    return Problem(
        _text(row.get("question")), answer.strip().replace(",", ""), "gsm8k", id=_text(row.get("id")), extra=extra
    )


def _plain(row: dict[str, Any]) -> Problem:
    answer = _pick(row, "answer", "final_answer", "reference_answer", "expected_answer")
    if answer is None and isinstance(row.get("solution"), str):
        answer = chain(row["solution"]) or last_box(row["solution"])
    source = _text(_pick(row, "data_source", "source"))
    text, messages = _put(_pick(row, "problem", "question", "prompt", "messages"))
    return Problem(text, _answer(answer), source, id=_text(row.get("id")), messages=messages)


def _put(prompt: Any) -> tuple[str, list[Message]]:
    """The problem's text in a prompt (text or a list of messages), and the messages if there are several."""
    prompt = decode(prompt)
    if prompt is None or isinstance(prompt, str):
        return prompt or "", []
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        raise BadRow("no prompt: it must be text or a list of messages")
    messages = [from_chat({"role": "user", **m}) for m in prompt if not _empty(m.get("content"))]
    return messages[-1].content if messages else "", messages if len(messages) > 1 else []


def _answer(value: Any) -> str | list[str]:
    """An answer as text, or a list of accepted answers."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value)):
        raise BadRow("the answer must be text, a number or a list of them")
    if isinstance(value, list):
        texts = list(dict.fromkeys(_text(v).strip() for v in value if not _empty(v)))
        return texts if len(texts) > 1 else "".join(texts)
    return _text(value)


LETTERS = "ABCDEFGHIJ"  # those that the choice grader accepts


def _choice(row: dict[str, Any]) -> Problem:
    """A question with a column of options: a list, a dictionary by label, or {"text": [...], "label": [...]}."""
    options = decode(_pick(row, "choices", "options"))
    labels: list[str] = []
    if isinstance(options, dict):
        texts, named = options.get("text"), options.get("label") or options.get("labels")
        if not isinstance(texts, list):
            texts, named = list(options.values()), list(options)
        labels, options = [_text(label).strip() for label in named or ()], texts
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS) or any(map(_empty, options)):
        raise BadRow(f"the options must be a list of 2 to {len(LETTERS)} texts")
    texts = [re.sub(r"^\(?[A-J][).:]\s*", "", _text(o).strip()) for o in options]
    if len(labels) != len(texts):
        labels = list(LETTERS[: len(texts)])
    answer = _pick(row, "answerkey", "answer", "correct_answer", "answer_index", "label", "target")
    right = _option(answer, texts, labels)
    question = _text(_pick(row, "question", "problem", "prompt"))
    if not all(text in question for text in texts):
        question += "\n\n" + "\n".join(f"({x}) {text}" for x, text in zip(LETTERS, texts, strict=False))
    source = _text(_pick(row, "data_source", "source", "dataset"))
    return Problem(question, LETTERS[right], source, "choice", _text(row.get("id")))


def _option(answer: Any, texts: list[str], labels: list[str]) -> int:
    """The index of the option that an answer names by its index from 0, its label, its letter or its text."""
    if isinstance(answer, int | float) and not isinstance(answer, bool) and answer in range(len(texts)):
        return int(answer)
    named = _text(answer).strip()
    bare = named.strip("(). ")
    for known in (labels, LETTERS[: len(texts)], texts):
        for spelled in (named, bare):
            if spelled in known and (spelled or not isinstance(known, str)):
                return known.index(spelled)
    if named.isdigit() and int(named) < len(texts):
        return int(named)
    raise BadRow(f"no answer: {named!r} names none of the {len(texts)} options")


def _gpqa(row: dict[str, Any]) -> Problem:
    question = _text(_pick(row, "problem", "question"))
    extra = {"domain": _text(_pick(row, "domain", "high-level domain"))}
    if "correct answer" in row:
        options = [
            _text(row[k]).strip() for k in ("correct answer", *(f"incorrect answer {i}" for i in (1, 2, 3))) if k in row
        ]
        if len(options) != 4 or not all(options):
            raise BadRow("not four options")
        order = list(range(4))
        random.Random(hashlib.sha256(question.encode()).digest()).shuffle(order)
        question += "\n\n" + "\n".join(f"({letter}) {options[i]}" for letter, i in zip("ABCD", order, strict=True))
        return Problem(
            question, "ABCD"[order.index(0)], "gpqa", "gpqa", _text(_pick(row, "record id", "id")), extra=extra
        )
    boxed = letter(last_box(_text(row.get("solution"))) or "")
    answer = boxed or _text(_pick(row, "answer"))
    if not re.fullmatch(r"\(?[A-Z]\)?\.?", answer.strip()):
        raise BadRow("no answer: the solution boxes no letter")
    return Problem(question, answer.strip("(). "), "gpqa", "gpqa", _text(row.get("id")), extra=extra)


def _verl(row: dict[str, Any]) -> Problem:
    reward, extra = (decode(row.get(k)) for k in ("reward_model", "extra_info"))
    text, messages = _put(row.get("prompt"))
    if not text.strip():
        raise BadRow("no prompt: it must be text or a list of messages")
    if not isinstance(reward, dict):
        raise BadRow("no answer: reward_model must be an object with ground_truth")
    extra = {k: v for k, v in extra.items() if v is not None} if isinstance(extra, dict) else {}
    answer, name, source = decode(reward.get("ground_truth")), "", _text(row.get("data_source"))
    if isinstance(answer, str) and answer.lstrip().startswith("{"):
        answer = read_literal(answer)  # tests as a Python literal
    if isinstance(answer, dict):  # null columns come from the parquet schema
        answer = {k: v for k, v in answer.items() if v is not None}
        if answer.keys() & {"inputs", "outputs", "assert_case", "test_code"}:
            name = "code"
            if isinstance(reward.get("ground_truth"), str) and extra.pop("tests_are_text", True):
                extra["tests_are_text"] = True  # the published grader treats text and objects differently
    elif isinstance(answer, list) and answer and all(isinstance(a, str) for a in answer):
        answer = answer[0] if len(answer) == 1 else answer  # several accepted answers
    else:
        answer = _text(reward.get("ground_truth"))
    identity = _text(_pick(extra, "id", "index")).removeprefix(f"{source}/")
    if extra.get("verbatim") and not messages:
        messages = [from_chat({"role": "user", **m}) for m in decode(row["prompt"])]
    kept = {k: v for k, v in extra.items() if k not in ("id", "index", "grader", "family", "problem", "verbatim")}
    return Problem(text, answer, source, name, identity, messages, kept)


class _TextOnly(pickle.Unpickler):
    """Unpickles the text in LiveCodeBench's files; refuses every class, so that no code can run."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise BadRow(f"the private tests hold a pickled {module_name}.{global_name}; only text is read")


def _lcb_tests(cell: Any) -> list[dict[str, Any]]:
    value = decode(cell)
    if isinstance(value, str) and value.strip():
        try:
            opened = zlib.decompress(base64.b64decode(value))
            value = json.loads(_TextOnly(io.BytesIO(opened)).load())
        except (ValueError, zlib.error, pickle.UnpicklingError, EOFError, TypeError, RecursionError) as e:
            raise e if isinstance(e, BadRow) else BadRow(f"the private tests cannot be opened ({e})") from e
    tests = value if isinstance(value, list) else []
    if not all(isinstance(t, dict) and isinstance(t.get("input"), str) and "output" in t for t in tests):
        raise BadRow("its tests must be a list of objects with input (text) and output")
    return tests


def _livecodebench(row: dict[str, Any]) -> Problem:
    public, private = _lcb_tests(row.get("public_test_cases")), _lcb_tests(row.get("private_test_cases"))
    shown = [(t["input"], t["output"]) for t in public]
    # the statement shows the public tests, so they grade only if there are no others
    tests = [t for t in private if (t["input"], t["output"]) not in shown] or public
    answer: dict[str, Any] = (
        {"inputs": [t["input"] for t in tests], "outputs": [t["output"] for t in tests]} if tests else {}
    )
    metadata = decode(row.get("metadata"))
    if answer and isinstance(metadata, dict) and metadata.get("func_name"):
        answer["fn_name"] = metadata["func_name"]
    text, starter = _text(row.get("question_content")), _text(row.get("starter_code")).strip()
    if starter:
        text += f"\n\nStart from this code and keep its names:\n```python\n{starter}\n```"
    keep = ("contest_date", "difficulty", "platform", "question_id")
    extra = {k: _text(row[k]) for k in keep if not _empty(row.get(k))}
    return Problem(text, answer, "livecodebench", "code", _text(row.get("question_id")), extra=extra)


def _bare(row: dict[str, Any]) -> Problem:
    problem = _detect(row)(row)
    problem.messages = problem.messages or [Message("user", problem.text.strip())]
    return problem


FORMATS: dict[str, Reader] = {
    "bare": _bare,  # as "auto", without a template
    "verl": _verl,
    "livecodebench": _livecodebench,
    "gpqa": _gpqa,
    "choice": _choice,
    "gsm8k": _gsm8k,
    "aime": _plain,
    "plain": _plain,
}
_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = (
    ("verl", lambda r: "prompt" in r and "reward_model" in r),
    ("livecodebench", lambda r: "question_content" in r),
    ("gpqa", lambda r: "correct answer" in r or ("domain" in r and "solution" in r and "answer" not in r)),
    ("choice", lambda r: any(isinstance(decode(r.get(k)), list | dict) and r[k] for k in ("choices", "options"))),
    ("gsm8k", lambda r: "question" in r and "####" in str(r.get("answer"))),
    ("plain", lambda r: any(k in r for k in ("problem", "question", "prompt"))),
)


def _detect(row: dict[str, Any]) -> Reader:
    for name, fits in _COLUMNS:
        if fits(row):
            return FORMATS[name]
    raise BadRow(f"no prompt: its columns ({', '.join(sorted(row)) or 'none'}) are of no known format")
