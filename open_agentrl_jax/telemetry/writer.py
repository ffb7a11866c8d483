"""Where a run's numbers and texts go: metrics.jsonl and trajectories.jsonl always, TensorBoard and wandb where asked.

Both files only ever grow by whole lines, and a checkpoint remembers how long they were, so that a continued run cuts
off what came after it and the files read as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from open_agentrl_jax.telemetry.tokens import pack_tokens
from open_agentrl_jax.types import Group, UserError

FILES = ("metrics.jsonl", "trajectories.jsonl")


class Writer:
    """The open files of one run directory."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        offsets: Mapping[str, int] | None = None,
        tensorboard: bool = False,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the files and cuts them to `offsets` (bytes; default: to nothing).

        Raises:
            UserError: TensorBoard or wandb is asked for and not installed.
        """
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._board = self._wandb = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                raise UserError("telemetry.tensorboard: install it with pip install -e '.[tensorboard]'") from error
            self._board = SummaryWriter(str(self._directory / "tensorboard"))
        if wandb_project:
            try:
                import wandb  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                raise UserError("telemetry.wandb_project: install it with pip install -e '.[wandb]'") from error
            self._wandb = wandb.init(
                project=wandb_project, name=self._directory.name, config=dict(config or {}), resume="allow"
            )
        self._files = {}
        for name in FILES:
            file = open(self._directory / name, "ab")  # noqa: SIM115 - closed in close()
            file.truncate((offsets or {}).get(name, 0))
            self._files[name] = file

    def metrics(self, step: int, phase: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Appends one line; numbers that are not finite are written as null, which every JSON reader takes."""
        numbers = {name: _number(value) for name, value in values.items()}
        self._append("metrics.jsonl", {"step": step, "phase": phase, **numbers})
        shown = {f"{phase}/{name}": value for name, value in numbers.items() if isinstance(value, int | float)}
        if self._board is not None:
            for name, value in shown.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**shown, f"{phase}/step": step})
        return numbers

    def trajectories(self, step: int, phase: str, groups: Iterable[Group]) -> None:
        """Appends one line a trajectory, in the order of problems and samples."""
        for group in groups:
            for sample, trajectory in enumerate(group.trajectories):
                self._append(
                    "trajectories.jsonl",
                    {
                        "step": step,
                        "phase": phase,
                        "problem_id": group.task.id,
                        "sample": sample,
                        "prompt": [message.to_chat() for message in group.task.messages],
                        "messages": [message.to_chat() for message in trajectory.said],
                        "answer": group.task.answer if isinstance(group.task.answer, str) else None,
                        "reward": round(trajectory.reward, 6),
                        "accuracy": trajectory.accuracy,
                        "stop": trajectory.stop,
                        "versions": sorted({int(v) for v in trajectory.versions if v >= 0}),
                        "metrics": {k: v for k, v in trajectory.metrics.items() if k != "seconds"},
                        "tokens": pack_tokens(trajectory),
                    },
                )

    def offsets(self) -> dict[str, int]:
        """Bytes of each file, all of them handed to the operating system."""
        for file in self._files.values():
            file.flush()
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        """Closes all."""
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, name: str, line: dict[str, Any]) -> None:
        self._files[name].write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        self._files[name].flush()


class Silent(Writer):
    """Writes nothing: for the processes that follow the first."""

    def __init__(self) -> None:
        self._board = self._wandb = None
        self._files = {}

    def _append(self, name: str, line: dict[str, Any]) -> None:
        pass


def _number(value: Any) -> Any:
    if isinstance(value, str | bool) or value is None:
        return value
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
