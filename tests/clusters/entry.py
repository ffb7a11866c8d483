"""Starts a command as a cluster would: `python -m tests.clusters.entry MODULE ARGUMENTS`.

Environment variables select what a stand-in changes before the command runs:
  FAKE_NO_DIRECTORY_RENAMES=FOLDER: renaming a directory below FOLDER fails, as on gcsfuse.
  FAKE_STALE_READS=FOLDER: the first read of each file below FOLDER fails with ESTALE if the file is older than this
    process, as on NFS after a server restart.
"""

import builtins
import errno
import io
import os
import pathlib
import runpy
import sys
import time

import jax  # sets TPU_SKIP_MDS_QUERY on a machine without chips, which would turn the detection off

os.environ.pop("TPU_SKIP_MDS_QUERY", None)


def refuse_directory_renames(folder):
    for name in ("rename", "replace"):
        real = getattr(os, name)

        def patched(source, target, *, real=real, **more):
            if pathlib.Path(source).is_dir() and pathlib.Path(source).absolute().is_relative_to(folder):
                raise OSError(errno.EPERM, "cannot rename a directory", os.fspath(source))
            return real(source, target, **more)

        setattr(os, name, patched)


def stale_once(folder):
    seen, real, started = set(), io.open, time.time()

    def patched(file, mode="r", *args, **more):
        path = pathlib.Path(file).absolute() if isinstance(file, str | os.PathLike) else None
        if (
            path
            and "r" in mode
            and path.is_relative_to(folder)
            and path.is_file()
            and path not in seen
            and path.stat().st_mtime < started
        ):
            seen.add(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), os.fspath(path))
        return real(file, mode, *args, **more)

    builtins.open = io.open = patched


if folder := os.environ.get("FAKE_NO_DIRECTORY_RENAMES"):
    refuse_directory_renames(folder)
if folder := os.environ.get("FAKE_STALE_READS"):
    stale_once(folder)


def join():
    """Joins the processes and prints what they see, without training."""
    from open_agentrl_jax.parallel import agreement
    from open_agentrl_jax.parallel.mesh import count_devices, initialize_distributed, make_mesh

    initialize_distributed()
    agreement.meet("joined", seconds=60)
    print(count_devices(), dict(make_mesh().shape), jax.process_index())


if __name__ == "__main__":
    if sys.argv[1] == "join":
        join()
    else:
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
