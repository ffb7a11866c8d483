"""Figures of an evaluation: avg@n, unbiased pass@k, majority votes, and intervals clustered by problem.

All figures are exact expectations, without random draws; the order of samples and of tied votes has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy import special

from open_agentrl_jax.rewards.math import canonical

Interval = dict[str, float]


def summarize(
    accuracy: np.ndarray | Sequence[Sequence[float]],
    predictions: Sequence[Sequence[str | None]],
    ground_truths: Sequence[str],
    *,
    key: Callable[[str], Hashable] | None = None,
) -> dict[str, Interval]:
    """Summarizes n samples per problem of p problems.

    Args:
        accuracy: [p n], 1 right, 0 wrong, NaN for a sample that was not graded (left out, never counted as wrong).
        predictions: [p n] the answers; "" is no answer and casts no vote.
        ground_truths: [p] the right answers, used only to check that the shapes agree.
        key: groups the wrong answers of a vote; all right answers are one group. None: rewards.math.canonical.

    Returns:
        "avg@{n}"; for k = 1, 2, 4 ... n: "pass@{k}" (unbiased: the chance that k of the n samples, drawn without
        replacement, hold a right one), "maj@{k}" (the chance that the vote of k such samples is right; a tie counts by
        its share), and for comparison with the reference "bootstrap_best@{k}" and "bootstrap_maj@{k}" (drawn WITH
        replacement, answers compared as strings, "" counted as an answer; the limit of many draws). Each is {"value",
        "low", "high"} with a 95 % interval clustered by problem. A problem with fewer than k graded samples enters with
        those it has; one without any is left out.

    Raises:
        ValueError: the shapes disagree, or nothing was graded.
    """
    right = np.asarray(accuracy, np.float64)
    if right.ndim != 2 or not right.size:
        raise ValueError(f"accuracy must be [problems, samples] and not empty, its shape is {right.shape}")
    p, n = right.shape
    if len(predictions) != p or len(ground_truths) != p or any(len(row) != n for row in predictions):
        raise ValueError(f"predictions must be [{p}, {n}] and ground_truths [{p}], like accuracy")
    key = key or canonical
    graded = ~np.isnan(right)
    rows = [
        (
            right[i][graded[i]],
            ["" if s is None else str(s) for s, ok in zip(predictions[i], graded[i], strict=True) if ok],
        )
        for i in range(p)
        if graded[i].any()
    ]
    if not rows:
        raise ValueError("no sample was graded")
    problems = [(r, _votes(r, s, key), _strings(r, s)) for r, s in rows]
    table = {f"avg@{n}": interval([r.mean() for r, _, _ in problems])}
    for k in powers(n):
        table[f"pass@{k}"] = interval([pass_at_k(len(r), int((r > 0.5).sum()), k) for r, _, _ in problems])
        table[f"maj@{k}"] = interval([vote(v, len(r), k) for r, v, _ in problems])
        table[f"bootstrap_best@{k}"] = interval([1 - (1 - (r > 0.5).mean()) ** k for r, _, _ in problems])
        table[f"bootstrap_maj@{k}"] = interval([vote(s, len(r), k, replace=True) for r, _, s in problems])
    return table


def powers(n: int) -> list[int]:
    """1, 2, 4 ... and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold one of the c right ones (arXiv 2107.03374)."""
    k = min(k, n)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def vote(classes: Sequence[tuple[int, float]], n: int, k: int, *, replace: bool = False) -> float:
    """The expected value of the answer that wins a vote of k of n samples; tied answers win with equal chance.

    Args:
        classes: (count, value) of each answer. Counts may sum to less than n; the rest cast no vote.
        n: samples in all, at most about 1000.
        k: voters.
        replace: draw with replacement.

    Returns:
        sum over answers of value * P(it wins). Exact: the ways to draw are coefficients of a product of polynomials in
        x (voters used), one per class. A rival with as many votes as the winner contributes a factor u; the integral
        of u^ties over [0, 1] is 1 / (1 + ties), so Gauss-Legendre nodes in u share the win among the tied.
    """
    k = k if replace else min(k, n)
    silent = n - sum(count for count, _ in classes)
    total = 0.0
    for votes in range(1, k + 1):
        winners = [i for i, (count, value) in enumerate(classes) if value and (replace or count >= votes)]
        rest = k - votes
        if rest < votes:  # nobody can catch up
            for i in winners:
                count, value = classes[i]
                total += value * _ways(count, n, votes, replace)[votes] * _ways(n - count, n, rest, replace)[rest]
            continue
        if not winners:
            continue
        x, weights = np.polynomial.legendre.leggauss(rest // votes // 2 + 1)
        u, weights = (x + 1) / 2, weights / 2
        factors = []
        for count, _ in classes:
            poly = np.tile(_ways(count, n, votes, replace), (len(u), 1))
            poly[:, votes] *= u
            factors.append(poly)
        start = np.tile(_ways(silent, n, rest, replace), (len(u), 1))
        before = [start]  # products of the factors left of each class, and from the last class leftwards
        for poly in factors[:-1]:
            before.append(_multiply(before[-1], poly))
        after = np.zeros_like(start)
        after[:, 0] = 1
        for i in reversed(range(len(classes))):
            if i in winners:
                count, value = classes[i]
                others = (before[i] * after[:, ::-1]).sum(1) @ weights  # the coefficient of x^rest
                total += value * _ways(count, n, votes, replace)[votes] * others
            after = _multiply(after, factors[i])
    return float(total * math.factorial(k) if replace else total / math.comb(n, k))


def _ways(count: int, n: int, most: int, replace: bool) -> np.ndarray:
    """[most + 1] ways to draw i voters from `count` of n: C(count, i), or with replacement (count / n)^i / i!."""
    if replace:
        return np.array([(count / n) ** i / math.factorial(i) for i in range(most + 1)])
    return np.array([math.comb(count, i) for i in range(most + 1)], np.float64)


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Product of polynomials [nodes, degree + 1], cut to the degree of `a`."""
    product = np.zeros_like(a)
    for i in range(b.shape[1]):
        if b[:, i].any():
            product[:, i:] += a[:, : a.shape[1] - i] * b[:, i : i + 1]
    return product


