"""How many floating-point operations a traced function does, loops and kernels included."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flops:
    """Twice the multiply-adds of matrix products, over all devices; a loop of unknown length counts once."""

    products: float = 0.0
    kernels: float = 0.0  # inside Pallas kernels, as they estimate it, else as if every step of their grids computed
    ragged: float = 0.0  # of ragged products, as if every row belonged to a group of its device

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.products + other.products, self.kernels + other.kernels, self.ragged + other.ragged)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.products * times, self.kernels * times, self.ragged * times)


def count(jaxpr: Any) -> Flops:
    """The operations of a jaxpr, of which XLA's own cost analysis counts loop bodies once and kernels not at all."""
    total = Flops()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if not equation.outvars and not equation.effects:
            continue  # what rematerialisation need not compute again: JAX leaves an empty call, XLA takes it out
        if name == "dot_general":
            total += Flops(_product(equation))
        elif name == "ragged_dot_general":
            total += Flops(0.0, 0.0, _ragged(equation))
        elif name == "pallas_call":
            cell, steps = count(params["jaxpr"]), math.prod(params["grid_mapping"].grid)
            estimate = params.get("cost_estimate")
            total += Flops(0.0, estimate.flops if estimate else cell.products * steps)
        elif name == "cond":
            total += max((count(branch) for branch in params["branches"]), key=lambda f: f.products + f.kernels)
        else:
            times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
            for inner in _inner(params):
                total += count(inner) * times
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                yield part


def _ragged(equation: Any) -> float:
    """Each row is multiplied with the matrix of its group alone, so the axis of groups does not count."""
    left, right = (v.aval.shape for v in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    # [m k] x [g k n] -> [m n], or for the gradient of the matrices [m k] x [m n] -> [g k n].
    return 2.0 * math.prod(left) * (right[-1] if len(right) == 3 else out[-1])


def _product(equation: Any) -> float:
    ((contract, _), (batch, _)) = equation.params["dimension_numbers"]
    left, right = (v.aval.shape for v in equation.invars)
    shared = math.prod(left[i] for i in (*contract, *batch))
    return 2.0 * math.prod(left) * math.prod(right) / shared
