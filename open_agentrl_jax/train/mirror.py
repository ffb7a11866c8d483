"""A run's copy on gs://, s3:// or another disk: what a new machine needs to go on, and in the end the export.

The run itself stays in its directory, since object stores know neither rename nor append. A checkpoint counts in the
copy once the list that names it is written: before that it is not there, however much of it is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from open_agentrl_jax.types import UserError

LIST = "copy.json"
RUNNING = ("metrics.jsonl", "trajectories.jsonl", "config.json")  # renewed with every checkpoint
ONCE = ("sft.parquet", "init", "reference")  # written before the first checkpoint that needs them, and never again
FINAL = ("export", "report.html")
CHUNK = 2**24  # bytes

logger = logging.getLogger(__name__)


class Mirror:
    """Copies in a thread of its own; a copy that fails is told and made up for with the next checkpoint."""

    def __init__(self, directory: Path, target: str):
        """Opens the copy; creates nothing yet.

        Args:
            directory: of the run.
            target: where the copy is or shall be: gs://bucket/folder, s3://bucket/folder or a path.

        Raises:
            UserError: it cannot be reached.
        """
        self.directory, self.target = directory, epath.Path(target)
        self._pool = ThreadPoolExecutor(1, "mirror")
        self._begun: Future[None] | None = None
        with self._told("it must be there to read and write; gs:// needs pip install gcsfs, s3:// needs s3fs"):
            there = self.target / LIST
            self.listed: dict[str, Any] = json.loads(there.read_text()) if there.exists() else {}
            self.config: dict[str, Any] = json.loads((self.target / "config.json").read_text()) if self.listed else {}

    def fetch(self) -> bool:
        """Brings the copy here, where there is one and the run directory holds no run; config.json comes last.

        Raises:
            UserError: it cannot be read.
        """
        if not self.listed or (self.directory / "config.json").exists():
            return False
        with self._told("the same command tries again"):
            self._bring()
        return True

    def _bring(self) -> None:
        folders = [f"checkpoints/{number}" for number in self.listed["checkpoints"]]
        for name in (*self.listed["once"], *folders, *RUNNING):
            if (self.target / name).exists():
                copy(self.target / name, epath.Path(self.directory / name))

    def saved(self, number: int, finished: Callable[[], Any]) -> None:
        """Begins to copy a checkpoint; `finished` waits until it is on disk."""
        self.wait()
        self._begun = self._pool.submit(self._push, number, finished)

    def wait(self) -> None:
        """Until what was begun is copied; a failure is told, for the run itself is whole."""
        if self._begun is not None:
            try:
                self._begun.result()
            except Exception as error:
                logger.warning("checkpoint.copy_to=%s: not copied: %s", self.target, " ".join(str(error).split())[:300])
            self._begun = None

    def finish(self) -> None:
        """Copies the export and the report.

        Raises:
            UserError: they could not be copied.
        """
        self.wait()
        with self._told(f"the export was not copied, it lies in {self.directory / 'export'}"):
            self._copy((*RUNNING, *FINAL))

    def close(self) -> None:
        """Waits and ends the thread."""
        self.wait()
        self._pool.shutdown()

    def _push(self, number: int, finished: Callable[[], Any]) -> None:
        finished()
        once = [name for name in ONCE if (self.directory / name).exists()]
        self._copy(name for name in once if name not in self.listed.get("once", ()))
        self._copy((*RUNNING, f"checkpoints/{number}"))
        here = {int(path.name) for path in (self.directory / "checkpoints").iterdir() if path.name.isdigit()}
        before = self.listed.get("checkpoints", [])
        self.listed = {"checkpoints": sorted({number, *(n for n in before if n in here)}), "once": once}
        (self.target / LIST).write_text(json.dumps(self.listed))
        for folder in (self.target / "checkpoints").iterdir():  # those that broke off are not in the list either
            if folder.name.isdigit() and int(folder.name) not in self.listed["checkpoints"]:
                folder.rmtree()

    @contextlib.contextmanager
    def _told(self, cure: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the many ways of a network, a bucket and a missing package
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(f"checkpoint.copy_to={self.target}: {text}; {cure}") from error

    def _copy(self, names: Iterable[str]) -> None:
        for name in names:
            if (self.directory / name).exists():
                copy(epath.Path(self.directory / name), self.target / name)


def copy(source: epath.Path, target: epath.Path) -> None:
    """A file or a folder, from one store to another; a file there is replaced whole."""
    if source.is_dir():
        if target.exists():
            target.rmtree()
        for child in source.iterdir():
            copy(child, target / child.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK)
