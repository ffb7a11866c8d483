"""Token streams that grow while an episode is played."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from open_agentrl_jax.types import Completion, TokenSequence, Turn


class Streams:
    """Ids, loss mask, log-probs and versions of one sequence. `len` is its number of tokens."""

    def __init__(self, tokens: Sequence[int] = ()):
        """Begins with `tokens`, which are not trained."""
        self.tokens: list[int] = []
        self._mask: list[bool] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self.add(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sampled(self) -> int:
        """Number of sampled tokens."""
        return sum(self._mask)

    def add(self, ids: Sequence[int]) -> None:
        """Appends tokens that the policy did not sample."""
        self.tokens += [int(i) for i in ids]
        self._mask += [False] * len(ids)
        self._logprobs += [0.0] * len(ids)
        self._versions += [-1] * len(ids)

    def add_sampled(self, completion: Completion) -> None:
        """Appends the tokens of a completion."""
        self.tokens += [int(i) for i in completion.ids]
        self._mask += [True] * len(completion.ids)
        self._logprobs += [float(x) for x in completion.logprobs]
        self._versions += [int(x) for x in completion.version]

    def sequence(self, turns: list[Turn]) -> TokenSequence:
        """The streams as arrays."""
        return TokenSequence(
            tokens=np.asarray(self.tokens, np.int32),
            loss_mask=np.asarray(self._mask, bool),
            logprobs=np.asarray(self._logprobs, np.float32),
            versions=np.asarray(self._versions, np.int32),
            turns=turns,
        )
