"""A trajectory's token streams as a few short strings, for a line of trajectories.jsonl; and back.

Ids are uint32 and log-probs float16 (three digits, enough to look at), little-endian, deflated, in base64: about four
bytes a token, which is what the text itself takes. Mask and versions are runs of equal values.
"""

from __future__ import annotations

import base64
import itertools
import zlib
from typing import Any

import numpy as np

from open_agentrl_jax.types import TokenSequence

OFF = -1  # the version of a token that the policy did not sample


def pack_tokens(sequence: TokenSequence) -> dict[str, Any]:
    """What JSON takes.

    Returns:
        ids: of all t tokens; logprobs: of the sampled ones; spans: runs of [count, version], version -1 off the mask.
    """
    versions = np.where(sequence.loss_mask, sequence.versions, OFF)
    edges = np.flatnonzero(np.diff(versions)) + 1
    starts = [0, *edges.tolist(), len(versions)] if len(versions) else [0]
    spans = [[b - a, int(versions[a])] for a, b in itertools.pairwise(starts)]
    sampled = sequence.logprobs[sequence.loss_mask]
    return {"ids": _pack(sequence.tokens, "<u4"), "logprobs": _pack(sampled, "<f2"), "spans": spans}


def unpack_tokens(packed: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [t], log-probs [t] (0 off the mask) and versions [t] (-1 off the mask)."""
    counts, values = np.array(packed["spans"], int).reshape(-1, 2).T
    versions = np.repeat(values, counts)
    logprobs = np.zeros(len(versions), np.float32)
    logprobs[versions != OFF] = _unpack(packed["logprobs"], "<f2")
    return _unpack(packed["ids"], "<u4").astype(np.int32), logprobs, versions.astype(np.int32)


def _pack(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(zlib.compress(values.astype(dtype).tobytes(), 1)).decode()


def _unpack(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)
