"""Devices to compile for that need not be attached: TPU slices and the NVIDIA GPUs of one machine.

A name is KIND:SIZE: "v5p:2x2x1" (a TPU slice), "2xv5e:4x4" (two slices joined by the data center network), "h100:8"
(eight GPUs). TPU names need jax[tpu], GPU names jax[cuda12]; neither needs the device or its driver.
"""

from __future__ import annotations

import os
from typing import Any

from open_agentrl_jax.planning import chips
from open_agentrl_jax.types import UserError

# Compute capability 9.0 with its own matrix instructions (sm_90a); limits from the CUDA programming guide.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name}"
"""


def devices(topology: str) -> Any:
    """The devices of a topology.

    Raises:
      UserError: the name is malformed or unknown, or the compiler for it is not installed.
    """
    chip, (slices, kind, size) = chips.chip(topology), chips.split(topology)
    if chip.gpu and (not size.isdigit() or not int(size) or slices > 1):
        raise UserError(f"topology {topology}: give the number of GPUs in one machine, e.g. {kind}:8")
    describe = _gpus if chip.gpu else _tpus
    try:
        return describe(kind, size, slices, chip).devices
    except Exception as error:  # the compilers raise many types
        text = " ".join(str(error).split())[:300]
        example = "jax[cuda12]" if chip.gpu else "jax[tpu] and use a name such as v5p:2x2x1"
        raise UserError(f"topology {topology}: {text}; install {example}") from error


def _gpus(kind: str, count: str, _: int, chip: chips.Chip) -> Any:
    from jax.experimental import topologies

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # do not query a driver
    target = _HOPPER.format(bandwidth=chip.hbm_bandwidth, memory=chip.hbm, name=kind.upper())
    return topologies.get_topology_desc(
        platform="cuda", topology_name=kind, target_config=target, topology=f"1x1x{count}"
    )


def _tpus(kind: str, size: str, slices: int, _: chips.Chip) -> Any:
    from jax.experimental import topologies

    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # not a Cloud machine: there is no metadata server
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if set(size) <= set("1x"):
        more["chips_per_host_bounds"] = (1, 1, 1)  # a host with one chip; the default host has four
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{size}", **more)
