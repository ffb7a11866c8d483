"""Reads files from a program's directory, which is not trusted: follows no link and reads plain files only."""

from __future__ import annotations

import contextlib
import os
import pathlib
import stat
import time
from collections.abc import Iterable

LARGEST = 64 * 2**20  # bytes per run: a sparse file, or one requested by many names, takes no disk space
DEEPEST = 64  # directories in a path
LONGEST = 10.0  # seconds for all files of a run


def collect(directory: int, names: Iterable[str]) -> dict[str, bytes]:
    """Reads files below a directory.

    Args:
        directory: descriptor of the program's /tmp.
        names: paths, relative to it or absolute below /tmp.

    Returns:
        Contents of those that exist as plain files, by requested name, up to LARGEST bytes and LONGEST seconds in all.
    """
    found, room, until = {}, LARGEST, time.monotonic() + LONGEST
    for name in names:
        if time.monotonic() > until:
            break
        path = pathlib.PurePosixPath("/tmp", name)
        if path.is_relative_to("/tmp") and (parts := path.relative_to("/tmp").parts) and ".." not in parts:
            with contextlib.suppress(OSError, ValueError):  # ValueError: not a valid file name
                found[name] = _read(directory, parts, room)
                room -= len(found[name])
    return found


def _read(directory: int, parts: tuple[str, ...], room: int) -> bytes:
    at = os.dup(directory)
    try:
        for part in parts:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            inner = os.open(part, flags, dir_fd=at)
            os.close(at)
            at = inner
        status = os.fstat(at)
        if not stat.S_ISREG(status.st_mode) or status.st_size > room:
            raise OSError("not a plain file, or too large a one")
        with os.fdopen(os.dup(at), "rb") as file:
            return file.read(status.st_size)  # it may still grow: a late run is reported before it is gone
    finally:
        os.close(at)
