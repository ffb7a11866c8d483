"""The figures of docs/graders.md.

python tests/rewards/measure.py                   both modes and math-verify alone on the hand-checked answers; speed
python tests/rewards/measure.py FILE.jsonl        math-verify alone and ours on the answers of a file, in six spellings
python tests/rewards/measure.py CLONE [--show]    the published tests, in a clone of github.com/huggingface/Math-Verify

Of those tests it runs each parametrized (gold, prediction, expected), without strings to be picked by a letter (their
own extraction setting) and non-default strictness, because our grader has no such settings.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import sys
import time
from pathlib import Path

from open_agentrl_jax.rewards import math, pool
from open_agentrl_jax.rewards.answers import compare
from open_agentrl_jax.rewards.math import grade


def cases(clone: Path) -> list[tuple[str, str, str, bool]]:
    """(test name, gold, prediction, expected) of all parametrized tests with just these three."""
    sys.path.insert(0, str(clone))  # its tests import one another as the package `tests`
    found = []
    for file in sorted((clone / "tests").glob("test_*.py")):
        try:
            module = _load(file)
        except ImportError as e:
            print(f"left out {file.name}: {e}")
            continue
        for name, function in vars(module).items():
            for mark in getattr(function, "pytestmark", []) if name.startswith("test_") else []:
                names = mark.args[0] if mark.name == "parametrize" else ""
                if isinstance(names, str) and [n.strip() for n in names.split(",")] == ["gold", "pred", "expected"]:
                    found += [(f"{file.stem}.{name}", g, p, bool(e)) for g, p, e in mark.args[1]]
    return [c for c in found if isinstance(c[1], str) and "string" not in c[0] and "strict" not in c[0]]


def _load(file: Path):
    spec = importlib.util.spec_from_file_location(f"published_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published(clone: Path) -> None:
    """Prints the agreement with the published tests."""
    counts = {"agree": 0, "too strict": 0, "too lenient": 0, "failed": 0}
    all_cases, started = cases(clone), time.monotonic()
    for name, gold, prediction, expected in all_cases:
        score = grade(prediction, gold)
        kind = "agree" if bool(score.accuracy) == expected else "too strict" if expected else "too lenient"
        kind = "failed" if score.status == "failed" else kind
        counts[kind] += 1
        if kind != "agree" and "--show" in sys.argv:
            print(f"{kind:12} {name}: gold {gold[:80]!r} prediction {prediction[-120:]!r}")
    print(f"{len(all_cases)} cases, {time.monotonic() - started:.1f} s, {counts}")


def show_agreement(name: str, answers: list[tuple[str, str, bool]]) -> None:
    """Prints how often exact arithmetic decides, and how often it and math-verify alone are right."""
    counts = {"decided exactly": 0, "right there": 0, "math-verify right there": 0, "math-verify right in all": 0}
    for prediction, truth, right in answers:
        verdict = compare(prediction, truth)
        try:
            alone = pool.shared().ask(prediction, truth)
        except pool.WorkerFailed:
            alone = None
        counts["math-verify right in all"] += alone == right
        if verdict is not None:
            counts["decided exactly"] += 1
            counts["right there"] += verdict == right
            counts["math-verify right there"] += alone == right
    print(f"{name}: {len(answers)}; {counts}")


def real_answers(file: Path, limit: int = 300) -> None:
    """Prints the agreement on the answers of a data set, each in spellings that models use, right and wrong."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][:limit]
    answers: list[tuple[str, str, bool]] = []
    for row in rows:
        truth = str(row["answer"]).rpartition("####")[2].strip().replace(",", "")
        number = int(truth)
        right = (truth, f"{number:,}", f"\\${number}", f"{number}.00", f"{number}\\text{{ units}}", f"x = {number}")
        answers += [(spelled, truth, True) for spelled in right]
        answers += [(spelled, truth, False) for spelled in (str(number + 1), f"{number}{number}", f"-{number + 1}")]
    show_agreement(file.name, answers)


def hand_checked() -> None:
    """Prints the agreement with the hand-checked answers, and answers per second with an empty cache."""
    file = Path(__file__).parent / "answers.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [(f"So \\boxed{{{r['prediction']}}}", r["truth"], r["right"]) for r in rows]
    for mode in ("robust", "reference"):
        right = sum(bool(grade(t, truth, mode=mode).accuracy) == expected for t, truth, expected in texts)
        print(f"{mode}: {right} of {len(texts)} hand-checked answers as checked")
    show_agreement("hand-checked answers", [(r["prediction"], r["truth"], r["right"]) for r in rows])
    symbolic = [
        (t, truth) for (t, truth, _), r in zip(texts, rows, strict=True) if compare(r["prediction"], truth) is None
    ]
    exact = [(t, truth) for t, truth, _ in texts if (t, truth) not in symbolic]
    for name, work in (("all", [(t, truth) for t, truth, _ in texts]), ("symbolic", symbolic), ("exact", exact)):
        rounds, done, started = 5, 0, time.monotonic()
        for _ in range(rounds):  # a fresh round for the cache of verdicts; sympy's own caches stay warm, as in a run
            math._equivalent.cache_clear()
            with concurrent.futures.ThreadPoolExecutor(4) as threads:
                done += len(list(threads.map(lambda job: grade(*job), work)))
        print(f"{name}: {done / (time.monotonic() - started):.0f} graded answers/s ({len(work)} different, 4 threads)")


if __name__ == "__main__":
    given = [Path(a).resolve() for a in sys.argv[1:] if not a.startswith("-")]
    if given and given[0].is_file():
        real_answers(given[0])
    elif given:
        published(given[0])
    else:
        hand_checked()
