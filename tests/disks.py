"""Stand-ins for file systems: a mounted bucket, which renames no directory, and reads that fail."""

import errno
import os

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
