"""The sandbox by itself: report what isolates on this machine, or serve SandboxFusion's API.

    python -m launch.sandbox --check           # the level of this machine, and each canary
    python -m launch.sandbox --port 8080       # http://127.0.0.1:8080/run_code

Bound beyond loopback (`--host 0.0.0.0`) it requires the bearer token of the environment variable SANDBOX_TOKEN.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from launch.command import Parser
from open_agentrl_jax.sandbox.probes import Findings, open_embedded, survey
from open_agentrl_jax.types import UserError


def show(found: Findings) -> None:
    """Prints one plan's canaries."""
    verdict = "holds" if found.holds else "does not hold"
    print(f"level {found.plan.level}, {found.plan.name}: {verdict}")
    for name, how in found.canaries.items():
        became = "contained" if how else "ESCAPED" if not found.failure else "not tried"
        print(f"  {became:9}  a program {name}" + (f" ({how})" if how else ""))
    if not found.holds:
        print(f"  missing: {found.why_not}")


def check(all_plans: bool) -> int:
    """Prints what isolates on this machine; returns the exit status, 0 if something does."""
    sandbox, findings = survey(all_plans=all_plans)
    if sandbox is not None:
        sandbox.stop()
    for found in findings:
        show(found)
    best = next((found.plan for found in findings if found.holds), None)
    print(f"\nThis machine: level {best.level} ({best.name})" if best else "\nThis machine: level C, refused")
    if best is not None and best.level == "B":
        print("Level B has no private file system: programs can write nowhere, and can see which paths exist.")
    if best is None:
        print("Cure: Linux 5.13 or later with Landlock, or user namespaces; or sandbox.urls of a server; or, where")
        print("programs may do as they like, --unsafe_no_isolation (sandbox.unsafe_no_isolation=true).")
    return 0 if best else 1


async def serve(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT."""
    import resource  # not on every system, and --help must work there

    from open_agentrl_jax.sandbox import server  # aiohttp is the extra [servers]

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # idle connections must not use up the descriptors of the runs
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    spec = server.ServerSpec(
        options.host,
        options.port,
        os.environ.get("SANDBOX_TOKEN", ""),
        options.max_queue,
        max_memory_mb=options.max_memory_mb,
    )
    sandbox = await asyncio.to_thread(
        lambda: open_embedded(max_active=options.max_active, unsafe_no_isolation=options.unsafe_no_isolation)
    )
    async with sandbox:
        started = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(server.serve(sandbox, spec, started=started))
        await asyncio.wait([serving, started], return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            level = f"level {sandbox.plan.level}, {sandbox.plan.name}"
            if missing := sandbox.metadata.get("missing"):
                level += f"; stronger levels do not hold: {missing}"
            print(f"http://{options.host}:{started.result()} ({level}, {sandbox.max_active} at once)", flush=True)
        await serving


def main() -> None:
    """The command."""
    parser = Parser(prog="launch.sandbox", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="attack this machine's isolation with canary programs and report"
    )
    parser.add_argument("--all", action="store_true", help="with --check: try every plan, not only until one holds")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--max_active", type=int, default=0, help="runs at once; 0: twice the cores")
    parser.add_argument("--max_queue", type=int, default=256, help="runs that may wait; further ones get HTTP 429")
    parser.add_argument("--max_memory_mb", type=int, default=0, help="memory granted per run; 0: half the machine's")
    parser.add_argument("--unsafe_no_isolation", action="store_true", help="serve even where nothing isolates")
    options = parser.parse_args()
    try:
        if options.check:
            sys.exit(check(options.all))
        asyncio.run(serve(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: pip install 'open_agentrl_jax[servers]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
