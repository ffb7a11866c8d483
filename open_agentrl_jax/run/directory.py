"""The run directory: locked by one run, claimed for one config, cleaned after a refused start."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from open_agentrl_jax import config as configs
from open_agentrl_jax.config import Config, to_dict
from open_agentrl_jax.data import rows
from open_agentrl_jax.data.benchmarks import place_of
from open_agentrl_jax.data.generated import GENERATED
from open_agentrl_jax.data.loader import WEIGHTED
from open_agentrl_jax.parallel import processes
from open_agentrl_jax.settings import differences
from open_agentrl_jax.storage import read_text
from open_agentrl_jax.telemetry.redact import redact
from open_agentrl_jax.types import UserError

LOCK = ".lock"

logger = logging.getLogger(__name__)
_locks: dict[Path, IO[str]] = {}  # open until this process ends: closing a file releases its lock


def lock_directory(directory: Path) -> None:
    """Creates the run directory and locks it until this process ends, however it ends.

    A new directory is readable by its owner only: conversations and weights are not for other users of the machine.
    The lock is a POSIX record lock: the kernel releases it with the process, child processes do not inherit it, and NFS
    keeps it across hosts.

    Raises:
        UserError: another process has the lock, or the directory cannot be created or written.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory in _locks:
            return
        file = open(directory / LOCK, "a+")  # noqa: SIM115 - kept open
    except OSError as error:
        raise UserError(f"run_dir={directory}: {error.strerror or error}; give another run_dir") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(
            f"run_dir={directory}: another run is working there ({holder or 'unknown process'}); wait for it, end it, "
            "or give another run_dir"
        ) from error
    except OSError as error:
        logger.warning(
            "run_dir=%s: this file system has no locks (%s); see to it that only one run works there", directory, error
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[directory] = file


def claim_directory(config: Config) -> Path:
    """The run directory, created, locked and marked with the config.

    Raises:
        UserError: the directory holds the run of another config, or cannot be written.
    """
    directory = Path(config.directory).absolute()
    mark = directory / "config.json"
    if processes.first():  # the other processes of this run share its lock
        lock_directory(directory)
    try:
        if mark.exists():
            _refuse_another_config(mark, config)
        else:
            facts = {"id": uuid.uuid4().hex, "config": redact(to_dict(config)), "fingerprint": fingerprint(config)}
            write_atomically(mark, json.dumps(facts, indent=1))
    except OSError as error:
        raise UserError(f"run_dir={directory}: {error.strerror or error}; give another run_dir") from error
    return directory


def claim_data(directory: Path, config: Config) -> None:
    """Marks the run directory with the content of the training data: files, folders and Hub data sets.

    A run continues at a position of its data stream, which leads to other problems in other data.

    Raises:
        UserError: the run already trained on other content, or the data cannot be found.
    """
    mark = directory / "config.json"
    facts = json.loads(read_text(mark))
    known, present = facts.get("data", {}), {}
    for field, used in (("train", config.rl.steps or config.rl.epochs), ("sft", config.sft.steps or config.sft.epochs)):
        text = config.data.problems if field == "train" else config.data.sft
        for part in text.split(",") if used else ():
            if (match := WEIGHTED.fullmatch(part.strip())) and (path := match["path"]) not in GENERATED:
                present[f"data.{field}={path}"] = rows.fingerprint(place_of(path))
    changed = [name for name, digest in present.items() if known.get(name, digest) != digest]
    trained = (directory / "metrics.jsonl").exists() and (directory / "metrics.jsonl").stat().st_size
    if changed and trained:
        raise UserError(
            f"{changed[0]}: its content is not what the run in {directory} began with; restore it, or give another "
            "run_dir"
        )
    if {**known, **present} != known:
        write_atomically(mark, json.dumps(facts | {"data": {**known, **present}}, indent=1))


def run_id(directory: Path) -> str:
    """The id that a run keeps over its continuations; empty for a run of an earlier release."""
    return json.loads(read_text(directory / "config.json")).get("id", "")


def _refuse_another_config(mark: Path, config: Config) -> None:
    try:
        theirs = json.loads(json.loads(read_text(mark))["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{mark}: not the config.json of a run; give another run_dir, or remove it") from error
    mine = json.loads(fingerprint(config))
    if redact(theirs) != mine:
        text = ", ".join(f"{name}: {a!r} there, {b!r} here" for name, a, b in differences(redact(theirs), mine))
        raise UserError(f"{mark}: the run there has another config ({text}); give another run_dir, or remove it")


def fingerprint(config: Config) -> str:
    """config.fingerprint without secrets: what a run directory and its copy are claimed for."""
    return json.dumps(redact(json.loads(configs.fingerprint(config))), sort_keys=True)


@contextlib.contextmanager
def undone_if_refused(directory: Path) -> Iterator[None]:
    """Removes what a command created here if a UserError ends it before anything was trained.

    Otherwise the corrected command would have another config than the one the directory is claimed for.
    """
    new = not directory.exists()
    before = set(os.listdir(directory)) if directory.is_dir() else set()
    try:
        yield
    except UserError:
        lock = _locks.get(directory.absolute())  # without it the files are another run's
        if processes.first() and lock and not (directory / "metrics.jsonl").exists():
            for name in {"init", "init.tokenizer"} - before:
                shutil.rmtree(directory / name, ignore_errors=True)
            for name in {"config.json", "sft.parquet", LOCK} - before:
                (directory / name).unlink(missing_ok=True)
            for empty in (directory / "checkpoints", directory) if new else ():
                with contextlib.suppress(OSError):
                    empty.rmdir()
            _locks.pop(directory.absolute()).close()
        raise


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file; a reader finds the old text or the new one."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(text)
    os.replace(temporary, path)
