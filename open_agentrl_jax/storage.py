"""Repeats reads that fail for a moment, as network file systems do after a server restart."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import tenacity

TRANSIENT = (errno.ESTALE, errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EREMOTEIO)
_TEXTS = tuple(os.strerror(number) for number in TRANSIENT)
SECONDS = 30.0  # after which a failure counts as lasting


def is_transient(error: BaseException) -> bool:
    """Whether an error, or what caused it, is one of TRANSIENT; libraries in Rust and C++ give its text only."""
    return any(
        getattr(cause, "errno", None) in TRANSIENT or any(text in str(cause) for text in _TEXTS)
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# Repeats a function that only reads. It must not communicate with other processes, which would not repeat it.
retry_reads = tenacity.retry(
    retry=tenacity.retry_if_exception(is_transient),
    stop=tenacity.stop_after_delay(SECONDS),
    wait=tenacity.wait_exponential(multiplier=0.1, max=5.0),
    reraise=True,
)


@retry_reads
def read_bytes(path: Path) -> bytes:
    """The content of a file."""
    return path.read_bytes()


def read_text(path: Path) -> str:
    """The content of a file in UTF-8."""
    return read_bytes(path).decode()
