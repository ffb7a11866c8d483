"""Writes a run's metrics and trajectories: metrics.jsonl, trajectories.jsonl, and TensorBoard and wandb if configured.

Each further process of a run writes the trajectories that it plays to a file of its own, trajectories-<process>.jsonl.

The files grow by whole lines. A checkpoint records their lengths, and a resumed run cuts off what was written after it:
the files read as if the run had never stopped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from open_agentrl_jax.storage import read_bytes
from open_agentrl_jax.telemetry.redact import redact
from open_agentrl_jax.telemetry.tokens import pack_tokens
from open_agentrl_jax.types import Group, UserError

METRICS = "metrics.jsonl"
PART = re.compile(r"trajectories-([1-9]\d*)\.jsonl")
BLOCK = 1 << 16  # bytes

logger = logging.getLogger(__name__)


def trajectory_file(process: int) -> str:
    """The name of the file that a process writes its trajectories to."""
    return f"trajectories-{process}.jsonl" if process else "trajectories.jsonl"


def trajectory_files(path: Path) -> list[Path]:
    """The trajectory files of a run in the order of the processes, given that of the first, which may be missing."""
    parts = [part for part in path.parent.glob(f"{path.stem}-*.jsonl") if PART.fullmatch(part.name)]
    return [path, *sorted(parts, key=_process_of)]


def _process_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


class Writer:
    """The open files of one run directory."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        processes: int = 1,
        offsets: Mapping[str, int] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tensorboard: bool = False,
        wandb_project: str = "",
        run_id: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the files and cuts them to `offsets`.

        Args:
            directory: the run directory.
            processes: of the run; all but the first use TrajectoryWriter.
            offsets: length of each file in bytes; missing ones are emptied. A file that is shorter than this is cut at
                its last whole line, with a warning.
            tools: schemas of the tools that the model may call, for trajectories.jsonl.
            tensorboard: write to `<directory>/tensorboard`.
            wandb_project: name of a wandb project; empty for none.
            run_id: a wandb run with this id is continued.
            config: shown by wandb, without secrets.

        Raises:
            UserError: TensorBoard or wandb is asked for and not installed.
        """
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._tools, self._trajectories = list(tools), trajectory_file(0)
        self._board = _open_board if tensorboard else None
        self._boards: dict[str, Any] = {}
        self._wandb = None
        if tensorboard:
            _import("tensorboardX", "telemetry.tensorboard", "tensorboard")
        if wandb_project:
            wandb = _import("wandb", "telemetry.wandb_project", "wandb")
            self._wandb = wandb.init(
                project=wandb_project,
                name=self._directory.name,
                id=run_id or None,
                config=redact(dict(config or {})),
                resume="allow",
            )
        # Files of processes that the run no longer has are cut as well; they stay open for `offsets` alone.
        older = [
            path.name
            for path in trajectory_files(self._directory / trajectory_file(0))[1:]
            if _process_of(path) >= processes
        ]
        self._open((METRICS, trajectory_file(0), *older), offsets)
        self._steps, self._lines = _position(self._directory / METRICS)

    def metrics(self, step: int, phase: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Appends one line; numbers that are not finite are written as null, which every JSON reader accepts."""
        numbers = {name: _number(value) for name, value in values.items()}
        self._append(METRICS, {"step": step, "phase": phase, **numbers})
        shown = {f"{phase}/{name}": value for name, value in numbers.items() if isinstance(value, int | float)}
        if self._board is not None:
            if phase not in self._boards:  # one log per phase, as each has steps of its own to purge
                purge = self._steps.get(phase, -1) + 1
                self._boards[phase] = self._board(self._directory / "tensorboard" / phase, purge)
            for name, value in shown.items():
                self._boards[phase].add_scalar(name, value, step)
        if self._wandb is not None:
            # wandb ignores a step that it has already: lines that a resumed run writes again appear once.
            self._wandb.log({**shown, f"{phase}/step": step}, step=self._lines)
        self._lines += 1
        return numbers

    def trajectories(self, step: int, phase: str, groups: Iterable[Group]) -> None:
        """Appends one line per episode, in the order of problems and samples.

        `tokens` holds the first sequence of the episode, `more_tokens` the others, if there are any.
        """
        for group in groups:
            for sample, trajectory in enumerate(group.trajectories):
                tokens = [pack_tokens(sequence) for sequence in trajectory.sequences]
                self._append(
                    self._trajectories,
                    {
                        "step": step,
                        "phase": phase,
                        "problem_id": group.task.id,
                        **({"source": group.task.extra["row_name"]} if "row_name" in group.task.extra else {}),
                        "sample": sample,
                        "prompt": [message.to_chat() for message in group.task.messages],
                        "tools": self._tools,
                        "messages": [message.to_chat() for message in trajectory.said],
                        "answer": group.task.answer if isinstance(group.task.answer, str) else None,
                        "reward": round(trajectory.reward, 6),
                        "accuracy": trajectory.accuracy,
                        "stop": trajectory.stop,
                        "versions": sorted({int(v) for s in trajectory.sequences for v in s.versions if v >= 0}),
                        "metrics": {k: v for k, v in trajectory.metrics.items() if k != "seconds"},
                        "tokens": tokens[0] if tokens else None,
                        **({"more_tokens": tokens[1:]} if len(tokens) > 1 else {}),
                    },
                )

    def offsets(self) -> dict[str, int]:
        """Length of each file in bytes, after a flush to the operating system."""
        for file in self._files.values():
            file.flush()
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        """Closes the files, TensorBoard and wandb."""
        for file in self._files.values():
            file.close()
        for board in self._boards.values():
            board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _open(self, names: Iterable[str], offsets: Mapping[str, int] | None) -> None:
        self._files = {name: _open_cut(self._directory / name, (offsets or {}).get(name, 0)) for name in names}

    def _append(self, name: str, line: dict[str, Any]) -> None:
        self._files[name].write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        self._files[name].flush()


