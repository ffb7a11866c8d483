"""Bookkeeping of cache slots: sessions, shared prompts, the tokens of each slot and its next step. Numpy, no device.

A slot is free (no owner, but an equal prompt may still copy from it), idle (owned by a session between two turns), or
running. Decisions made here depend on the order of arrival; results of requests do not (rollout/local.py).
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from open_agentrl_jax.models.decode import STOPS, Rows
from open_agentrl_jax.types import Completion, Sampling


@dataclasses.dataclass(eq=False)
class Request:
    """One call of `generate`, and the future that its caller awaits."""

    ids: np.ndarray  # [t] int32
    sampling: Sampling
    session: str
    future: asyncio.Future[Completion]
    slot: int = -1


@dataclasses.dataclass
class Parked:
    """An idle session without a slot: the cache content in host memory, and its tokens."""

    content: Any
    history: np.ndarray


@dataclasses.dataclass
class Prefill:
    """Tokens to compute at [start, start + len) of a slot, and the chunk sizes to use."""

    slot: int
    tokens: np.ndarray
    start: int
    chunks: list[int]


@dataclasses.dataclass
class Admission:
    """Device work, in this order, before the admitted requests can decode."""

    ready: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # slot copies of present cache content
    restored: list[tuple[int, Any]] = dataclasses.field(default_factory=list)  # slot, parked content
    prefills: list[Prefill] = dataclasses.field(default_factory=list)
    late: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # slot copies of the results of `prefills`
    cached: int = 0  # tokens that need no computation


class Slots:
    """State of `slots` cache slots of `max_length` tokens each."""

    def __init__(self, slots: int, max_length: int, chunks: Sequence[int]):
        self.slots, self.max_length, self.chunks = slots, max_length, chunks
        self.rows = Rows(
            slot=np.arange(slots, dtype=np.int32),
            token=np.zeros(slots, np.int32),
            position=np.zeros(slots, np.int32),
            left=np.zeros(slots, np.int32),
            stop=np.full((slots, STOPS), -1, np.int32),
            key=np.zeros((slots, 2), np.uint32),
            temperature=np.ones(slots, np.float32),
            top_p=np.ones(slots, np.float32),
            top_k=np.zeros(slots, np.int32),
        )
        self.running = np.zeros(slots, bool)
        self.requests: list[Request | None] = [None] * slots
        self._history = np.zeros((slots, max_length), np.int32)
        self._held = np.zeros(slots, np.int64)  # the cache holds history[s, :held[s]]
        self._logprobs = np.zeros((slots, max_length), np.float32)
        self._versions = np.zeros((slots, max_length), np.int32)
        self._owned = np.zeros(slots, bool)
        self._session = [""] * slots
        self._slot_of: dict[str, int] = {}
        self._parked: dict[str, Parked] = {}
        self._used = np.zeros(slots, np.int64)  # when the slot was last assigned or left
        self._clock = 0
        # Prompts computed from position 0 with the current weights: bytes -> slot, and slot -> bytes.
        self._prompts: dict[bytes, int] = {}
        self._prompt_of = [b""] * slots

    def admit(self, waiting: collections.deque[Request], park: Callable[[int], Any]) -> Admission:
        """Assigns slots to requests of `waiting` as far as there are any; the others stay in it, in order.

        Args:
          waiting: requests in the order of arrival; at most one per session.
          park: reads the content of a slot that is about to be overwritten.
        """
        plan, fresh = Admission(), set()
        for request in [waiting.popleft() for _ in range(len(waiting))]:
            prompt = request.ids[:-1].tobytes()
            slot = self._slot_of.get(request.session, -1)
            if slot < 0 and (slot := self._open(request, prompt, plan, fresh, park)) < 0:
                waiting.append(request)
                continue
            held = _common(self._history[slot, : self._held[slot]], request.ids[:-1])
            if held * request.ids.itemsize < len(self._prompt_of[slot]):
                self._unlist(slot)
            new = request.ids[held:-1]
            if len(new):
                plan.prefills.append(Prefill(slot, new, held, cut(len(new), self.chunks)))
                if not held:
                    self._prompts[prompt], self._prompt_of[slot] = slot, prompt
                    fresh.add(slot)
            plan.cached += held
            self._start(request, slot)
        return plan

    def record(
        self, slots: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, count: np.ndarray, version: int
    ) -> None:
        """Appends the first count[a] of tokens and logprobs [n a], sampled from `version`, to each of `slots` [a]."""
        number = np.arange(len(tokens))[:, None]
        new = number < count
        at = np.broadcast_to(slots, new.shape)[new], (self.rows.position[slots] + 1 + number)[new]
        self._history[at], self._logprobs[at], self._versions[at] = tokens[new], logprobs[new], version
        self.rows.position[slots] += count
        self.rows.token[slots] = self._history[slots, self.rows.position[slots]]
        self._held[slots] = self.rows.position[slots]

    def finish(self, slot: int, reason: str) -> tuple[Request, Completion]:
        """Ends the request of a slot; the session keeps the slot."""
        request = self.requests[slot]
        assert request is not None
        new = slice(len(request.ids), int(self.rows.position[slot]) + 1)
        parts = (self._history, self._logprobs, self._versions)
        ids, logprobs, versions = (x[slot, new].copy() for x in parts)
        self.stop(slot)
        return request, Completion(ids, logprobs, reason, versions)

    def stopped(self, slot: int) -> bool:
        """Whether the last token of the slot is one of its stop ids."""
        return bool((self.rows.token[slot] == self.rows.stop[slot]).any())

    def stop(self, slot: int) -> None:
        """Removes the request of a slot."""
        self.requests[slot], self.running[slot], self.rows.left[slot] = None, False, 0
        self._touch(slot)

    def owned_by(self, session: str) -> int:
        """The slot of a session, or -1."""
        return self._slot_of.get(session, -1)

    def release(self, session: str) -> None:
        """Ends a session and frees its slot."""
        self._parked.pop(session, None)
        if (slot := self._slot_of.get(session, -1)) >= 0:
            self._give(slot, "")

    def forget_prompts(self) -> None:
        """Stops sharing prompts that were computed with the previous weights."""
        self._prompts.clear()
        self._prompt_of = [b""] * self.slots

    def batch(self, slots: np.ndarray, size: int) -> Rows:
        """The rows of `slots`, padded to `size` with idle rows."""
        index = np.zeros(size, np.int64)
        index[: len(slots)] = slots
        rows = Rows(*(x[index] for x in self.rows))
        rows.slot[len(slots) :] = self.slots
        return rows

    def _open(
        self, request: Request, prompt: bytes, plan: Admission, fresh: set[int], park: Callable[[int], Any]
    ) -> int:
        """Assigns a slot with whatever cache can be reused to a request without one; -1 if there is none."""
        parked = self._parked.get(request.session) if request.session else None
        donor = -1 if parked else self._prompts.get(prompt, -1)
        if (slot := self._take(donor, park)) < 0:
            return -1
        self._give(slot, request.session)
        known = np.zeros(0, np.int32)
        if parked:
            del self._parked[request.session]
            plan.restored.append((slot, parked.content))
            known = parked.history
        elif donor >= 0:
            known = request.ids[:-1]
            if donor != slot:
                (plan.late if donor in fresh else plan.ready).append((donor, slot))
        self._history[slot, : len(known)], self._held[slot] = known, len(known)
        return slot

    def _take(self, wanted: int, park: Callable[[int], Any]) -> int:
        """A slot that does not run: `wanted` if free, else the least recently used free or idle (parked) one; or -1."""
        free = ~self.running & ~self._owned
        if wanted >= 0 and free[wanted]:
            return wanted
        idle = np.flatnonzero(free if free.any() else ~self.running)
        if not len(idle):
            return -1
        slot = int(idle[np.argmin(self._used[idle])])
        if self._owned[slot]:
            self._parked[self._session[slot]] = Parked(park(slot), self._history[slot, : self._held[slot]].copy())
        self._unlist(slot)
        return slot

    def _give(self, slot: int, session: str) -> None:
        self._slot_of.pop(self._session[slot], None)
        self._session[slot], self._owned[slot] = session, bool(session)
        if session:
            self._slot_of[session] = slot

    def _unlist(self, slot: int) -> None:
        if self._prompts.get(self._prompt_of[slot]) == slot:
            del self._prompts[self._prompt_of[slot]]
        self._prompt_of[slot] = b""

    def _start(self, request: Request, slot: int) -> None:
        n, how, rows = len(request.ids), request.sampling, self.rows
        request.slot, self.requests[slot], self.running[slot] = slot, request, True
        self._history[slot, :n], self._held[slot] = request.ids, n - 1
        rows.token[slot], rows.position[slot] = request.ids[-1], n - 1
        rows.left[slot] = min(how.max_tokens, self.max_length - n)
        rows.stop[slot] = -1
        rows.stop[slot, : len(how.stop_ids)] = how.stop_ids
        rows.key[slot] = (how.seed >> 32) & 0xFFFFFFFF, how.seed & 0xFFFFFFFF
        rows.temperature[slot], rows.top_p[slot], rows.top_k[slot] = how.temperature, how.top_p, how.top_k
        self._touch(slot)

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """The number of equal leading elements."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def cut(n: int, sizes: Sequence[int]) -> list[int]:
    """Splits `n` tokens into chunks: the largest that fit, or a larger one that is more than half full."""
    chunks: list[int] = []
    while n > 0:
        full = max((size for size in sizes if size <= n), default=0)
        over = min((size for size in sizes if size > n), default=0)
        chunks.append(over if over and (2 * n > over or not full) else full)
        n -= chunks[-1]
    return chunks
