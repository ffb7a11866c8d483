"""Numbered rows of JSONL, JSON and Parquet files; bad rows are reported, skipped and counted."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from open_agentrl_jax.storage import retry_reads
from open_agentrl_jax.types import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
SUFFIXES = (".jsonl", ".json", ".parquet")
MAX_BAD = 0.01  # fraction of bad rows; one bad row is always allowed
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?(?::[\w./*?-]+)?")


class BadRow(ValueError):
    """The reason why a row cannot be used; the reader adds file and number."""


class Table(list[T], Generic[T]):
    """The items read; `skipped` lists the others as "file row N: reason"."""

    def __init__(self, items: Iterable[T] = (), skipped: Iterable[str] = ()):
        super().__init__(items)
        self.skipped = list(skipped)


@retry_reads
def read_table(path: str | os.PathLike[str], convert: Callable[[dict[str, Any], Path, int], T]) -> Table[T]:
    """Converts each row of `path`.

    Args:
        path: a file, a folder of files (read in the order of their names), or a Hub data set
            "owner/name[@revision][:pattern]", where the pattern selects files, e.g. openai/gsm8k:main/test-*.
        convert: (row, file, number) -> item; raises BadRow for an unusable row. Numbers start at 1.

    Raises:
        UserError: there is nothing at `path`, a file is damaged or of another kind, no row is usable, or more than 1 %
            of the rows are bad (a single bad row is always allowed).
    """
    table, total = Table[T](), 0
    for file in resolve(path):
        for number, row in iterate(file):
            total += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                table.append(convert(row, file, number))
            except BadRow as e:
                table.skipped.append(f"{file} row {number}: {e}")
    if not table and len(table.skipped) < 2:
        reason = f"its only row is bad: {table.skipped[0]}" if table.skipped else "it holds no row"
        raise UserError(f"data set {path} is empty ({reason}); give a file with at least one usable row")
    refuse_many_bad(str(path), table.skipped, total)
    return table


def refuse_many_bad(name: str, skipped: list[str], total: int, cure: str = "fix or drop them") -> None:
    """Logs skipped rows.

    Args:
        name: name of the data set.
        skipped: the bad rows with their reasons.
        total: number of rows, including bad ones.
        cure: end of the error message.

    Raises:
        UserError: more than 1 % of the rows are bad, and more than one.
    """
    bad = len(skipped)
    if bad > max(1, MAX_BAD * total):
        raise UserError(f"{name}: {bad} of {total} rows are bad, more than 1 %; the first is {skipped[0]}; {cure}")
    for line in skipped[:10]:
        log.warning("skipped %s", line)
    if bad:
        log.warning("skipped %d of %d rows of %s", bad, total, name)


def resolve(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a path or a Hub id. Raises UserError if there are none."""
    place, pattern = Path(path).expanduser(), "*"
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise UserError(
                f"data file {place} has the suffix {place.suffix!r}; it must be one of {', '.join(SUFFIXES)}"
            )
        return [place]
    if not place.exists() and _HUB_ID.fullmatch(str(path)):
        name, _, pattern = str(path).partition(":")
        pattern = pattern or "*"
        place = _download(name, pattern)
    if not place.exists():
        raise UserError(f"data path {path} is not there; give a file, a folder or a Hub id owner/name")
    files = [f for f in place.rglob("*") if f.suffix in SUFFIXES and f.is_file()]
    files = sorted(f for f in files if fnmatch.fnmatch(f.relative_to(place).as_posix(), pattern))
    if not files:
        raise UserError(f"data folder {path} holds no {', '.join(SUFFIXES)} file")
    return files


@retry_reads
def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the files behind a path or a Hub id, in hexadecimal. Raises UserError as resolve."""
    digests = []
    for file in resolve(path):
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256"))
    joined = b"".join(digest.digest() for digest in digests)
    return digests[0].hexdigest() if len(digests) == 1 else hashlib.sha256(joined).hexdigest()


def _download(name: str, pattern: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    try:
        patterns = [f"*{suffix}" for suffix in SUFFIXES] if pattern == "*" else [pattern]
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"data path {name} is neither a local path nor a Hub data set that could be read ({reason})"
        ) from e


def iterate(file: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yields (number, row) of a file, numbers from 1; a row that cannot be parsed is a BadRow."""
    if file.suffix == ".parquet":
        yield from _parquet(file)
        return
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:  # skips a byte order mark
        if file.suffix == ".json":
            try:
                items = json.load(lines)
            except (ValueError, RecursionError) as e:
                raise UserError(f"data file {file} is not JSON ({e}); write a list of objects, or use .jsonl") from e
            if not isinstance(items, list):
                raise UserError(f"data file {file} holds a {type(items).__name__}; write a list of objects")
            numbered: Iterable[tuple[int, Any]] = enumerate(items, 1)
        else:
            numbered = ((i, line) for i, line in enumerate(lines, 1) if line.strip())
        for number, item in numbered:
            if isinstance(item, str):
                try:
                    item = json.loads(item)
                except (ValueError, RecursionError) as e:
                    item = BadRow(f"not JSON ({e})")
            if not _is_unicode(item):
                item = BadRow("not UTF-8, or half a surrogate pair, which no tokenizer takes")
            yield number, item if isinstance(item, dict | BadRow) else BadRow(f"a {type(item).__name__}, not an object")


def _is_unicode(item: Any) -> bool:
    try:
        json.dumps(item, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        number = 0
        with pq.ParquetFile(file) as reader:
            for batch in reader.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as e:  # ValueError: text that is not UTF-8
        raise UserError(
            f"parquet file {file} cannot be read ({str(e).splitlines()[0]}); it may be truncated: fetch it again"
        ) from e


def decode(value: Any) -> Any:
    """Parses a column that contains a JSON object or list as text; returns anything else unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value, strict=False)  # arguments often contain raw line breaks in code
        except (ValueError, RecursionError):
            return value
    return value


def write_parquet(path: str | os.PathLike[str], rows: list[dict[str, Any]]) -> None:
    """Writes all rows atomically."""
    if not rows:
        raise UserError(f"nothing to write to {path}: no row was kept")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        pq.write_table(pa.Table.from_pylist(rows), name)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
