"""NVIDIA GPUs that need not be there, for launch.compile: "h200:1" is one H200, "h100:8" eight H100 of one machine.

XLA's compiler for them comes with jax[cuda12] and needs no driver, only a description of the GPU to compile for.
"""

from __future__ import annotations

import os
from typing import Any

from open_agentrl_jax.planning import chips
from open_agentrl_jax.types import UserError

# Of compute capability 9.0 with its own matrix instructions (sm_90a); the limits of the CUDA programming guide.
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
    """The devices of a topology such as "h100:8".

    Raises:
      UserError: a number of devices that is none, or no compiler for NVIDIA GPUs here.
    """
    from jax.experimental import topologies

    kind, _, count = topology.partition(":")
    if not count.isdigit() or not int(count):
        raise UserError(f"--topology={topology}: give the number of GPUs of one machine, as {kind}:8")
    chip = chips.chip(topology)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver is asked
    target = _HOPPER.format(bandwidth=chip.hbm_bandwidth, memory=chip.hbm, name=kind.upper())
    try:
        description = topologies.get_topology_desc(
            platform="cuda", topology_name=kind, target_config=target, topology=f"1x1x{count}"
        )
    except Exception as error:  # the plugin says it in many ways
        text = " ".join(str(error).split())[:300]
        raise UserError(f"--topology={topology}: {text}; install jax[cuda12]") from error
    return description.devices
