"""A journal of expensive answers: each is written when it arrives, so that a killed command loses none.

There is one file per set of settings. Its name holds a hash of everything that would change an answer (weights,
sampling, budgets): a command with other settings starts afresh, and one that asks for more of the same continues.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_agentrl_jax.rollout.scheduler import Play
from open_agentrl_jax.types import Completion, Episode, Sampling, Task, ToolCall, Trajectory, Turn, UserError


class Journal:
    """Answers by key, on disk. `found` counts answers of earlier runs that were used, `saved` the calls they cost."""

    def __init__(self, directory: str | os.PathLike[str], name: str, settings: dict[str, Any]):
        """Opens `<directory>/<name>-<hash of settings>.jsonl`; a line cut short by a kill is dropped.

        Raises:
            UserError: another process holds the file, or a complete line is damaged.
        """
        self.path = Path(directory) / f"{name}-{digest(settings)[:10]}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.found = self.saved = 0
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 - closed in close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._answers = self._read()
        except BaseException as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise UserError(f"{self.path}: another command is using it; wait for it, or stop it") from error
            raise
        self._unclaimed = set(self._answers)
        if not self._file.tell():
            self._write({"settings": settings})

    def _read(self) -> dict[str, Any]:
        self._file.seek(0)
        text = self._file.read()
        whole = text.rfind(b"\n") + 1
        self._file.truncate(whole)
        answers: dict[str, Any] = {}
        for number, line in enumerate(text[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                if number > 1:
                    answers[entry["key"]] = entry["value"], entry["calls"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path} line {number} is damaged ({error}); delete that line") from error
        self._file.seek(0, os.SEEK_END)
        return answers

    def get(self, key: str) -> Any:
        """The answer, or None; the first use of an earlier run's answer is counted."""
        answer, calls = self._answers.get(key, (None, 0))
        if key in self._unclaimed:
            self._unclaimed.remove(key)
            self.found, self.saved = self.found + 1, self.saved + calls
        return answer

    def put(self, key: str, answer: Any, *, calls: int = 1) -> None:
        """Writes an answer and how many calls it took; the operating system has it on return."""
        self._write({"key": key, "value": answer, "calls": calls})
        self._answers[key] = answer, calls

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def digest(*parts: Any) -> str:
    """A hexadecimal hash of JSON-like values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def key_of(task: Task, sample: int) -> str:
    """Names one episode by its prompt, its truth and the number of the try."""
    return f"{task.id} {sample} {digest([m.to_chat() for m in task.messages], task.answer)[:16]}"


def remembered(play: Play, journal: Journal) -> Play:
    """Wraps `play`: episodes in the journal are not played again, and come back without tokens.

    Aborted episodes are not kept.
    """

    async def replay(task: Task, *, position: int, sample: int, attempt: int) -> Trajectory | Episode:
        key = f"episode {key_of(task, sample)}"
        if (record := journal.get(key)) is not None:
            return from_record(record)
        trajectory = await play(task, position=position, sample=sample, attempt=attempt)
        if not trajectory.aborted:
            journal.put(key, to_record(trajectory), calls=len(trajectory.turns))
        return trajectory

    return replay


def to_record(trajectory: Trajectory | Episode) -> dict[str, Any]:
    """Everything but the token streams, for JSON."""
    names = ("stop", "reward", "accuracy", "prediction", "metrics")
    turns = [dataclasses.asdict(turn) for turn in trajectory.turns]
    return {"turns": turns, **{name: getattr(trajectory, name) for name in names}}


def from_record(record: dict[str, Any]) -> Trajectory:
    """The inverse of `to_record`; its token streams are empty."""
    turns = [Turn(**{**t, "tool_calls": [ToolCall(**c) for c in t["tool_calls"]]}) for t in record["turns"]]
    return tokenless(turns, **{name: value for name, value in record.items() if name != "turns"})


def tokenless(turns: list[Turn], stop: str, **fields: Any) -> Trajectory:
    """A trajectory without token streams."""
    none = np.zeros(0, np.int32)
    return Trajectory(none, none.astype(bool), none.astype(np.float32), none, turns, stop, **fields)


class RememberingEngine:
    """An engine with a journal of its generations; log-probs of a generation from the journal are NaN."""

    def __init__(self, engine: Any, journal: Journal):
        self._engine, self._journal = engine, journal
        self.update_weights, self.release = engine.update_weights, engine.release
        self.calls = 0  # that reached the engine

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, session: str = "") -> Completion:
        """See `rollout.engine.Engine.generate`."""
        key = f"call {digest([int(i) for i in ids], dataclasses.asdict(sampling))}"
        if (found := self._journal.get(key)) is not None:
            count = len(found["ids"])
            unknown = np.full(count, np.nan, np.float32)
            return Completion(np.array(found["ids"], np.int32), unknown, found["finish"], np.zeros(count, np.int32))
        self.calls += 1
        completion = await self._engine.generate(ids, sampling, session=session)
        if completion.finish_reason != "abort":
            self._journal.put(key, {"ids": completion.ids.tolist(), "finish": completion.finish_reason})
        return completion
