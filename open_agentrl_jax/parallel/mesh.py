"""The device mesh (axes data, fsdp, seq, tensor, expert, in explicit sharding mode) and how processes join it."""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from open_agentrl_jax.types import UserError

AXES = ("data", "fsdp", "seq", "tensor", "expert")
MULTISLICE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
# Held while a program is dispatched to the devices of a mesh if another thread may dispatch too: if two programs reach
# two devices in different orders, their collectives deadlock.
launching = threading.RLock()


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    seq: int = 1,
    tensor: int = 1,
    expert: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over the devices; enter it with `jax.set_mesh(mesh)` before creating arrays or tracing functions.

    Several TPU slices are joined by a slower network: `data` then runs over the slices first, and the other axes stay
    within a slice.

    Args:
      data: copies of the parameters; the batch is split over it.
      fsdp: parts of the parameters; the batch is split over it too. -1 takes all remaining devices.
      seq: parts of each row and of the vocabulary (context parallelism).
      tensor: parts of heads, hidden units and vocabulary; between matrix products, of each row.
      expert: parts of the experts of a mixture; the batch is split over it too.
      devices: default: all devices; for ahead-of-time compilation those of a topology.

    Raises:
      UserError: the product of the sizes is not the number of devices, or `data` does not divide by the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, seq, tensor, expert]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh: {_show(sizes)}: each size must be at least 1; one may be -1 (all remaining devices)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh: {_show(sizes)} needs a multiple of {known} devices, there are {len(devices)}; change the sizes"
            if -1 in sizes
            else f"mesh: {_show(sizes)} needs {known} devices, there are {len(devices)}; set one size to -1"
        )
    types = (AxisType.Explicit,) * len(AXES)
    slices = slice_count(devices)
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    if sizes[0] % slices:
        raise UserError(f"mesh: data={sizes[0]} does not divide by the {slices} slices; set mesh.data to {slices}")
    from jax.experimental.mesh_utils import create_hybrid_device_mesh

    within, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1, 1)
    return Mesh(create_hybrid_device_mesh(within, between, devices), AXES, axis_types=types)


def slice_count(devices: Iterable[Any]) -> int:
    """TPU slices that the devices are in; 1 where the platform has none."""
    return len({getattr(device, "slice_index", None) or 0 for device in devices})


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None; works inside and outside of jit."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def initialize_distributed(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to the others of the run; does nothing for a single process.

    The three values come from the arguments, else from COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID, else from
    JAX's own detection (Cloud TPU by metadata or environment, SLURM, Open MPI). Pods without TPUs set the three
    variables, as launch/clusters/gke_gpu_jobset.yaml does. Call it before anything touches a device.

    On SLURM, JAX gives each process the one GPU of its rank on the node. Started with one process per node, as
    launch/clusters/slurm.sh does, the process takes all GPUs of its node instead: it loads the weights once per node
    and has the node's cores for episodes and grading. With several processes per node each takes its one GPU.

    Raises:
      UserError: some of the three values are given and some are not.
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
        address, count, me = given["coordinator"], int(given["num_processes"]), int(given["process_id"])
        # With detection off, a SLURM job that also sets the three variables keeps all of its GPUs.
        jax.distributed.initialize(address, count, me, cluster_detection_method="deactivate")
    elif cluster := detected_cluster():
        own = list(range(_slurm_gpus())) if cluster == "slurm" and _slurm_tasks_per_node() == 1 else []
        with _no_metadata_queries() if cluster == "gketpu" else contextlib.nullcontext():
            jax.distributed.initialize(cluster_detection_method=cluster, local_device_ids=own or None)


@contextlib.contextmanager
def _no_metadata_queries() -> Iterator[None]:
    """Answers JAX's questions about slices, which GKE answers by variables if there are several.

    For each missing variable JAX asks the metadata server, six times for half a second if it has no answer.
    """
    unset = [name for name in MULTISLICE if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, ""))
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


def detected_cluster() -> str | None:
    """JAX's name of the cluster manager that started this process ("slurm", "gcetpu", ...); None: there is none."""
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize has no public way to only detect

    # GKE is known by its variables; Cloud TPU VMs are only by a metadata server, which GKE pods may not reach.
    for cluster in sorted(ClusterEnv._cluster_types, key=lambda cluster: cluster.name != "gketpu"):
        name = cluster.name
        if cluster.opt_in_only_method or not name:
            continue  # the unnamed one is Kubernetes, which fails in pods that are not part of an indexed job
        if cluster.is_env_present() and not (name == "slurm" and int(os.environ["SLURM_NTASKS"]) == 1):
            return name
    return None


def count_devices() -> str:
    """The devices found and expected, as the first line of a run's log.

    Raises:
      UserError: this process has fewer devices than the cluster manager assigned to it.
    """
    found, expected = jax.local_device_count(), expected_devices()
    device = jax.local_devices()[0]
    if expected and found < expected:
        raise UserError(
            f"devices: process {jax.process_index()} on {socket.gethostname()} found {found} ({device.platform}) of "
            f"{expected}; install the JAX of this accelerator, or start one process per node"
        )
    count, kind = jax.process_count(), device.device_kind
    total = f"{jax.device_count()} found, {expected * count if expected else 'any number'} expected"
    return f"devices: {total} ({count} {'process' if count == 1 else 'processes'} x {found} {kind})"


def expected_devices() -> int:
    """Devices that DEVICES_PER_PROCESS or the cluster manager assigns to this process; 0: unknown."""
    if "DEVICES_PER_PROCESS" in os.environ:
        return int(os.environ["DEVICES_PER_PROCESS"])
    if chips := os.environ.get("TPU_CHIPS_PER_HOST_BOUNDS"):  # GKE sets e.g. 2,2,1
        return math.prod(map(int, chips.split(",")))
    if "SLURM_GPUS_ON_NODE" in os.environ:
        return _slurm_gpus() if _slurm_tasks_per_node() == 1 else 1
    return int(os.environ.get("SKYPILOT_NUM_GPUS_PER_NODE") or 0)


def _slurm_gpus() -> int:
    """GPUs of this node that the job has."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return int(os.environ.get("SLURM_GPUS_ON_NODE") or len([name for name in visible.split(",") if name]))


def _slurm_tasks_per_node() -> int:
    """From "1(x2)", "2,1" and the like: the most on any node."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or "1"
    return max(int(number) for number in re.findall(r"(?:^|,)(\d+)", text))


def _show(sizes: Sequence[int]) -> str:
    return " ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
