"""Collectives between the processes of a run; with a single process they cost nothing.

All processes call these functions in the same order and from one thread.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from open_agentrl_jax.parallel import agreement
from open_agentrl_jax.types import UserError

T = TypeVar("T")
_LEAST = 1 << 12  # bytes; message sizes are powers of two from here on: few shapes to compile
_PATIENCE = 24 * 3600  # seconds to wait for the slowest process; JAX ends all of them soon after one dies


def first() -> bool:
    """Whether this is process 0, which plays the episodes and writes the run's files."""
    return jax.process_index() == 0


def share(value: T) -> T:
    """Process 0's value, in all processes; anything that can be pickled."""
    if jax.process_count() == 1:
        return value
    _meet("share")
    data = np.frombuffer(pickle.dumps(value if first() else None), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array([len(data)], np.int32))[0])
    padded = np.zeros(max(_LEAST, 1 << (size - 1).bit_length()), np.uint8)
    if first():
        padded[:size] = data
    return pickle.loads(multihost_utils.broadcast_one_to_all(padded)[:size].tobytes())


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


def whole(tree: Any) -> Any:
    """Sharded arrays, gathered into the memory of every process."""
    if jax.process_count() == 1:
        return tree
    _meet("gather")
    return multihost_utils.process_allgather(tree, tiled=True)


def _meet(place: str) -> None:
    """Waits for all processes: a collective on devices gives up after half a minute, which a slow disk exceeds."""
    agreement.meet(place, seconds=_PATIENCE)
