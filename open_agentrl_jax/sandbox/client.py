"""Entry point: `open_sandbox(spec)` returns the embedded executor or a client of remote servers."""

from __future__ import annotations

import dataclasses

from open_agentrl_jax.sandbox.result import Result, Sandbox, Session

__all__ = ["Result", "Sandbox", "SandboxSpec", "Session", "open_sandbox"]


@dataclasses.dataclass(frozen=True)
class SandboxSpec:
    """Selects a sandbox.

    urls: SandboxFusion servers; empty for the embedded executor.
    max_active: runs at once; 0: twice the cores (embedded), 128 (remote). Further runs wait in order.
    unsafe_no_isolation: run even if nothing isolates; recorded in `metadata`.
    token: bearer token of the remote servers; "": none.
    """

    urls: tuple[str, ...] = ()
    max_active: int = 0
    unsafe_no_isolation: bool = False
    token: str = ""


def open_sandbox(spec: SandboxSpec | None = None) -> Sandbox:
    """Opens a sandbox.

    The embedded sandbox first attacks itself with canaries (under a second) and uses the strongest plan that holds.

    Args:
        spec: None for the embedded executor with its defaults.

    Returns:
        A sandbox, to close after use: `async with open_sandbox(spec) as sandbox`.

    Raises:
        UserError: nothing isolates on this machine, or it is not Linux.
    """
    spec = spec or SandboxSpec()
    if spec.urls:
        from open_agentrl_jax.sandbox.remote import Remote

        return Remote(spec.urls, max_active=spec.max_active, token=spec.token)
    from open_agentrl_jax.sandbox import probes  # the executor exists on Linux only

    return probes.open_embedded(max_active=spec.max_active, unsafe_no_isolation=spec.unsafe_no_isolation)
