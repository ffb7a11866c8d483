"""The copy of a run on gs://, s3:// or another disk: what a new machine needs to continue, and finally the export.

The run itself stays in its directory, since object stores cannot append. A copied checkpoint becomes visible when
copy.json lists it; a partial upload is ignored.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from open_agentrl_jax.storage import read_text
from open_agentrl_jax.types import UserError

LIST = "copy.json"
RUNNING = ("metrics.jsonl", "trajectories.jsonl", "config.json")  # copied with every checkpoint
PARTS = "trajectories-*.jsonl"  # likewise: the trajectories of further processes
ONCE = ("sft.parquet", "init", "reference")  # written before the first checkpoint that needs them, and never changed
FINAL = ("export", "adapter", "report.html")  # as far as the run has them

logger = logging.getLogger(__name__)


class Mirror:
    """Copies in a thread of its own; a failed copy is logged and made good with the next checkpoint."""

    def __init__(self, directory: Path, target: str, fingerprint: str):
        """Opens the copy and checks that it may be written; creates nothing.

        Args:
            directory: the run directory.
            target: place of the copy: gs://bucket/folder, s3://bucket/folder or a path.
            fingerprint: of the run's config (config.fingerprint).

        Raises:
            UserError: the place cannot be reached, holds anything but a copy of this run, or overlaps the run
                directory.
        """
        self.directory, self.target, self._fingerprint = directory, target, fingerprint
        self._pool = ThreadPoolExecutor(1, "mirror")
        self._started: Future[None] | None = None
        with self._reported("it must be readable and writable; gs:// needs pip install gcsfs, s3:// needs s3fs"):
            self._store, root = fsspec.url_to_fs(os.path.expanduser(target))
            self._root: str = str(root).rstrip("/")
            self._refuse_overlap()
            found = self._store.ls(self._root, detail=False) if self._store.exists(self._root) else []
            self.listed: dict[str, Any] = self._read_list() if found else {}
        if found and not self.listed:
            raise UserError(
                f"checkpoint.copy_to={target}: holds files that are no copy of this run, and a copy would overwrite "
                "them; give an empty folder, or remove it"
            )

    def fetch(self) -> bool:
        """Downloads the copy if there is one and the run directory holds no run; config.json comes last.

        Raises:
            UserError: the copy cannot be read.
        """
        if not self.listed.get("checkpoints") or (self.directory / "config.json").exists():
            return False
        with self._reported("the same command tries again"):
            folders = [f"checkpoints/{number}" for number in self.listed["checkpoints"]]
            parts = [path.rpartition("/")[2] for path in self._store.glob(f"{self._root}/{PARTS}")]
            for name in (*self.listed["once"], *folders, *parts, *RUNNING):
                self._download(name)
        return True

    def saved(self, number: int, finished: Callable[[], Any]) -> None:
        """Starts to copy a checkpoint; `finished` waits until it is on disk."""
        self.wait()
        self._started = self._pool.submit(self._push, number, finished)

    def wait(self) -> None:
        """Waits for the running copy; a failure is logged only, since the run itself is complete."""
        if self._started is not None:
            try:
                self._started.result()
            except Exception as error:
                logger.warning("checkpoint.copy_to=%s: not copied: %s", self.target, " ".join(str(error).split())[:300])
            self._started = None

    def finish(self) -> None:
        """Copies the export and the report.

        Raises:
            UserError: they could not be copied.
        """
        self.wait()
        with self._reported(f"the export was not copied, it lies in {self.directory / 'export'}"):
            final = [name for name in FINAL if (self.directory / name).exists()]
            self._upload((*self._parts(), *RUNNING, *final))

    def close(self) -> None:
        """Waits for the running copy and ends the thread."""
        self.wait()
        self._pool.shutdown()

    def _parts(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob(PARTS))

    def _push(self, number: int, finished: Callable[[], Any]) -> None:
        if not self.listed:  # first of all: a copy that breaks off before its first checkpoint is still this run's
            self._write_list([], [])
        finished()
        once = [name for name in ONCE if (self.directory / name).exists()]
        self._upload(name for name in once if name not in self.listed["once"])
        self._upload((*self._parts(), *RUNNING, f"checkpoints/{number}"))
        here = {int(path.name) for path in (self.directory / "checkpoints").iterdir() if path.name.isdigit()}
        self._write_list(sorted({number, *(n for n in self.listed["checkpoints"] if n in here)}), once)
        for folder in self._store.ls(f"{self._root}/checkpoints", detail=False):  # evicted, or partial uploads
            name = folder.rstrip("/").rpartition("/")[2]
            if name.isdigit() and int(name) not in self.listed["checkpoints"]:
                self._store.rm(folder, recursive=True)

    def _refuse_overlap(self) -> None:
        if not isinstance(self._store, LocalFileSystem):
            return
        place, run = Path(self._root).resolve(), self.directory.resolve()
        if place.is_relative_to(run) or run.is_relative_to(place):
            raise UserError(
                f"checkpoint.copy_to={self.target}: lies in or around run_dir={self.directory}, whose files a copy "
                "would overwrite; give another place"
            )

    def _read_list(self) -> dict[str, Any]:
        """copy.json, or, where a killed upload damaged it, a list of what is there; empty if this is no copy.

        Raises:
            UserError: the copy belongs to another run.
        """
        if not self._store.exists(f"{self._root}/{LIST}"):
            return {}
        config, listed = self._read_json("config.json"), self._read_json(LIST)
        theirs = listed.get("fingerprint") or config.get("fingerprint")
        mine = read_text(self.directory / "config.json") if (self.directory / "config.json").exists() else "{}"
        runs = [run for run in (config.get("id"), _parsed(mine).get("id")) if run]
        if theirs is None:
            return {}
        if _parsed(theirs) != _parsed(self._fingerprint):
            raise UserError(
                f"checkpoint.copy_to={self.target}: the copy there is of another config; give another place, or "
                "remove it"
            )
        if len(set(runs)) > 1:
            raise UserError(
                f"checkpoint.copy_to={self.target}: the copy there is of another run of this config; give another "
                f"place, or remove it, or remove {self.directory} to continue that run"
            )
        if isinstance(listed.get("checkpoints"), list) and isinstance(listed.get("once"), list):
            return listed
        logger.warning("%s/%s is damaged; all that is there counts as the copy", self.target, LIST)
        there = f"{self._root}/checkpoints"
        names = [str(path).rstrip("/").rpartition("/")[2] for path in self._store.ls(there, detail=False)]
        once = [name for name in ONCE if self._store.exists(f"{self._root}/{name}")]
        return {"checkpoints": sorted(int(name) for name in names if name.isdigit()), "once": once}

    def _read_json(self, name: str) -> dict[str, Any]:
        path = f"{self._root}/{name}"
        return _parsed(self._store.cat_file(path)) if self._store.exists(path) else {}

    def _write_list(self, checkpoints: list[int], once: list[str]) -> None:
        self.listed = {"checkpoints": checkpoints, "once": once}
        path = f"{self._root}/{LIST}"
        with self._replacing(path) as temporary:
            text = json.dumps(self.listed | {"fingerprint": self._fingerprint})
            self._store.pipe_file(temporary, text.encode())

    @contextlib.contextmanager
    def _replacing(self, path: str) -> Iterator[str]:
        """Where to write a file so that a reader finds it whole or not at all; an object store's uploads are that."""
        self._store.makedirs(path.rpartition("/")[0], exist_ok=True)
        if not isinstance(self._store, LocalFileSystem):
            yield path
            return
        yield f"{path}.writing"
        os.replace(f"{path}.writing", path)

    @contextlib.contextmanager
    def _reported(self, cure: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # networks, buckets and missing packages fail in many ways
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(f"checkpoint.copy_to={self.target}: {text}; {cure}") from error

    def _upload(self, names: Iterable[str]) -> None:
        """Replaces the files of these names; what else lies in a folder of that name there is removed."""
        for source in (self.directory / name for name in names):
            files = [file for file in source.rglob("*") if file.is_file()] if source.is_dir() else [source]
            target = f"{self._root}/{source.relative_to(self.directory).as_posix()}"
            if source.is_dir() and self._store.exists(target):
                self._store.rm(target, recursive=True)
            for file in filter(Path.exists, files):
                with self._replacing(f"{self._root}/{file.relative_to(self.directory).as_posix()}") as temporary:
                    self._store.put_file(str(file), temporary)

    def _download(self, name: str) -> None:
        start = f"{self._root}/"
        for path in self._store.find(f"{start}{name}"):
            target = self.directory / str(path).removeprefix(start)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._store.get_file(path, str(target))


def _parsed(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
