"""Selects trajectories for an SFT set and writes the card that counts the rejected ones by reason.

Every trajectory is counted under exactly one heading, so nothing is lost silently.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from open_agentrl_jax.collect.curation import quotas
from open_agentrl_jax.data.benchmarks import read_problems
from open_agentrl_jax.data.conversations import Conversation
from open_agentrl_jax.data.generated import GENERATED
from open_agentrl_jax.data.prompts import Reader
from open_agentrl_jax.types import Episode, Message, Task, Trajectory

NGRAM = 13  # consecutive words that make two texts equal, as in the contamination analysis of GPT-3


@dataclasses.dataclass
class Sample:
    """A candidate conversation."""

    conversation: Conversation
    problem: str  # the bare text
    calls: int
    succeeded: int  # of the calls
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)  # more columns of the parquet


CHECKS: tuple[tuple[str, Callable[[Trajectory | Episode], bool]], ...] = (
    ("not_graded", lambda t: t.aborted),
    ("wrong", lambda t: t.accuracy < 1),
    ("unfinished", lambda t: t.stop != "answer"),
    ("unreadable_call", lambda t: any(call.error for turn in t.turns for call in turn.tool_calls)),
    ("empty_turn", lambda t: not all(turn.content.strip() or turn.tool_calls for turn in t.turns)),
)


def refusal(trajectory: Trajectory | Episode) -> str:
    """The name of the first of CHECKS that rejects a trajectory; "" if none does."""
    return next((name for name, fails in CHECKS if fails(trajectory)), "")


def problem_of(task: Task) -> str:
    """The bare problem, without its template."""
    return str(task.extra.get("problem") or task.messages[-1].content)


def messages_of(task: Task, trajectory: Trajectory | Episode) -> list[Message]:
    """The whole conversation with structured calls and results."""
    messages = list(task.messages)
    for turn in trajectory.turns:
        words = turn.words if turn.tool_calls else turn.content
        messages.append(Message("assistant", words.strip(), turn.tool_calls))
        messages += [Message(turn.reply_role, output) for output in turn.tool_outputs]
    return messages


def sample_of(task: Task, trajectory: Trajectory | Episode, number: int, tools: list[dict[str, Any]]) -> Sample:
    """Converts a trajectory to a training row; `number` is the index of the try."""
    statuses = [status for turn in trajectory.turns for status in turn.tool_statuses]
    good = sum(status == "ok" for status in statuses)
    columns = {"problem_id": task.id, "try": number, "tool_calls": len(statuses), "tool_success": good}
    conversation = Conversation(f"{task.id}/{number}", messages_of(task, trajectory), tools, task.source)
    return Sample(conversation, problem_of(task), len(statuses), good, columns)


def words(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"\w+", text.lower())


class Contamination:
    """Tests whether a text shares NGRAM consecutive words with one of `texts`; shorter texts must be equal."""

    def __init__(self, texts: Iterable[str]):
        split = [words(text) for text in texts]
        self.texts = len(split)
        self._short = {tuple(w) for w in split if len(w) < NGRAM}
        self._grams = {gram for w in split for gram in _grams(w)}

    def __call__(self, text: str) -> bool:
        """Whether `text` is contaminated."""
        split = words(text)
        return tuple(split) in self._short or not self._grams.isdisjoint(_grams(split))


def contamination(names: str, evaluation: str, format: str | Reader = "auto") -> tuple[Contamination, list[str]]:
    """The contamination test of some evaluation sets, and the names of the sets.

    Args:
        names: comma-separated names or paths for data.benchmarks.read_problems; "data.eval" means `evaluation`.
        evaluation: the config's held-out problems; may be empty, or a key of GENERATED.
        format: format of `evaluation` for data.prompts.read_tasks; other sets are detected row by row.
    """
    sets = [evaluation if name == "data.eval" else name for name in names.split(",")]
    sets = [name for name in sets if name]

    def texts(name: str) -> Iterable[str]:
        if made := GENERATED.get(name):
            return map(problem_of, made.problems(0, made.EVAL_PROBLEMS, evaluation=True))
        return map(problem_of, read_problems(name, format=format if name == evaluation else "auto"))

    return Contamination(text for name in sets for text in texts(name)), sets


def _grams(split: list[str]) -> Iterable[str]:
    return (" ".join(split[i : i + NGRAM]) for i in range(len(split) - NGRAM + 1))


def _answer_text(sample: Sample) -> str:
    """The text of the assistant's turns, including calls."""
    turns = [m for m in sample.conversation.messages if m.role == "assistant"]
    return "\n".join(
        f"{m.content} {' '.join(str(v) for c in m.tool_calls for v in c.arguments.values())}" for m in turns
    )


