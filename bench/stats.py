"""Intervals and tests for few repetitions: no figure here claims more than the number of repetitions allows.

Where the repetitions allow no interval, `low` and `high` are None. All intervals are 95 %.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# Neighbouring rounds share what the machine was doing, so rounds are averaged in at most so many blocks, which share little.
# In simulations t over blocks covers 95 % of independent rounds (from 2 on) and 91 to 95 % of 20 to 40 rounds with an
# autocorrelation of 0.3 to 0.5, where t over single rounds covers 74 to 87 %.
BLOCKS = 5
EQUAL = 1e-9  # a spread this small against the values is rounding of equal ones: nothing can be estimated from it


@dataclass(frozen=True)
class Estimate:
    """A figure estimated from n repetitions, with its interval."""

    estimate: float
    low: float | None
    high: float | None
    n: int
    p: float | None = None  # two-sided, of no difference; of comparisons only
    deviation: float | None = None  # of the repetitions, with n - 1; of means only

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high), or None where the repetitions allow none."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def through(self, function: Callable[[float], float]) -> "Estimate":
        """The same figure in another unit, by a function that only rises or only falls."""
        low, high = sorted(map(function, self.interval)) if self.interval else (None, None)
        return Estimate(function(self.estimate), low, high, self.n)

    def excludes(self, value: float) -> bool:
        """Whether the interval shows that the figure is another than `value`; without an interval it shows nothing."""
        return self.interval is not None and not self.interval[0] <= value <= self.interval[1]

    def apart(self, other: "Estimate") -> bool:
        """Whether both have intervals and those do not overlap."""
        if self.interval is None or other.interval is None:
            return False
        return self.interval[0] > other.interval[1] or other.interval[0] > self.interval[1]


@dataclass(frozen=True)
class Ratio(Estimate):
    """How many times as large one figure is as another: geometric mean of the ratios."""

    def __str__(self) -> str:
        return f"{self.estimate:.2f}x" + ("" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]")


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """a over b, measured in the same rounds: t interval of the logarithm over blocks of rounds.

    Raises ValueError when there is no round, or their numbers differ.
    """
    logs = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    return _exponential(mean(_block_means(logs)), fmean(logs), len(logs))


def ratio_apart(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """a over b, measured at different times: Welch's interval of the difference of logarithms over blocks."""
    logs, others = ([math.log(value) for value in side] for side in (a, b))
    blocks = difference(_block_means(logs), _block_means(others))
    return _exponential(blocks, fmean(logs) - fmean(others), min(len(logs), len(others)))


def rate(values: Sequence[float]) -> Estimate:
    """The geometric mean of rates measured in a row, with its interval over blocks."""
    logs = [math.log(value) for value in values]
    return _exponential(mean(_block_means(logs)), fmean(logs), len(logs))


def mean(values: Sequence[float]) -> Estimate:
    """Mean +- t deviation / sqrt(n)."""
    n, centre = len(values), fmean(values)
    deviation = stdev(values) if n > 1 else None
    if deviation is None or _equal(deviation, values):
        return Estimate(centre, None, None, n, deviation=deviation)
    low, high = stats.t.interval(CONFIDENCE, n - 1, centre, deviation / math.sqrt(n))
    return Estimate(centre, float(low), float(high), n, deviation=deviation)


def mean_share(shares: Sequence[float]) -> Estimate:
    """The mean of shares 0..1 such as accuracies, with an interval that stays in 0..1 whatever t says."""
    value = mean(shares)
    return replace(value, low=max(value.interval[0], 0.0), high=min(value.interval[1], 1.0)) if value.interval else value


def paired(treated: Sequence[float], control: Sequence[float]) -> Estimate:
    """Mean of treated - control, pair by pair, with the paired t test's interval and p value; ValueError without pairs."""
    differences = [a - b for a, b in zip(treated, control, strict=True)]
    if not differences:
        raise ValueError("a paired comparison needs at least one pair, got none")
    if len(differences) < 2 or _equal(stdev(differences), [*treated, *control]):
        return Estimate(fmean(differences), None, None, len(differences))
    return _tested(stats.ttest_rel(treated, control), fmean(differences), len(differences))


def difference(treated: Sequence[float], control: Sequence[float]) -> Estimate:
    """Difference of two independent means, with Welch's interval and p value."""
    n, centre = min(len(treated), len(control)), fmean(treated) - fmean(control)
    if n < 2 or _equal(max(stdev(treated), stdev(control)), [*treated, *control]):
        return Estimate(centre, None, None, n)
    return _tested(stats.ttest_ind(treated, control, equal_var=False), centre, n)


def proportion(hits: int, n: int) -> Estimate:
    """A share of n independent trials, such as an accuracy on n images, with Wilson's binomial interval."""
    interval = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(hits / n, float(interval.low), float(interval.high), n)


def proportion_difference(a: Estimate, b: Estimate) -> Estimate:
    """The difference of two proportions, a - b, with Newcombe's interval, made of Wilson's two."""
    assert a.interval
    assert b.interval
    centre = a.estimate - b.estimate
    below = math.hypot(a.estimate - a.interval[0], b.interval[1] - b.estimate)
    above = math.hypot(a.interval[1] - a.estimate, b.estimate - b.interval[0])
    return Estimate(centre, centre - below, centre + above, min(a.n, b.n))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: the chance that any of several comparisons claims a difference by accident stays at the level.

    The k-th smallest of m is multiplied by m - k + 1 (k from 1), and none may be smaller than the one before it.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = corrected[place] = max(largest, min(1.0, p * (len(order) - rank)))
    return corrected


def pareto_front(points: Sequence[tuple[Estimate, Estimate]]) -> list[int]:
    """Places of the points that nothing beats in both figures, larger being better; empty where intervals leave that open.

    A point is beaten by one whose two intervals lie wholly above its own. The front is empty unless all pairs of the others
    have intervals apart in both figures: otherwise their order could be chance.
    """

    def above(one: Estimate, other: Estimate) -> bool:
        return one.apart(other) and one.estimate > other.estimate

    best = [i for i, (x, y) in enumerate(points) if not any(above(a, x) and above(b, y) for a, b in points)]
    pairs = [(points[i], points[j]) for i in best for j in best if i < j]
    return best if all(a[0].apart(b[0]) and a[1].apart(b[1]) for a, b in pairs) else []


def _block_means(values: Sequence[float]) -> list[float]:
    return [float(block.mean()) for block in np.array_split(np.array(values), min(BLOCKS, len(values)))] if values else []


def _exponential(blocks: Estimate, centre: float, n: int) -> Ratio:
    """The ratio by all n repetitions, `centre`, with the interval by their blocks, which need not be of equal sizes."""
    low, high = (None if bound is None else math.exp(bound - blocks.estimate + centre) for bound in (blocks.low, blocks.high))
    return Ratio(math.exp(centre), low, high, n, blocks.p)


def _tested(test: object, centre: float, n: int) -> Estimate:
    low, high = test.confidence_interval(CONFIDENCE)  # type: ignore[attr-defined]  # SciPy is untyped
    return Estimate(centre, float(low), float(high), n, p=float(test.pvalue))  # type: ignore[attr-defined]


def _equal(deviation: float, values: Sequence[float]) -> bool:
    return deviation <= EQUAL * max(abs(value) for value in values)
