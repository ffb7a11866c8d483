"""Model folders: where they are, what belongs to the tokenizer, and how an export replaces an earlier one.

An export needs no directory rename and replaces only files of an earlier export. It writes into `.partial/` inside the
target, then moves file by file, config.json last. The mark file lists what the export wrote and whether it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterator
from typing import Any

from open_agentrl_jax.storage import read_text, retry_reads
from open_agentrl_jax.types import UserError

MARK = "open_agentrl_jax.json"
_PARTIAL = ".partial"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


def resolve(path: str | os.PathLike[str], *, weights: bool = True) -> pathlib.Path:
    """The folder of a model: `path` if it is a folder, else a Hub id, downloaded with or without its weights."""
    folder = pathlib.Path(path)
    if folder.is_dir():
        return folder
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        import huggingface_hub

        try:
            patterns = ["*.json", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
            return pathlib.Path(huggingface_hub.snapshot_download(str(path), allow_patterns=patterns))
        except Exception as error:  # offline, gated, unknown id, ...
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{path}: no such folder, and the download from the Hub failed ({type(error).__name__}: {reason}); "
                "give the path of a model folder"
            ) from None
    raise UserError(f"{path}: {'not a folder' if folder.exists() else 'missing'}; give the folder of a model")


def check_target(target: pathlib.Path) -> None:
    """Raise a UserError unless `target` is absent, empty, or an earlier export with no other files in it."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not (target / MARK).exists():
        raise UserError(f"{target}: exists and is no exported model; choose another path or remove it")
    ours = {*_read_mark(target)["files"], MARK}
    others = sorted(name for name in _files(target) if name not in ours and not name.startswith(_PARTIAL + "/"))
    if others:
        raise UserError(f"{target}: {others[0]}: not written by an export; move it elsewhere or choose another path")


def check_complete(folder: pathlib.Path) -> None:
    """Raise a UserError for a folder whose export was interrupted."""
    if (folder / MARK).exists() and not _read_mark(folder)["complete"]:
        raise UserError(f"{folder}: an export was interrupted there; export again")


def _read_mark(folder: pathlib.Path) -> dict[str, Any]:
    try:
        mark = json.loads(read_text(folder / MARK))
        return {"complete": bool(mark["complete"]), "files": [str(name) for name in mark["files"]]}
    except (ValueError, KeyError, TypeError):  # cut off while it was written
        return {"complete": False, "files": []}


def _write_mark(folder: pathlib.Path, files: Collection[str], *, complete: bool) -> None:
    (folder / MARK).write_text(json.dumps({"complete": complete, "files": sorted(files)}, indent=2) + "\n")


def _files(folder: pathlib.Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()]


@contextlib.contextmanager
def replacing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a folder to write into; its files then replace those of the earlier export in `target`."""
    partial = target / _PARTIAL
    created, marked = not target.exists(), (target / MARK).exists()
    target.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of a killed export
    try:
        if not marked:
            _write_mark(target, (), complete=False)
        partial.mkdir()
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if not marked:
            (target / MARK).unlink(missing_ok=True)
        if created:
            target.rmdir()
        raise
    old, made = set(_read_mark(target)["files"]), _files(partial)
    _write_mark(target, old.union(made), complete=False)
    for name in sorted(made, key=lambda name: name == "config.json"):
        (target / name).parent.mkdir(exist_ok=True)
        os.replace(partial / name, target / name)
    for name in old.difference(made):
        (target / name).unlink(missing_ok=True)
    shutil.rmtree(partial)
    _write_mark(target, made, complete=True)


def tokenizer_files(folder: pathlib.Path) -> list[str]:
    """Names of the tokenizer and chat template files in `folder`, relative to it."""
    return [p.relative_to(folder).as_posix() for pattern in TOKENIZER_FILES for p in sorted(folder.glob(pattern))]


@retry_reads
def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copy tokenizer, chat templates and generation_config.json, as far as `source` has them."""
    for name in (*tokenizer_files(source), "generation_config.json"):
        if (source / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
