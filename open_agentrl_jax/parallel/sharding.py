"""Partition specs of activations, and how a step gathers parameters. models/params.py lists those of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from open_agentrl_jax.parallel.mesh import current_mesh
from open_agentrl_jax.types import UserError

P = jax.P

# PARTS split the leading axis of every matrix: only then do TPU compilers turn the gradient of a gathered parameter
# into a reduce-scatter.
PARTS = ("fsdp", "seq", "expert")  # all split parameters: the parts of a row sum gradients as the rows do
EXPERTS = ("expert", "fsdp", "seq")  # split the experts of a mixture, which stay split over the first
# Each device holds only its `seq` part of embedding and head: the devices that share a row also share its look-ups and
# logits. `seq` is the outer axis, so that gathering over fsdp alone gives whole parts.
VOCABULARY = ("seq", "tensor")

BATCH = ("data", "fsdp", "expert")  # what the batch is split over
TOKENS = P(BATCH, "seq")  # [b t]
ROWS = P(BATCH, "seq", None)  # [b t d] where a product takes it or made it
HIDDEN = P(BATCH, ("seq", "tensor"), None)  # [b t d] between products: norms and sums are done, and saved, once
WIDE = P(BATCH, "seq", "tensor")  # [b t f]
HEADS = P(BATCH, "seq", "tensor", None)  # [b t h D]


class Layout(NamedTuple):
    """How activations lie."""

    tokens: jax.sharding.PartitionSpec
    hidden: jax.sharding.PartitionSpec
    wide: jax.sharding.PartitionSpec
    heads: jax.sharding.PartitionSpec


SPLIT = Layout(TOKENS, HIDDEN, WIDE, HEADS)  # rows over the devices: what trains
# Every device has all rows: what generates. The cache's slots are split over every axis but `tensor`.
WHOLE = Layout(P(None, None), P(None, None, None), P(None, None, "tensor"), P(None, None, "tensor", None))
SLOTS = ("data", "fsdp", "seq", "expert")
_REDUCED = frozenset(SLOTS)  # every axis the batch is split over


def path_name(path: tuple[Any, ...]) -> str:
    """A jax key path as "layers/q"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def check_divides(
    name: str,
    shape: tuple[int, ...],
    spec: jax.sharding.PartitionSpec,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> None:
    """Raise a UserError where an axis of `shape` does not divide by the mesh axes that split it."""
    if len(spec) > len(shape):
        raise UserError(f"sharding: {name}: shape {shape} has {len(shape)} axes, the table has {len(spec)}")
    for axis, (size, part) in enumerate(zip(shape, spec, strict=False)):
        if size % ways(part, mesh):
            sizes = " x ".join(f"{n}={mesh.shape[n]}" for n in names(part) if mesh.shape[n] > 1)
            raise UserError(
                f"sharding: {name}: axis {axis} of {shape} is {size}, which does not divide by {sizes}; "
                f"choose mesh sizes whose product divides {size}"
            )


def constrain(x: jax.Array, spec: jax.sharding.PartitionSpec | None) -> jax.Array:
    """Move `x` to `spec` on the current mesh; without a mesh, `x`."""
    return x if current_mesh() is None else jax.reshard(x, spec)


def out(spec: jax.sharding.PartitionSpec) -> jax.sharding.PartitionSpec | None:
    """`spec` as an `out_sharding=` argument: None where no mesh is set."""
    return None if current_mesh() is None else spec


def gather(x: jax.Array, kept: jax.sharding.PartitionSpec, parts: tuple[str, ...] = PARTS) -> jax.Array:
    """Gather a parameter over `parts` for a matrix product; its gradient comes back reduce-scattered.

    Plain resharding to the gathered spec would make jax all-reduce the gradient over the batch axes; `reduced=` leaves
    the sum to be done into the parameter's own sharding.

    Args:
      x: the parameter.
      kept: its spec.
      parts: mesh axes.
    """
    if current_mesh() is None:
        return x
    if not any(set(parts) & set(names(part)) for part in kept):
        return x  # norms and biases: tiny, and an elementwise product takes no reduced operand
    return gather_as(x, P(*(_without(parts, part) for part in kept)))


def gather_as(x: jax.Array, spec: jax.sharding.PartitionSpec) -> jax.Array:
    """A parameter laid out as `spec`, whole over every other axis of the batch, its gradient summed on the way back."""
    mesh = current_mesh()
    if mesh is None:
        return x
    kept = frozenset(name for part in spec for name in names(part))
    for axis in ("expert", "seq"):  # the inner one of PARTS first
        if mesh.shape[axis] > 1 and axis not in kept:
            # One axis after the other: for groups that fill a square torus TPU compilers have no reduce-scatter.
            here = jax.typeof(x).sharding.spec
            x = jax.reshard(x, P(*(_without(axis, part) for part in here.partitions), reduced=here.reduced | {axis}))
    return jax.reshard(x, P(*spec, reduced=_REDUCED - kept))


def unreduced(x: jax.Array) -> jax.sharding.PartitionSpec | None:
    """The layout of the gradient of a gathered parameter: as the parameter, the sum over the batch still to be done."""
    if current_mesh() is None:
        return None
    spec = jax.typeof(x).sharding.spec
    return P(*spec.partitions, unreduced=spec.reduced)


def names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that split an axis, by its part of a spec."""
    return (part,) if isinstance(part, str) else part or ()


def ways(part: str | tuple[str, ...] | None, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Into how many parts an axis is split on a mesh, by its part of a spec."""
    return math.prod(mesh.shape[n] for n in names(part))


def _without(axes: str | tuple[str, ...], part: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    left = tuple(n for n in names(part) if n not in names(axes))
    return left[0] if len(left) == 1 else left or None


def placer(mesh: jax.sharding.Mesh | None, mine: Sequence[int] | None = None, *, rows: int = 0) -> Callable[[Any], Any]:
    """Returns a function that places a numpy Batch on the devices: rows over BATCH, positions over seq.

    Args:
        mesh: None: one device.
        mine: the global numbers of the rows that this process's batch [m b t] holds; None: all rows, the same batch in
            every process.
        rows: of all processes; needed with `mine`.
    """
    sharding = None if mesh is None else NamedSharding(mesh, P(None, *TOKENS))
    held = {row: number for number, row in enumerate(mine or ())}

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        if sharding is None or sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        if mine is None:
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        def part(index: Any) -> np.ndarray:
            micro, wanted, places = index
            return x[micro, [held[row] for row in range(*wanted.indices(rows))], places]

        return jax.make_array_from_callback((len(x), rows, x.shape[-1]), sharding, part)

    return lambda batch: jax.tree.map(put, batch)
