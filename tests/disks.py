"""Difficult file systems: a full disk, and a mounted bucket, which renames no directory."""

import errno
import os
import shutil
import subprocess

import pytest


@pytest.fixture
def bucket_mount(monkeypatch):
    """Directories cannot be renamed or moved, as with gcsfuse on a flat bucket."""

    def refusing(real):
        def rename(source, target, **kwargs):
            if os.path.isdir(source):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(source))
            return real(source, target, **kwargs)

        return rename

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs of some KiB, or resizes it, and returns its folder; needs root."""
    folder, mounted = tmp_path / "disk", []

    def resize(kib):
        folder.mkdir(exist_ok=True)
        options = f"remount,size={kib}k" if mounted else f"size={kib}k"
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no tmpfs can be mounted here")
        mounted.append(True)
        return folder

    yield resize
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