def select(
    samples: Sequence[Sample], contaminated: Callable[[str], bool], *, size: int = 0, seed: int = 0
) -> tuple[list[Sample], dict[str, int]]:
    """Removes repeated and contaminated samples, then balances the rest.

    Args:
        samples: in any order; the first of equal ones is kept.
        contaminated: tests the text of a problem or an answer.
        size: maximum number of samples, spread evenly over sources and, within a source, over numbers of calls, as
            far as there are enough; 0: all.
        seed: determines the choice within a cell.

    Returns:
        The kept samples in their order, and the counts {duplicate, contaminated, over_size, kept}.
    """
    seen: set[tuple[str, ...]] = set()
    counts, left = collections.Counter[str](), []
    for sample in samples:
        key = (*words(sample.problem), "\n", *words(_answer_text(sample)))
        reason = ""
        if key in seen:
            reason = "duplicate"
        elif contaminated(sample.problem) or contaminated(_answer_text(sample)):
            reason = "contaminated"
        seen.add(key)
        counts[reason or "distinct"] += 1
        if not reason:
            left.append(sample)
    chosen = balance(left, size, seed) if size else left
    kept = len(chosen)
    over = {"over_size": len(left) - kept, "kept": kept}
    return chosen, {"duplicate": counts["duplicate"], "contaminated": counts["contaminated"], **over}


def balance(samples: Sequence[Sample], size: int, seed: int = 0) -> list[Sample]:
    """Selects at most `size` samples, spread evenly over sources and, within a source, over numbers of calls."""
    cells: dict[str, dict[int, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for i, sample in enumerate(samples):
        cells[sample.conversation.source][sample.calls].append(i)
    available = {source: sum(map(len, pools.values())) for source, pools in cells.items()}
    chosen: list[int] = []
    for source, quota in quotas(dict.fromkeys(cells, 1.0), available, size).items():
        pools = cells[source]
        shares = quotas(dict.fromkeys(pools, 1.0), {calls: len(pool) for calls, pool in pools.items()}, quota)
        for calls, count in shares.items():
            chosen += random.Random(f"{seed} {source} {calls}").sample(pools[calls], count)
    return [samples[i] for i in sorted(chosen)]


def table(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row per source and number of calls: conversations, problems, fraction of successful calls."""
    cells: dict[tuple[str, int], list[Sample]] = collections.defaultdict(list)
    for sample in samples:
        cells[sample.conversation.source, sample.calls].append(sample)
    return [
        {
            "source": source,
            "calls": calls,
            "conversations": len(cell),
            "problems": len({sample.problem for sample in cell}),
            "succeeded": round(sum(s.succeeded for s in cell) / (calls * len(cell)), 4) if calls else None,
        }
        for (source, calls), cell in sorted(cells.items())
    ]


def write_card(directory: str | os.PathLike[str], card: dict[str, Any]) -> None:
    """Writes `card.json`, and the same content as `README.md`.

    Args:
        directory: folder of the data set.
        card: sections; a dictionary is a table of names and values, a list of dictionaries is a table.
    """
    place = Path(directory)
    (place / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False))
    text = [f"# {card.get('title', 'Data set')}", ""]
    for name, section in card.items():
        rows = [section] if isinstance(section, dict) else section
        if isinstance(section, dict):
            rows = [{"": key, "value": value} for key, value in section.items()]
        if not isinstance(rows, list) or not rows:
            continue
        lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(v) for v in row.values()] for row in rows)]
        text += [f"## {name}", "", *(f"| {' | '.join(line)} |" for line in lines), ""]
    (place / "README.md").write_text("\n".join(text))


def _cell(value: Any) -> str:
    return "-" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
