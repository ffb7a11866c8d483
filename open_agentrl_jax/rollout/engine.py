"""The protocol of token generators: the embedded engine and pools of remote servers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import numpy as np

from open_agentrl_jax.types import Completion, Sampling


class Engine(Protocol):
    """Tokens in, tokens out. Methods are coroutines that may run concurrently in one event loop."""

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, session: str = "") -> Completion:
        """Continues `ids`.

        Args:
            ids: the whole sequence so far, prompt included.
            sampling: sampling parameters.
            session: name of the episode; its turns reuse the cached prefix.

        Raises:
            ValueError: an id outside the vocabulary, or no room in the context.
            EngineError: the infrastructure failed, retries included; never the model's fault.
        """
        ...

    async def update_weights(self, path: str, version: int) -> None:
        """Loads the Hugging Face folder at `path` as weight `version`; returns when every server samples from it."""
        ...

    async def release(self, session: str) -> None:
        """Ends an episode: frees its cache and aborts its running requests."""
        ...


class EngineError(RuntimeError):
    """Generation failed for a reason other than the model."""


def seed_of(*parts: Any) -> int:
    """31 bits that depend on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


async def in_pieces(
    engine: Engine, ids: Sequence[int], sampling: Sampling, *, session: str, size: int
) -> AsyncIterator[Completion]:
    """Samples one completion `size` tokens at a time.

    Draws depend on seed and position, so this changes at most the last bit of a logit.

    Args:
        engine: continues token sequences.
        ids: the whole sequence so far.
        sampling: of the whole completion.
        session: must be given, or every piece computes the prefix again.
        size: tokens per piece.
    """
    sampled: list[int] = []
    while True:
        room = sampling.max_tokens - len(sampled)
        piece = dataclasses.replace(sampling, max_tokens=min(size, room))
        part = await engine.generate([*ids, *sampled], piece, session=session)
        sampled += part.ids.tolist()
        yield part
        if part.finish_reason != "length" or len(sampled) >= sampling.max_tokens:
            return


def joined(parts: Sequence[Completion]) -> Completion:
    """The completion that the pieces make up."""
    if len(parts) == 1:
        return parts[0]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "logprobs", "version")}
    return Completion(finish_reason=parts[-1].finish_reason, **columns)
