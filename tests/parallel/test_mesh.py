import types

import jax
import pytest

from open_agentrl_jax.parallel.mesh import (
    AXES,
    count_devices,
    current_mesh,
    detected_cluster,
    expected_devices,
    initialize_distributed,
    make_mesh,
)
from open_agentrl_jax.types import UserError


def _devices(n):
    return jax.devices("cpu")[:1] * n  # only counted: the sizes are refused before a mesh is made


def test_one_device():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1, "expert": 1}
    assert current_mesh() is None
    with jax.set_mesh(mesh):
        assert current_mesh() == mesh.abstract_mesh
        assert jax.jit(lambda: current_mesh() is not None)()


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((2, 2, 1, 1), "mesh: data=2 fsdp=2 seq=1 tensor=1 expert=1 needs 4 devices, there are 8"),
        ((3, -1, 1, 1), "needs a multiple of 3 devices, there are 8"),
        ((1, -1, -1, 1), "one may be -1"),
        ((0, 8, 1, 1), "each size must be at least 1"),
    ],
)
def test_sizes_that_do_not_match_are_refused(sizes, named):
    with pytest.raises(UserError) as raised:
        make_mesh(*sizes, devices=_devices(8))
    assert named in str(raised.value)


def test_distributed_needs_all_three_or_none(monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    initialize_distributed()  # alone: nothing to join
    with pytest.raises(UserError, match="process_id: missing"):
        initialize_distributed("localhost:1234", 2)


# What srun sets in each process of a job of two nodes with eight GPUs each.
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
SLURM |= {"SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


@pytest.fixture
def started(monkeypatch):
    """The arguments that jax.distributed.initialize gets, in a clean environment."""
    for name in (
        "COORDINATOR_ADDRESS",
        "NUM_PROCESSES",
        "PROCESS_ID",
        "KUBERNETES_SERVICE_HOST",
        "OMPI_MCA_orte_hnp_uri",
    ):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *values, **named: calls.append((values, named)))
    return calls


def test_a_slurm_process_takes_all_gpus_of_its_node(started, monkeypatch):
    """JAX alone would give it the one GPU of SLURM_LOCALID: 1 of 8 works (JAX issue 16788)."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    initialize_distributed()
    assert started == [((), {"cluster_detection_method": "slurm", "local_device_ids": [0, 1, 2, 3, 4, 5, 6, 7]})]
    assert expected_devices() == 8


def test_with_one_slurm_process_per_gpu_each_takes_its_own(started, monkeypatch):
    for name, value in {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NTASKS": "16"}.items():
        monkeypatch.setenv(name, value)
    initialize_distributed()
    assert started == [((), {"cluster_detection_method": "slurm", "local_device_ids": None})]
    assert expected_devices() == 1


def test_a_single_slurm_task_starts_alone(started, monkeypatch):
    for name, value in {**SLURM, "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    initialize_distributed()
    assert started == []


def test_a_kubernetes_pod_without_the_three_variables_starts_alone(started, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert detected_cluster() is None


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 0),
        ({"TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1"}, 4),
        ({"SKYPILOT_NUM_GPUS_PER_NODE": "8"}, 8),
        ({"DEVICES_PER_PROCESS": "2"}, 2),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,1"}, 8),
    ],
)
def test_the_devices_that_the_cluster_assigned(variables, count, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert expected_devices() == count


def test_too_few_devices_end_the_run(monkeypatch):
    assert count_devices() == f"devices: {jax.device_count()} found, any number expected (1 process x 1 cpu)"
    monkeypatch.setenv("DEVICES_PER_PROCESS", "8")
    with pytest.raises(UserError, match=r"found 1 \(cpu\) of 8; install the JAX of this accelerator"):
        count_devices()


def test_slices_divide_the_data_axis():
    """Between slices parameters are copies: only gradients cross the data center network."""
    devices = [
        types.SimpleNamespace(
            id=i, slice_index=i // 4, process_index=i, platform="cpu", device_kind="cpu", coords=[0, 0, 0]
        )
        for i in range(8)
    ]
    with pytest.raises(UserError, match=r"mesh: data=1 does not divide by the 2 slices; set mesh\.data to 2"):
        make_mesh(devices=devices)
