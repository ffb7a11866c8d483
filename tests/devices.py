"""Fake devices for the programs that tests start."""


def fake(count: int) -> dict[str, str]:
    """What such a program finds in its environment. How work is divided is looked at there: LLVM need not optimise."""
    flags = (
        f"--xla_force_host_platform_device_count={count}",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
    return {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