class TrajectoryWriter(Writer):
    """Writes the trajectories of any process but the first, to a file of its own, and no metrics."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        process: int,
        *,
        offsets: Mapping[str, int] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ):
        """Opens the file of `process` and cuts it; see Writer."""
        self._directory, self._tools, self._trajectories = Path(directory), list(tools), trajectory_file(process)
        self._boards, self._wandb = {}, None
        self._open((self._trajectories,), offsets)

    def metrics(self, step: int, phase: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes nothing."""
        return {}


def _import(module: str, field: str, extra: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        raise UserError(f"{field}: install it with pip install -e '.[{extra}]'") from error


def _open_board(directory: Path, purge_step: int) -> Any:
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

    return SummaryWriter(str(directory), purge_step=purge_step)


def _open_cut(path: Path, length: int) -> IO[bytes]:
    """Opens a file to append to, cut to `length` bytes, or, if it is shorter, at the end of its last whole line."""
    file = open(path, "ab+")  # noqa: SIM115 - closed in Writer.close
    size = file.seek(0, os.SEEK_END)
    if size < length:
        end = size
        while end > 0:
            start = max(0, end - BLOCK)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            end = start + place + 1 if place >= 0 else start
            if place >= 0:
                break
        logger.warning(
            "%s: has %d bytes where the checkpoint expects %d: some lines were lost; cut to its last whole line (%d "
            "bytes) and continued from there",
            path,
            size,
            length,
            end,
        )
        length = end
    file.truncate(length)
    file.seek(length)
    return file


def _position(path: Path) -> tuple[dict[str, int], int]:
    """The last step of each phase in metrics.jsonl, and its number of lines."""
    steps: defaultdict[str, int] = defaultdict(int)
    lines = read_bytes(path).splitlines()
    for line in lines:
        try:
            value = json.loads(line)
            steps[value["phase"]] = max(steps[value["phase"]], value["step"])
        except (ValueError, KeyError, TypeError):  # a damaged line; the report names it
            continue
    return dict(steps), len(lines)


def _number(value: Any) -> Any:
    if isinstance(value, str | bool) or value is None:
        return value
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
