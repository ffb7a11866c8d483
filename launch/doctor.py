"""Check a run before it is paid for: devices, mesh, memory, servers, sandbox, storage, tokenizer and data.

    python -m launch.doctor --config=configs/qwen3_4b_grpo_tcr.py

Takes about a minute, trains nothing and leaves nothing behind. Prints a table with what was found and, for each fault,
its cure. Start it as the run will be started, e.g. on every host of a pod. Exits with 0, or with 2 if a check fails.
"""

from __future__ import annotations

from launch import command
from open_agentrl_jax.config import Config
from open_agentrl_jax.parallel.mesh import initialize_distributed
from open_agentrl_jax.run.doctor import examine


def main(config: Config) -> int:
    """Prints the findings as they come; returns the exit code."""
    initialize_distributed()
    findings = []
    for finding in examine(config):
        findings.append(finding)
        print(f"{finding.check:10} {'ok' if finding.ok else 'FAILS':6} {finding.text}", flush=True)
    failed = [finding.check for finding in findings if not finding.ok]
    print(f"{len(failed)} of {len(findings)} checks fail: {', '.join(failed)}" if failed else "all checks pass")
    return 2 if failed else 0


if __name__ == "__main__":
    load = command.config_flag()
    command.run(lambda: main(load()))
