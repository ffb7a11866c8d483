"""Evaluation sets by name: their place on the Hub, their row format, and which rows belong to them.

`aime_2024` is downloaded from the Hub; `aime_2024=FILE` reads a local copy under the same name and template. Any other
path is a file, a folder or a Hub id, as in data.prompts.read_tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from open_agentrl_jax.data.prompts import Reader, TaskTable, read_tasks
from open_agentrl_jax.types import Task, UserError


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One evaluation set; `keep` selects tasks."""

    path: str
    format: str = "auto"
    keep: Callable[[Task], bool] = lambda task: True


def _between(first: str, last: str) -> Callable[[Task], bool]:
    """Selects by month of the contest; a row without a date comes from a file that contains only the slice."""
    return lambda task: first <= str(task.extra.get("contest_date") or first)[:7] <= last


_CODE = "livecodebench/code_generation_lite:test*.jsonl"  # test.jsonl to test6.jsonl together are release_v6
BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k:main/test-*", "gsm8k"),
    "aime_2024": Benchmark("Maxwell-Jia/AIME_2024"),
    "aime_2025": Benchmark("yentinglin/aime_2025"),
    "aime_2026": Benchmark("MathArena/aime_2026"),
    "hmmt_feb_2025": Benchmark("MathArena/hmmt_feb_2025"),
    "hmmt_feb_2026": Benchmark("MathArena/hmmt_feb_2026"),
    "beyond_aime": Benchmark("ByteDance-Seed/BeyondAIME"),
    "gpqa_diamond": Benchmark("hendrydong/gpqa_diamond"),
    "livecodebench_v6": Benchmark(_CODE),
    "livecodebench_v6_2502_2505": Benchmark(_CODE, keep=_between("2025-02", "2025-05")),
}


def place_of(path: str) -> str:
    """The path of a named set, of `name=path`, or of a path."""
    name, _, place = path.partition("=")
    return place or BENCHMARKS[name].path if name in BENCHMARKS else path


def read_problems(path: str, *, format: str | Reader = "auto", tools: bool = True, check: bool = True) -> TaskTable:
    """Reads the problems of a named set, or of a path.

    Args:
        path: a name of BENCHMARKS, `name=path`, or what read_tasks takes.
        format: as in read_tasks; `auto` uses a named set's own format.
        tools, check: as in read_tasks.

    Raises:
        UserError: no row belongs to the named set; also the errors of read_tasks.
    """
    name = path.partition("=")[0]
    if name not in BENCHMARKS:
        return read_tasks(path, format=format, tools=tools, check=check)
    benchmark = BENCHMARKS[name]
    format = benchmark.format if format == "auto" else format
    table = read_tasks(place_of(path), format=format, tools=tools, source=name, check=check)
    kept = TaskTable((task for task in table if benchmark.keep(task)), table.skipped)
    if not kept:
        raise UserError(f"{path}: none of its {len(table)} problems belongs to {name}; give the file of this set")
    return kept
