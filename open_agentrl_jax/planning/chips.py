"""What the chips can do that a step is planned for."""

from __future__ import annotations

import dataclasses

from open_agentrl_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them (on v5p and v6e a chip is one device)."""

    hbm: int  # bytes that a compiled program may use
    flops: float  # bfloat16 multiply-adds, twice their number, a second
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that leave a chip along one axis of the torus, both directions together
    gpu: bool = False  # its links are those of one machine (NVLink), each GPU to all others


# HBM as the compiler reports it when a program does not fit; the rest from the makers' data sheets.
CHIPS = {
    "v5p": Chip(int(95.74 * 2**30), 459e12, 2765e9, 180e9),
    "v6e": Chip(int(31.25 * 2**30), 918e12, 1640e9, 180e9),
    "v5e": Chip(int(15.75 * 2**30), 197e12, 819e9, 90e9),
    # A GiB less than the card has, for the driver. JAX takes three quarters of it unless XLA_PYTHON_CLIENT_MEM_FRACTION
    # says otherwise.
    "h100": Chip(78 * 2**30, 989e12, 3350e9, 450e9, gpu=True),
    "h200": Chip(139 * 2**30, 989e12, 4800e9, 450e9, gpu=True),
}


def chip(topology: str) -> Chip:
    """The chip of a topology name such as "v5p:2x2x1" or "h100:8".

    Raises:
      UserError: a kind that the table does not have.
    """
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise UserError(
            f"--topology: {topology}: unknown kind {kind!r}; use one of {', '.join(CHIPS)}, as v5p:2x2x1 or h100:8"
        )
    return CHIPS[kind]