def interval(values: Sequence[float]) -> Interval:
    """Mean over problems with a 95 % interval: Wilson's, at the effective sample size of the clustered variance.

    The variance is that between problems, so the samples of one problem never count as independent. Unlike
    mean +- 1.96 se the interval stays inside [0, 1] and does not shrink to a point when every problem is right.
    """
    x = np.asarray(values, np.float64)
    p, mean = len(x), float(x.mean())
    z, effective = 1.959964, float(p)
    if p > 1:
        z = float(special.stdtrit(p - 1, 0.975))  # Student's quantile
        variance = float(x.var(ddof=1)) / p
        effective = max(mean * (1 - mean) / variance, float(p)) if variance > 1e-12 else effective
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(max(mean * (1 - mean), 0) / effective + z * z / (4 * effective**2))
    return {"value": mean, "low": max(0.0, min(centre - half, mean)), "high": min(1.0, max(centre + half, mean))}


def _votes(right: np.ndarray, answers: list[str], key: Callable[[str], Hashable]) -> list[tuple[int, float]]:
    """Classes by equivalence: all right answers form one class; empty answers form none."""
    wrong: dict[Hashable, int] = {}
    for ok, answer in zip(right, answers, strict=True):
        if ok <= 0.5 and answer.strip():
            wrong[key(answer)] = wrong.get(key(answer), 0) + 1
    rights = int((right > 0.5).sum())
    return [(rights, 1.0)] * (rights > 0) + [(count, 0.0) for count in wrong.values()]


def _strings(right: np.ndarray, answers: list[str]) -> list[tuple[int, float]]:
    """Classes of equal strings, as in the reference; the value of a class is the mean accuracy of its members."""
    groups: dict[str, list[float]] = {}
    for ok, answer in zip(right, answers, strict=True):
        groups.setdefault(answer, []).append(float(ok))
    return [(len(v), sum(v) / len(v)) for v in groups.values()]
