"""Keeps the files of the last evicted version for the next one to overwrite: their memory is already allocated.

Only on tmpfs, where the kernel zeroes each new page (and a virtual machine may have to request it from its host); there
it halves the time of writing. It takes no more memory than writing beside two versions does anyway. A file that any
process has open or mapped, such as a server that is slow to load it, is not overwritten.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
from collections.abc import Collection

_NAME = ".spare"


def retire(folder: pathlib.Path) -> None:
    """Removes a version; on tmpfs its files are kept as spares."""
    spare = folder.with_name(_NAME)
    shutil.rmtree(spare, ignore_errors=True)
    if _on_tmpfs(folder):
        folder.rename(spare)
    else:
        drop(folder)


def drop(folder: pathlib.Path) -> None:
    """Removes a version if it exists, its manifest first, so that a half-removed one is not taken for a whole one."""
    for file in sorted(folder.glob("*"), key=lambda file: file.suffix != ".json"):
        file.unlink()
    if folder.exists():
        folder.rmdir()


def reuse(folder: pathlib.Path, names: Collection[str]) -> None:
    """Creates `folder` with the spare files that have one of `names` and that no process uses."""
    spare = folder.with_name(_NAME)
    if spare.exists():
        spare.rename(folder)
        for file in folder.iterdir():
            if file.name not in names or not _unused(file):
                file.unlink()
    else:
        folder.mkdir(parents=True)


def _on_tmpfs(folder: pathlib.Path) -> bool:
    device = folder.stat().st_dev
    try:
        mounts = [line.split() for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return False
    return any(
        mount[2] == f"{os.major(device)}:{os.minor(device)}" and mount[mount.index("-") + 1] == "tmpfs"
        for mount in mounts
    )


def _unused(file: pathlib.Path) -> bool:
    """Whether the file is open nowhere, which is when the kernel grants a write lease, and has no other name."""
    if file.stat().st_nlink > 1:
        return False
    with open(file, "r+b") as opened:
        try:
            fcntl.fcntl(opened, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(opened, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
    return True
