"""Repeated measurements enter; means, intervals and tests that say how much they show leave.

Nothing here claims more than the number of repetitions allows: where there is no interval the field is None, and whoever
prints it says so. The t distribution is computed here because the GPU machines have no SciPy. (The file is not named
statistics.py: that would hide Python's own module from the scripts in this folder.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import NamedTuple

import numpy as np

from bench.timing import bootstrap_ratio

CONFIDENCE = 0.95
# The median lies outside the range of n samples with probability 2^(1-n): below 6 no 95 % interval of a median exists.
MIN_ROUNDS = 6
# A spread this small against the values is rounding of equal values, from which no spread can be estimated.
NO_SPREAD = 1e-9


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return value < self.low or value > self.high


@dataclass(frozen=True)
class Mean:
    """Mean of n repetitions; standard deviation and t interval from two on, if they differ at all."""

    n: int
    mean: float
    deviation: float | None  # with n - 1
    interval: Interval | None


@dataclass(frozen=True)
class Median:
    """Median of n repetitions with their 10th and 90th percentile, and a bootstrap interval of the median from six on."""

    n: int
    median: float
    p10: float
    p90: float
    interval: Interval | None


@dataclass(frozen=True)
class Difference:
    """A mean difference with its t interval and two-sided p value; both None where n allows none."""

    n: int  # pairs, or the smaller of the two groups
    mean: float
    interval: Interval | None
    p: float | None


@dataclass(frozen=True)
class Change:
    """How many times as large one rate is as another; no interval where there are too few repetitions for one."""

    n: int
    ratio: float
    interval: Interval | None

    @property
    def shown(self) -> bool:
        """Whether the interval excludes "no change"."""
        return self.interval is not None and self.interval.excludes(1.0)


def describe_mean(values: Sequence[float]) -> Mean:
    """Mean, standard deviation (n - 1) and t interval: mean +- t(0.975, n - 1) deviation / sqrt(n)."""
    mean = fmean(values)
    if len(values) < 2:
        return Mean(len(values), mean, None, None)
    deviation = stdev(values)
    if _no_spread(deviation, values):
        return Mean(len(values), mean, 0.0, None)
    return Mean(len(values), mean, deviation, _around(mean, deviation / math.sqrt(len(values)), len(values) - 1))


def describe_median(values: Sequence[float], *, samples: int = 2000, seed: int = 0) -> Median:
    """Median, percentiles, and from `MIN_ROUNDS` on a percentile bootstrap interval."""
    p10, p90 = (float(bound) for bound in np.percentile(values, [10, 90]))
    interval = None
    if len(values) >= MIN_ROUNDS:
        picks = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
        interval = Interval(*(float(b) for b in np.percentile(np.median(np.array(values)[picks], axis=1), [2.5, 97.5])))
    return Median(len(values), median(values), p10, p90, interval)


def paired(treated: Sequence[float], control: Sequence[float]) -> Difference:
    """Paired t test of treated - control, repetition by repetition. Raises ValueError when there are no pairs."""
    differences = [a - b for a, b in zip(treated, control, strict=True)]
    if not differences:
        raise ValueError("a paired comparison needs at least one pair, got none")
    n, mean = len(differences), fmean(differences)
    deviation = stdev(differences) if n > 1 else 0.0
    if n < 2 or _no_spread(deviation, [*treated, *control]):
        return Difference(n, mean, None, None)
    error = deviation / math.sqrt(n)
    return Difference(n, mean, _around(mean, error, n - 1), two_sided_p(mean / error, n - 1))


def welch(treated: Sequence[float], control: Sequence[float]) -> Difference:
    """Welch's t test of two independent groups with unequal variances (degrees of freedom by Welch and Satterthwaite)."""
    n, mean = min(len(treated), len(control)), fmean(treated) - fmean(control)
    if n < 2:
        return Difference(n, mean, None, None)
    parts = [stdev(group) ** 2 / len(group) for group in (treated, control)]
    error = math.sqrt(sum(parts))
    if _no_spread(error, [*treated, *control]):
        return Difference(n, mean, None, None)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, (treated, control), strict=True))
    return Difference(n, mean, _around(mean, error, freedom), two_sided_p(mean / error, freedom))


def change_in_turns(treated: Sequence[float], control: Sequence[float]) -> Change:
    """Ratio of two rates measured in the same rounds: median of the rounds' ratios with its bootstrap interval."""
    ratio = bootstrap_ratio(list(treated), list(control))
    enough = len(treated) >= MIN_ROUNDS
    return Change(len(treated), ratio.median, Interval(ratio.low, ratio.high) if enough else None)


def change_apart(treated: Sequence[float], control: Sequence[float]) -> Change:
    """Ratio of two rates measured at different times: of geometric means, with Welch's interval of the logarithms."""
    difference = welch([math.log(rate) for rate in treated], [math.log(rate) for rate in control])
    interval = difference.interval and Interval(math.exp(difference.interval.low), math.exp(difference.interval.high))
    return Change(difference.n, math.exp(difference.mean), interval)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: the chance that any of several comparisons claims a difference by accident stays at the level.

    The k-th smallest of m is multiplied by m - k + 1 (k from 1), and none may be smaller than the one before it.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[place] = largest
    return corrected


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other point beats in one coordinate without losing in the other; larger is better."""
    return [
        place
        for place, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    ]  # fmt: skip


def two_sided_p(t: float, freedom: float) -> float:
    """P(|T| >= |t|) for Student's T: I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t^2)."""
    if t * t < freedom:  # from the other end, where x does not round to 1
        return 1 - incomplete_beta(0.5, freedom / 2, t * t / (freedom + t * t))
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def t_quantile(confidence: float, freedom: float) -> float:
    """The t with P(|T| <= t) = confidence, by bisection: the probability falls steadily in t."""
    low, high = 0.0, 1.0
    while two_sided_p(high, freedom) > 1 - confidence:
        high *= 2
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, freedom) > 1 - confidence else (low, middle)
    return high


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by Lentz's continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, the other end's converges fast
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d, fraction = 1.0, 1 / (1 - (a + b) * x / (a + 1)), 1 / (1 - (a + b) * x / (a + 1))
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for numerator in (even, odd):
            d, c = 1 / (1 + numerator * d), 1 + numerator / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            return front * fraction
    raise ArithmeticError(f"the incomplete beta function did not converge at a={a}, b={b}, x={x}")


def _around(mean: float, error: float, freedom: float) -> Interval:
    reach = t_quantile(CONFIDENCE, freedom) * error
    return Interval(mean - reach, mean + reach)


def _no_spread(deviation: float, values: Sequence[float]) -> bool:
    return deviation <= NO_SPREAD * max(abs(value) for value in values)
