"""The run directory: claimed for one config, cleaned after a refused start, written atomically."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from open_agentrl_jax.config import Config, fingerprint, to_dict
from open_agentrl_jax.parallel import processes
from open_agentrl_jax.settings import differences
from open_agentrl_jax.types import UserError


def claim_directory(config: Config) -> Path:
    """The run directory, created and marked with the config; refused where another config's run lies there."""
    directory = Path(config.directory).absolute()
    mark = directory / "config.json"
    if mark.exists():
        theirs = json.loads(mark.read_text())
        then, now = json.loads(theirs["fingerprint"]), json.loads(fingerprint(config))
        if then != now:
            changed = ", ".join(f"{name}: {a!r} there, {b!r} here" for name, a, b in differences(then, now))
            raise UserError(f"{mark}: the run there has another config ({changed}); give another run_dir, or remove it")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"config": to_dict(config), "fingerprint": fingerprint(config)}, indent=1)
        write_atomically(mark, text)
    return directory


@contextlib.contextmanager
def undone_if_refused(directory: Path) -> Iterator[None]:
    """Where a user's mistake ends the command before anything was trained, what it made here goes.

    Else the command with the mistake mended would be another config than the one that the directory is claimed for.
    """
    new = not directory.exists()
    before = set(os.listdir(directory)) if directory.is_dir() else set()
    try:
        yield
    except UserError:
        if processes.first() and not (directory / "metrics.jsonl").exists():
            for name in {"init", "init.tokenizer"} - before:
                shutil.rmtree(directory / name, ignore_errors=True)
            for name in {"config.json", "sft.parquet"} - before:
                (directory / name).unlink(missing_ok=True)
            for empty in (directory / "checkpoints", directory) if new else ():
                with contextlib.suppress(OSError):
                    empty.rmdir()
        raise


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(text)
    os.replace(temporary, path)
