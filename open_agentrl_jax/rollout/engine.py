"""The protocol of token generators: the embedded engine and pools of remote servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
