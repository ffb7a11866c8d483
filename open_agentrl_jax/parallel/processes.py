"""What the processes of a run pass to each other: small values as JSON, token streams as arrays.

Every function is a collective: all processes call it, in the same order. With one process each is the identity.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from open_agentrl_jax.parallel import agreement
from open_agentrl_jax.parallel.mesh import launching
from open_agentrl_jax.types import UserError

T = TypeVar("T")
_LEAST, _MOST = 1 << 12, 1 << 26  # bytes per message and process; powers of two in between: few shapes to compile
_PATIENCE = 24 * 3600  # seconds to wait for the slowest process; JAX ends all of them soon after one dies


def first() -> bool:
    """Whether this is process 0, which writes the run's metrics, report and export."""
    return jax.process_index() == 0


def share(value: T) -> T:
    """Process 0's value (JSON) in all processes."""
    return all_values(value if first() else None)[0]  # type: ignore[return-value]


def all_values(value: T) -> list[T]:
    """Every process's value (JSON), in the order of the processes."""
    return agreement.exchange("values", value, seconds=_PATIENCE)


def any_of(condition: bool) -> bool:
    """Whether the condition holds in any process."""
    return any(all_values(condition))


def first_then_all(function: Callable[[], T]) -> T:
    """Calls `function` in process 0, then in the others, which find its files on the shared disk.

    Raises:
        UserError: the error of process 0, in all processes.
    """
    failure, result = "", None
    if first():
        try:
            result = function()
        except UserError as error:
            failure = str(error)
    if failure := share(failure):
        raise UserError(failure)
    return result if first() else function()  # type: ignore[return-value]


def in_all(function: Callable[[], T]) -> T:
    """Calls `function` in every process.

    Raises:
        UserError: the error of the first process that fails, with its name, in all processes.
    """
    failure, result = "", None
    try:
        result = function()
    except UserError as error:
        failure = str(error)
    raise_failures(failure)
    return result  # type: ignore[return-value]


def raise_failures(failure: str) -> None:
    """Raises a UserError in every process if one of them has a failure, a text that is not empty."""
    for process, (host, text) in enumerate(all_values((socket.gethostname(), failure))):
        if text:
            raise UserError(text if jax.process_count() == 1 else f"process {process} on {host}: {text}")


def gather(x: np.ndarray) -> np.ndarray:
    """Concatenates the arrays of all processes, [k ...] each with its own k, along the first axis.

    Any dtype, structured ones included: the bytes travel unchanged, in messages of at most 64 MiB per process.
    """
    if jax.process_count() == 1:
        return x
    counts = agreement.exchange("gather", len(x), seconds=_PATIENCE)  # waits for all: a collective on devices gives
    item = x.dtype.itemsize * math.prod(x.shape[1:])  # up after half a minute, which a slow process exceeds
    data = np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)
    received: list[list[bytes]] = [[] for _ in counts]
    for start in range(0, max(counts) * item, _MOST):
        most = min(max(counts) * item - start, _MOST)
        padded = np.zeros(max(_LEAST, 1 << (most - 1).bit_length()), np.uint8)
        piece = data[start : start + _MOST]
        padded[: len(piece)] = piece
        with launching:
            everyone = multihost_utils.process_allgather(padded)
        for process, count in enumerate(counts):
            received[process].append(everyone[process, : max(0, min(count * item - start, _MOST))].tobytes())
    whole = np.frombuffer(b"".join(b"".join(pieces) for pieces in received), x.dtype)
    return whole.reshape(-1, *x.shape[1:]).copy()


def whole(tree: Any) -> Any:
    """Sharded arrays, gathered into the memory of every process."""
    if jax.process_count() == 1:
        return tree
    agreement.meet("gather", seconds=_PATIENCE)
    with launching:
        return multihost_utils.process_allgather(tree, tiled=True)
