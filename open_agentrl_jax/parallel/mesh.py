"""The device mesh: axes data, fsdp, seq, tensor, all in explicit sharding mode."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from open_agentrl_jax.types import UserError

AXES = ("data", "fsdp", "seq", "tensor")
# Held while a program is handed to the devices of a mesh, where another thread does so too: did two programs come to
# two devices in different order, the collectives of each would wait for the other.
launching = threading.RLock()


def make_mesh(
    data: int = 1, fsdp: int = -1, seq: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Lay the devices out; enter the mesh with `jax.set_mesh(mesh)` before arrays are made or functions traced.

    Args:
      data: copies of the parameters; the batch is split over it.
      fsdp: parts of the parameters; the batch is split over it too. -1 takes the devices that are left.
      seq: parts of each row and of the vocabulary (context parallelism).
      tensor: parts of heads, hidden units and vocabulary; between matrix products, of each row.
      devices: the devices to use, all by default; for ahead-of-time compilation those of a topology.

    Raises:
      UserError: the sizes do not make up the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, seq, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh: {_show(sizes)}: each size must be at least 1, one of them may be -1 (what is left)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh: {_show(sizes)} needs a multiple of {known} devices, there are {len(devices)}; change the sizes"
            if -1 in sizes
            else f"mesh: {_show(sizes)} needs {known} devices, there are {len(devices)}; set one size to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None; works inside and outside of jit."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def initialize_distributed(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join this process to the others; does nothing where one process is all there is.

    The three values come from the arguments, else from COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID, else from the
    cluster itself where JAX can ask it (Cloud TPU, Slurm, Kubernetes). Call it before anything touches a device.

    Raises:
      UserError: some of the three are given and some are not.
    """
    given = {
        "coordinator": coordinator or os.environ.get("COORDINATOR_ADDRESS"),
        "num_processes": num_processes if num_processes is not None else os.environ.get("NUM_PROCESSES"),
        "process_id": process_id if process_id is not None else os.environ.get("PROCESS_ID"),
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"distributed: {missing[0]}: missing; give all of coordinator, num_processes and process_id")
    if not missing:
        jax.distributed.initialize(given["coordinator"], int(given["num_processes"]), int(given["process_id"]))
    elif os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",") or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize()


def _show(sizes: Sequence[int]) -> str:
    return " ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
