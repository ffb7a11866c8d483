"""Files out of a program's directory, which is not trusted: no link is followed, nothing but plain files is read."""

from __future__ import annotations

import contextlib
import os
import pathlib
import stat
from collections.abc import Iterable

LARGEST = 64 * 2**20  # bytes that a run brings back: a sparse file, or one asked for by many names, takes no disk


def collect(directory: int, names: Iterable[str]) -> dict[str, bytes]:
    """Reads files below a directory.

    Args:
        directory: descriptor of the program's /tmp.
        names: paths, relative to it or absolute below /tmp.

    Returns:
        The contents of those that are there as plain files, by the names asked for, up to LARGEST bytes in all.
    """
    found, room = {}, LARGEST
    for name in names:
        path = pathlib.PurePosixPath("/tmp", name)
        if path.is_relative_to("/tmp") and (parts := path.relative_to("/tmp").parts) and ".." not in parts:
            with contextlib.suppress(OSError, ValueError):  # ValueError: no name that a file can have
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
            return file.read(status.st_size)  # it may still grow: a run that is late is told before it is gone
    finally:
        os.close(at)
