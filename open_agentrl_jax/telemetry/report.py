"""Writes a run as one HTML file that works offline: curves, and every conversation on demand.

The page contains the index of all trajectories, and their lines in compressed chunks that it unpacks when one is
opened; telemetry.server sends the same parts over HTTP. Model output enters the page as base64 data and the document
as text nodes. A content security policy with the hash of the page's own script blocks every other script.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from open_agentrl_jax.telemetry.index import Table, read_config, read_metrics
from open_agentrl_jax.telemetry.tokens import unpack_tokens
from open_agentrl_jax.types import UserError

SCRIPTS = (
    "uPlot.iife.min.js",
    "report_data.js",
    "report_curves.js",
    "report_chat.js",
    "report_browser.js",
    "report.js",
)
STYLES = ("uPlot.min.css", "report.css")
CHUNK_BYTES = 1 << 18  # of lines that are compressed, sent and unpacked together
EMBEDDED_BYTES = 1 << 27  # of lines in one file; beyond that, whole groups are left out evenly


def read_vocabulary(directory: Path, ids: Iterable[int] | None = None) -> dict[str, str]:
    """Token id -> text, of all ids or of those given; empty if the run's tokenizer is not found."""
    path = _tokenizer_file(directory)
    if path is None:
        return {}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    ids = range(tokenizer.get_vocab_size()) if ids is None else [i for i in ids if tokenizer.id_to_token(i) is not None]
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    return {str(i): text for i, text in zip(ids, texts, strict=True)}


def _tokenizer_file(directory: Path) -> Path | None:
    model = read_config(directory).get("model", {})
    named = [name for name in (model.get("tokenizer"), model.get("path")) if name]
    folders = [directory / "export", directory / "init", *map(Path, named)]
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in named:
        try:
            if isinstance(path := try_to_load_from_cache(name, "tokenizer.json"), str):
                return Path(path)
        except HFValidationError:  # a folder, which has none
            continue
    return None


def chunks(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Rows [first, end) that are packed together: up to CHUNK_BYTES, at least one."""
    edges, filled = [0], 0
    for i, size in enumerate(sizes):
        if filled and filled + size > CHUNK_BYTES:
            edges.append(i)
            filled = 0
        filled += size
    return list(zip(edges, [*edges[1:], len(sizes)], strict=True)) if sizes else []


def head(directory: Path, table: Table, bounds: Sequence[tuple[int, int]], left_out: int = 0) -> dict[str, Any]:
    """What the page shows of a run before a conversation is opened."""
    return {
        "name": directory.name,
        "config": read_config(directory),
        "metrics": read_metrics(directory),
        "rows": len(table),
        "chunks": [first for first, _ in bounds],
        "left_out": left_out,
        "damaged": table.damaged,
    }


def write_report(directories: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report of one run, or of several side by side.

    Args:
        directories: of the runs.
        output: the file to write; default: report.html in the first directory.

    Returns:
        The file, written atomically.

    Raises:
        UserError: one of them is no run directory, or the file cannot be written.
    """
    parts: list[str] = []
    for number, directory in enumerate(Path(d) for d in directories):
        table = Table(directory / "trajectories.jsonl")
        table.update()
        for name, value in _embedded(directory.absolute(), table):
            text = base64.b64encode(gzip.compress(value, 6, mtime=0)).decode()
            parts.append(f'<script type="text/plain" id="{number}:{name}">{text}</script>')
    path = Path(output) if output else Path(directories[0]) / "report.html"
    temporary = path.with_name(path.name + ".writing")
    try:
        temporary.write_text(page("\n".join(parts), runs=len(directories)), encoding="utf-8")
        os.replace(temporary, path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: {error.strerror}; give another file for the report") from error
    return path


def _embedded(directory: Path, table: Table) -> Iterable[tuple[str, bytes]]:
    groups = table.groups()
    every = max(1, -(-sum(table.sizes()) // EMBEDDED_BYTES))
    lines, kept = [], Table(table.path, damaged=table.damaged)
    for first, end in groups[::every]:
        lines += table.read(first, end).splitlines(keepends=True)
        for name, column in table.columns.items():
            kept.columns[name] += column[first:end]
        kept.places += table.places[first:end]
    bounds = chunks([len(line) for line in lines])
    yield "head", encode(head(directory, kept, bounds, len(table) - len(kept)))
    yield "index", encode(kept.columns)
    seen: set[int] = set()
    for number, (first, end) in enumerate(bounds):
        yield f"chunk{number}", b"".join(lines[first:end])
        for line in lines[first:end]:
            trajectory = json.loads(line)
            for packed in (trajectory.get("tokens"), *trajectory.get("more_tokens", ())):
                seen.update(np.unique(unpack_tokens(packed)[0]).tolist() if packed else ())
    yield "vocabulary", encode(read_vocabulary(directory, sorted(seen)) if seen else {})


def page(parts: str, *, runs: int = 0, served: bool = False) -> str:
    """The document: our style and script, the plot library's with its licence, and the parts."""
    assets = resources.files("open_agentrl_jax.telemetry") / "assets"
    script = "\n".join((assets / name).read_text("utf-8") for name in SCRIPTS)
    style = "\n".join((assets / name).read_text("utf-8") for name in STYLES)
    policy = (
        f"default-src 'none'; script-src 'sha256-{_sha256(script)}'; style-src 'sha256-{_sha256(style)}'; "
        f"connect-src {chr(39)}{'self' if served else 'none'}{chr(39)}; base-uri 'none'; form-action 'none'"
    )
    fields = {
        "policy": policy,
        "style": style,
        "script": script,
        "licence": (assets / "uPlot.LICENSE").read_text("utf-8").strip(),
        "runs": str(runs),
        "parts": parts,
    }
    html = (assets / "report.html").read_text("utf-8")
    pieces = html.split("%%")  # text, field, text, field, ..., text: what is put in is never searched again
    return "".join(fields[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def encode(value: Any) -> bytes:
    """Compact JSON in UTF-8; a lone surrogate becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
