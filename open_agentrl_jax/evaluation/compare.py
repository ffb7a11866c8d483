"""Compares two evaluations of the same problems: a paired test and a bootstrap, both clustered by problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

DRAWS = 10_000  # bootstrap resamples
FINEST = 200_000  # steps of the exact distribution of the test


def paired(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Compares the accuracies of two runs problem by problem.

    Args:
        a: problem id -> accuracy (mean of its graded samples) of the first run.
        b: the same of the second run; only problems in both are compared.

    Returns:
        "problems"; "a", "b", the mean accuracies on them; "difference" b - a with its 95 % bootstrap interval "low",
        "high" (problems drawn with replacement, with a fixed seed); "p_value" of the two-sided sign-flip test (the
        chance of a difference at least as large if a coin swapped each problem's two results); and on how many problems
        b is "better" and "worse".

    Raises:
        ValueError: no problem in common.
    """
    common = sorted(a.keys() & b.keys())
    if not common:
        raise ValueError("the two runs have no problem in common")
    left, right = (np.array([run[name] for name in common], np.float64) for run in (a, b))
    difference = right - left
    low, high = bootstrap(difference)
    return {
        "problems": len(common),
        "a": float(left.mean()),
        "b": float(right.mean()),
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "p_value": sign_flip(difference),
        "better": int((difference > 0).sum()),
        "worse": int((difference < 0).sum()),
    }


def bootstrap(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a mean over problems."""
    from scipy import stats  # imported late: it takes a second

    x = np.asarray(values, np.float64)
    if len(x) < 2 or (x == x[0]).all():
        return float(x[0]), float(x[0])
    found = stats.bootstrap(
        (x,), np.mean, n_resamples=DRAWS, method="percentile", batch=max(1, 1_000_000 // len(x)), rng=seed
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def sign_flip(difference: Sequence[float] | np.ndarray) -> float:
    """P(|sum of +-d| >= |sum of d|) with fair independent signs, by convolution over integer steps.

    `scipy.stats.permutation_test` is exact for about 13 problems and draws at random beyond. Differences of accuracies
    are fractions of small denominators, so that integer steps are exact; where their common multiple needs more than
    FINEST steps in all, they are rounded to that.
    """
    d = np.abs(np.asarray(difference, np.float64))
    signed = np.asarray(difference, np.float64)
    denominators = [fraction(x) for x in d]
    steps = min(math.lcm(*denominators), max(1, FINEST // len(d)))
    units = np.rint(signed * steps).astype(int)
    total = int(np.abs(units).sum())
    chances = np.zeros(2 * total + 1)  # of each sum from -total to total
    chances[total] = 1.0
    for unit in np.abs(units[units != 0]):
        chances = (np.roll(chances, unit) + np.roll(chances, -unit)) / 2  # values that wrap around are zero
    observed = abs(int(units.sum()))
    sums = np.abs(np.arange(-total, total + 1))
    return float(min(1.0, chances[sums >= observed].sum()))


def fraction(x: float, most: int = 5040) -> int:
    """The denominator, at most `most`, of the fraction nearest to x."""
    return Fraction(float(x)).limit_denominator(most).denominator


def accuracies(figures: Mapping[str, Any]) -> dict[str, float]:
    """Problem id -> mean accuracy of its graded samples, from an evaluation's JSON."""
    graded = {p["id"]: [x for x in p["accuracy"] if x is not None] for p in figures["problems"]}
    return {name: sum(values) / len(values) for name, values in graded.items() if values}
