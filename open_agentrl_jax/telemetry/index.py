"""Reads what telemetry.writer wrote: the index of trajectories.jsonl, the columns of metrics.jsonl, the config.

A run that was killed, or a full disk, leaves damaged lines behind. They are skipped and counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import zlib
from pathlib import Path
from typing import Any, NoReturn

from open_agentrl_jax.storage import read_bytes, retry_reads
from open_agentrl_jax.telemetry.redact import redact
from open_agentrl_jax.telemetry.tokens import unpack_tokens
from open_agentrl_jax.telemetry.writer import trajectory_files
from open_agentrl_jax.types import UserError

COLUMNS = ("step", "phase", "problem", "sample", "reward", "accuracy", "stop", "calls", "good", "length")
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError, zlib.error)


@dataclasses.dataclass
class Table:
    """The index of a trajectories.jsonl and of the files that further processes wrote beside it.

    It has one row per readable line. `update` follows the files as they grow.
    """

    path: Path  # of the first process
    columns: dict[str, list[Any]] = dataclasses.field(default_factory=lambda: {name: [] for name in COLUMNS})
    places: list[tuple[Path, int, int]] = dataclasses.field(default_factory=list)  # file, first byte and length
    damaged: int = 0  # lines
    _read: dict[Path, tuple[int, bytes]] = dataclasses.field(default_factory=dict)  # end and text of the last line

    @retry_reads
    def update(self) -> None:
        """Reads the new whole lines; begins again if a file was cut or replaced."""
        paths = [path for path in trajectory_files(self.path) if path.exists()]
        if any(_replaced(path, *self._read.get(path, (0, b""))) for path in paths):
            self.__init__(self.path)
        for path in paths:
            self._follow(path)

    def _follow(self, path: Path) -> None:
        end, last = self._read.get(path, (0, b""))
        with open(path, "rb") as file:
            file.seek(end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if (row := _row(line)) is None:
                    self.damaged += 1
                else:
                    for name, value in row.items():
                        self.columns[name].append(value)
                    self.places.append((path, end, len(line)))
                end, last = end + len(line), line
        self._read[path] = end, last

    def __len__(self) -> int:
        return len(self.places)

    def sizes(self) -> list[int]:
        """Bytes of each row."""
        return [size for *_, size in self.places]

    @retry_reads
    def read(self, first: int, end: int) -> bytes:
        """The lines of the rows first .. end - 1."""
        lines = []
        for path, places in itertools.groupby(self.places[first:end], key=lambda place: place[0]):
            with open(path, "rb") as file:
                for _, start, size in places:
                    file.seek(start)
                    lines.append(file.read(size))
        return b"".join(lines)

    def groups(self) -> list[tuple[int, int]]:
        """Rows [first, end) of each group: adjacent rows of one phase, step and problem with increasing samples."""
        c, edges = self.columns, [0]
        keys = list(zip(c["phase"], c["step"], c["problem"], strict=True))
        edges += [i for i in range(1, len(self)) if keys[i] != keys[i - 1] or c["sample"][i] <= c["sample"][i - 1]]
        return list(zip(edges, [*edges[1:], len(self)], strict=True)) if len(self) else []


def _replaced(path: Path, end: int, last: bytes) -> bool:
    """Whether the file no longer has the line `last` before the byte `end`."""
    with open(path, "rb") as file:
        file.seek(end - len(last))
        return file.read(len(last)) != last


def _row(line: bytes) -> dict[str, Any] | None:
    """The columns of a line; None if the line is damaged."""
    try:
        t = json.loads(line, parse_constant=_refuse)
        metrics = t.get("metrics", {})
        row = {
            "step": t["step"],
            "phase": t.get("phase", ""),
            "problem": str(t["problem_id"]),
            "sample": t.get("sample", 0),
            "reward": t["reward"],
            "accuracy": t["accuracy"],
            "stop": t["stop"],
            "calls": int(metrics.get("tool_calls", 0)),
            "good": int(metrics.get("tool_success", 0)),
            "length": int(metrics.get("response_length", 0)),
        }
        numbers = all(math.isfinite(row[name]) for name in ("step", "sample", "reward", "accuracy"))
        chats = all(message["role"] + "" for name in ("prompt", "messages") for message in t.get(name, ()))
        if not (numbers and chats and row["stop"] + row["phase"] is not None):
            return None
        if "tokens" in t:
            unpack_tokens(t["tokens"])
        return row
    except DAMAGE:
        return None


def _refuse(constant: str) -> NoReturn:
    """NaN and Infinity, which browsers do not read."""
    raise ValueError(constant)


def read_metrics(directory: Path) -> dict[str, dict[str, list[Any]]]:
    """metrics.jsonl as columns by phase; a value that a step lacks is None. Damaged lines are left out.

    Raises:
        UserError: there is no such file, or no line of it can be read.
    """
    path = directory / "metrics.jsonl"
    try:
        whole = read_bytes(path).rpartition(b"\n")[0].splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: missing; give the directory of a run, e.g. runs/quickstart") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the directory of a run") from error
    lines = [line for text in whole if (line := _metrics(text)) is not None]
    if whole and not lines:
        raise UserError(f"{path}: no line is a JSON object with step and phase; give the directory of a run")
    phases: dict[str, dict[str, list[Any]]] = {}
    for phase in dict.fromkeys(line["phase"] for line in lines):
        own = [line for line in lines if line["phase"] == phase]
        names = dict.fromkeys(name for line in own for name in line if name != "phase")
        phases[phase] = {name: [line.get(name) for line in own] for name in names}
    return phases


def _metrics(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text, parse_constant=_refuse)
        return line if isinstance(line["phase"], str) and math.isfinite(line["step"]) else None
    except DAMAGE:
        return None


def read_config(directory: Path) -> dict[str, Any]:
    """The run's config without secrets, which earlier releases wrote into config.json; empty if there is none."""
    try:
        config = json.loads(read_bytes(directory / "config.json"))["config"]
        return redact(config) if isinstance(config, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
