"""How many times as fast one loop is as another, with an interval that holds for few rounds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """A ratio of rates or times with its 95 % interval."""

    estimate: float  # geometric mean over the rounds
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """`a` over `b`, paired by round: Student's t interval on the logarithms. Raises ValueError for fewer than two rounds."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a ratio needs two or more rounds of both, got {len(a)} and {len(b)}")
    logs = np.log(np.asarray(a, dtype=float) / np.asarray(b, dtype=float))
    margin = _t_quantile(len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    return Ratio(*(float(np.exp(logs.mean() + side * margin)) for side in (0, -1, 1)))


def _t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Student's t quantile; without SciPy by its density in the angle, t = sqrt(freedom) tan(angle)."""
    try:
        from scipy import stats  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        angles = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
        cumulated = np.cumsum(np.cos(angles) ** (freedom - 1))
        return float(np.sqrt(freedom) * np.tan(np.interp(probability, cumulated / cumulated[-1], angles)))
    return float(stats.t.ppf(probability, freedom))
