"""Peak rates and memory of the chips that a step is planned for."""

from __future__ import annotations

import dataclasses
import re

from open_agentrl_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device (on v5p and v6e a chip is one device)."""

    hbm: int  # bytes available to a compiled program
    flops: float  # bfloat16 operations per second, two per multiply-add
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second out of a chip along one torus axis, both directions together
    slice_bandwidth: float = 0.0  # bytes per second that a chip sends to other slices over the data center network
    gpu: bool = False  # links are those of one machine (NVLink), from each GPU to all others


# HBM as the compiler reports it when a program does not fit; the rates are from the vendors' data sheets.
CHIPS = {
    "v5p": Chip(int(95.74 * 2**30), 459e12, 2765e9, 180e9, 6.25e9),
    "v6e": Chip(int(31.25 * 2**30), 918e12, 1640e9, 180e9, 12.5e9),
    "v5e": Chip(int(15.75 * 2**30), 197e12, 819e9, 90e9, 3.125e9),
    # One GiB less than the card has, for the driver. JAX uses three quarters of that unless
    # XLA_PYTHON_CLIENT_MEM_FRACTION is set.
    "h100": Chip(78 * 2**30, 989e12, 3350e9, 450e9, gpu=True),
    "h200": Chip(139 * 2**30, 989e12, 4800e9, 450e9, gpu=True),
}


def split(topology: str) -> tuple[int, str, str]:
    """(slices, kind, size) of a topology name: "2xv5e:4x4" -> (2, "v5e", "4x4"), "h100:8" -> (1, "h100", "8")."""
    slices, name = re.match(r"(?:(\d+)x)?(.*)", topology, re.DOTALL).groups()  # type: ignore[union-attr]
    kind, _, size = name.partition(":")
    return int(slices or 1), kind, size


def chip(topology: str) -> Chip:
    """The chip of a topology name such as "v5p:2x2x1", "2xv5e:4x4" or "h100:8".

    Raises:
      UserError: the kind is not in CHIPS.
    """
    kind = split(topology)[1]
    if kind not in CHIPS:
        raise UserError(f"topology {topology}: unknown kind {kind!r}; use one of {', '.join(CHIPS)}, e.g. v5p:2x2x1")
    return CHIPS[kind]
