"""The model-aware RL set: selects problems by the pass rates of the policy's own rollouts.

Pure functions over counts; launch.curate makes the rollouts. Source: arXiv 2510.11701, RECIPE.md 1.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from open_agentrl_jax.types import UserError

K = TypeVar("K", bound=Hashable)
EASY, HARD = 0.75, 0.25  # a pass rate of at least EASY is easy, of at most HARD is hard
CLASSES = ("unsolved", "hard", "medium", "easy", "solved")
KEPT = ("hard", "medium", "easy")  # a group that always or never passes has no advantage


@dataclasses.dataclass(frozen=True)
class PassRate:
    """Correct and graded rollouts of one problem; a rollout that could not be graded does not count as a try."""

    right: int
    tries: int

    def __post_init__(self):
        if not 0 <= self.right <= self.tries or not self.tries:
            raise ValueError(f"{self.right} right of {self.tries} tries is no pass rate")

    @property
    def rate(self) -> float:
        """right / tries."""
        return self.right / self.tries


def classify(rate: PassRate) -> str:
    """One of CLASSES: never solved, hard (<= 0.25), medium, easy (>= 0.75), always solved."""
    if rate.right in (0, rate.tries):
        return "solved" if rate.right else "unsolved"
    return "hard" if rate.rate <= HARD else "easy" if rate.rate >= EASY else "medium"


def decided(right: int, wrong: int, tries: int) -> bool:
    """Whether the remaining rollouts of a problem cannot change its class, after `right` and `wrong` of `tries`.

    True once every possible outcome of the remaining rollouts gives the same class.
    """
    left = tries - right - wrong
    return len({classify(PassRate(right + more, tries)) for more in range(left + 1)}) == 1


def undecided(right: int, wrong: int, tries: int) -> int:
    """The least number of further rollouts that may decide a problem, which can run concurrently; 0 if decided."""
    left = tries - right - wrong
    ends = (m for m in range(left) if any(decided(right + good, wrong + m - good, tries) for good in range(m + 1)))
    return next(ends, left)


def histogram(rates: Sequence[PassRate], bins: int = 4) -> list[int]:
    """Counts [bins + 2] of problems by pass rate: exactly 0, bins of equal width over (0, 1), exactly 1."""
    counts = [0] * (bins + 2)
    for r in rates:
        counts[bin_of(r, bins)] += 1
    return counts


def bin_of(rate: PassRate, bins: int = 4) -> int:
    """The index of a rate in `histogram`: bin i contains ((i - 1) / bins, i / bins]. Exact integer arithmetic."""
    return bins + 1 if rate.right == rate.tries else -(-rate.right * bins // rate.tries)


def resample(
    rates: Sequence[PassRate],
    target: Mapping[Any, float] | None = None,
    *,
    by: Callable[[PassRate], Hashable] = classify,
    size: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Selects distinct problems whose difficulties follow a target distribution.

    Args:
        rates: the pass rate of each problem.
        target: relative weight of each difficulty; None: equal weights for those that occur.
        by: maps a pass rate to a difficulty: `classify` (hard, medium, easy) or `bin_of`.
        size: number of problems; None: as many as the scarcest class allows. If a class has too few, the others
            replace them in proportion.
        seed: determines the choice within a class.

    Returns:
        Ascending indices of the selected problems, never of those with pass rate 0 or 1.

    Raises:
        UserError: the target names an unknown class or is not positive, or no problem is left.
    """
    pools: dict[Hashable, list[int]] = {}
    for i, rate in enumerate(rates):
        if 0 < rate.right < rate.tries:
            pools.setdefault(by(rate), []).append(i)
    shares = dict.fromkeys(sorted(pools, key=str), 1.0) if target is None else dict(target)
    if target is not None:
        unknown = [name for name in shares if by is classify and name not in KEPT]
        if unknown or min(shares.values(), default=0) < 0 or sum(shares.values()) <= 0:
            raise UserError(f"target histogram {shares} must give {', '.join(KEPT)} shares >= 0 with a positive sum")
    shares = {name: share for name, share in shares.items() if share and name in pools}
    if not shares:
        raise UserError("no problem has a pass rate between 0 and 1; use easier or harder problems, or more rollouts")
    available = {name: len(pools[name]) for name in shares}
    if size is None:
        size = int(min(available[name] * sum(shares.values()) / share for name, share in shares.items()) + 1e-9)
    chosen = []
    for name, count in quotas(shares, available, size).items():
        chosen += random.Random(f"{seed} {name}").sample(pools[name], count)
    return sorted(chosen)


def quotas(shares: Mapping[K, float], available: Mapping[K, int], size: int) -> dict[K, int]:
    """The number per class: proportional, at most the available ones; other classes fill what a class lacks."""
    quota = dict.fromkeys(shares, 0)
    for _ in range(min(size, sum(available.values()))):
        behind = [name for name in shares if quota[name] < available[name]]
        quota[min(behind, key=lambda name: (quota[name] + 1) / shares[name])] += 1
    return quota


def report(before: Sequence[PassRate], after: Sequence[PassRate]) -> list[dict[str, Any]]:
    """One row per class with counts before and after."""
    counts = [{name: sum(classify(r) == name for r in rates) for name in CLASSES} for rates in (before, after)]
    return [{"class": name, "before": counts[0][name], "after": counts[1][name]} for name in CLASSES]
