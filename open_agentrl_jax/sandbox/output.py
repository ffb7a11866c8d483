"""What the executor keeps of a program's output."""

from __future__ import annotations

import os
from collections.abc import Callable

from open_agentrl_jax.sandbox.result import FLOOD, KEPT, head_and_tail


class Stream:
    """Head and tail of a program's output."""

    def __init__(self, descriptor: int, flooded: Callable[[], None], limit: int = KEPT):
        self.descriptor, self.flooded, self.size, self.limit = descriptor, flooded, 0, limit
        self.head, self.tail = bytearray(), bytearray()

    def read(self) -> bytes | None:
        """Reads what is available: None if nothing is, b"" at the end."""
        try:
            data = os.read(self.descriptor, KEPT)
        except BlockingIOError:
            return None
        self.size += len(data)
        room = self.limit - len(self.head)
        self.head += data[:room]
        self.tail += data[max(room, 0) :]
        if len(self.tail) > self.limit + 2 * KEPT:
            del self.tail[: -self.limit]
        if self.size > FLOOD:
            self.flooded()
        return data

    def kept(self) -> bytes:
        """Returns the kept output, with a note of what is missing."""
        return head_and_tail(bytes(self.head + self.tail), self.limit, self.size)
