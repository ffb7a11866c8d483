"""Runs a batch of test programs in a sandbox: in parallel, with one retry, and with enough of the output."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from open_agentrl_jax.sandbox.result import FLOOD, KEPT

if TYPE_CHECKING:
    from open_agentrl_jax.sandbox.client import Result, Sandbox

PARALLEL = 8  # tests of one program in the sandbox at once
LEAST = 1 << 20  # bytes of output that are read at least, where the default is not enough
FACTOR = 4  # times the expected output that is read


@dataclasses.dataclass(frozen=True)
class Run:
    """One program, its standard input, and the bytes of output that a right solution may need."""

    program: str
    stdin: str = ""
    expected_bytes: int = 0


async def run_all(runs: Sequence[Run], sandbox: Sandbox, *, timeout: float) -> list[Result | None] | None:
    """Runs the programs, at most PARALLEL at once.

    After one that ran out of time or memory no more are started, because the others mostly would, too.

    Args:
        runs: the programs.
        sandbox: where they run.
        timeout: seconds per program.

    Returns:
        The results in order, None for a program that was not started; or None where the sandbox failed twice on one
        program, refused it, or lost output that the test needs.
    """
    results: list[Result | None] = [None] * len(runs)
    waiting, stop, broken = iter(range(len(runs))), False, False

    async def work() -> None:
        nonlocal stop, broken
        for i in waiting:
            if stop:
                return
            result = results[i] = await _run(runs[i], sandbox, timeout)
            broken = broken or result is None
            stop = stop or result is None or result.status in ("timeout", "memory")

    await asyncio.gather(*(work() for _ in range(min(PARALLEL, len(runs)))))
    return None if broken else results


async def _run(run: Run, sandbox: Sandbox, timeout: float) -> Result | None:
    """The result of one program; None where it says nothing about the program."""
    wanted = min(FLOOD, max(LEAST, FACTOR * run.expected_bytes))
    limit = KEPT if FACTOR * run.expected_bytes <= KEPT else wanted
    result = await _once(run, sandbox, timeout, limit)
    if result.status == "infrastructure":  # a server may have gone away
        result = await _once(run, sandbox, timeout, limit)
    cut = result.truncated and result.status == "finished" and result.return_code == 0
    if cut and limit < wanted:
        limit = wanted
        result = await _once(run, sandbox, timeout, limit)
    lost = cut and result.truncated and len(result.stdout.encode()) < limit - KEPT  # less came back than requested
    return None if lost or result.status in ("infrastructure", "refused") else result


async def _once(run: Run, sandbox: Sandbox, timeout: float, limit: int) -> Result:
    if limit == KEPT:
        return await sandbox.run(run.program, stdin=run.stdin, timeout=timeout)
    return await sandbox.run(run.program, stdin=run.stdin, timeout=timeout, max_output=limit)
