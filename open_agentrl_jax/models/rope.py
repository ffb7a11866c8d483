"""Rotary position embeddings: frequencies of the default, linear, YaRN and Llama 3 types, as in transformers.

Sources: YaRN, arXiv 2309.00071; Llama 3.1's config.json and reference code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from open_agentrl_jax.types import UserError

# Rope type -> required numbers, optional numbers.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def read(hf: Mapping[str, Any], where: str) -> tuple[float, tuple[tuple[str, Any], ...]]:
    """Base and scaling of a config.json; `rope_scaling` wins over `rope_parameters`, as in transformers.

    Args:
      hf: the contents of config.json.
      where: its path, for messages.

    Returns:
      rope_theta, and the scaling as sorted pairs; () is the default type.

    Raises:
      UserError: a type that is not implemented, a missing number, or two fields that contradict each other.
    """
    scaling, parameters = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    field = "rope_scaling" if scaling else "rope_parameters"
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: {name}: {value!r} must be an object; copy it from the original config.json")
    chosen = scaling or parameters
    kind = _kind(chosen)
    if scaling and kind == "default" and _kind(parameters) != "default":
        raise UserError(f"{where}: rope_scaling: contradicts rope_parameters; remove one of them")
    theta = chosen.get("rope_theta", hf.get("rope_theta"))
    if theta is None:
        theta = 10000.0
        if parameters.get("rope_theta", theta) != theta:
            raise UserError(f"{where}: rope_theta: missing beside rope_scaling; copy it there from rope_parameters")
    if kind not in _FIELDS:
        raise UserError(f"{where}: {field}: rope type {kind!r} is not supported; use one of {', '.join(_FIELDS)}")
    if chosen.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise UserError(f"{where}: {field}: partial_rotary_factor is not supported; use a model with 1.0")
    if kind == "default":
        return theta, ()
    longest = hf.get("max_position_embeddings", 32768)
    made: dict[str, Any] = {"rope_type": kind}
    original = hf.get("original_max_position_embeddings") or chosen.get("original_max_position_embeddings") or longest
    required, optional = _FIELDS[kind]
    given = {**chosen, "original_max_position_embeddings": original}
    if kind == "yarn" and given.get("factor") is None:
        given["factor"] = longest / original
    for name in (*required, *optional):
        value = given.get(name)
        if value is None and name in optional:
            continue
        if not isinstance(value, int | float) or (name in required and value <= 0):
            raise UserError(f"{where}: {field}: {name}: {value!r} must be a positive number")
        made[name] = value
    return theta, tuple(sorted(made.items()))


def _kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def frequencies(head_dim: int, theta: float, scaling: tuple[tuple[str, Any], ...]) -> tuple[np.ndarray, float]:
    """Radians per position of each pair [D/2], float32, and the factor on cos and sin."""
    fields = dict(scaling)
    pair = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = (1.0 / np.float32(theta) ** pair).astype(np.float32)
    match fields.get("rope_type", "default"):
        case "linear":
            return frequency / np.float32(fields["factor"]), 1.0
        case "llama3":
            return _llama3(frequency, fields), 1.0
        case "yarn":
            return _yarn(frequency, head_dim, theta, fields)
    return frequency, 1.0


def _llama3(frequency: np.ndarray, fields: Mapping[str, Any]) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor, low, high = fields["factor"], fields["low_freq_factor"], fields["high_freq_factor"]
    turns = fields["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - smooth) * frequency / factor + smooth * frequency).astype(np.float32)


def _yarn(frequency: np.ndarray, D: int, theta: float, fields: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    factor = fields["factor"]

    def pair_of(rotations: float) -> float:
        """The pair, as a real number, that makes so many rotations over the original context."""
        context = fields["original_max_position_embeddings"]
        return D * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(fields.get("beta_fast") or 32), pair_of(fields.get("beta_slow") or 1)
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    ramp = np.clip((np.arange(D // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    mixed = frequency / np.float32(factor) * ramp + frequency * (1 - ramp)
    return mixed.astype(np.float32), _magnitude(factor, fields)


def _magnitude(factor: float, fields: Mapping[str, Any]) -> float:
    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if (given := fields.get("attention_factor")) is not None:
        return given
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return of(fields["mscale"]) / of(fields["mscale_all_dim"])
    return of(1.0)
