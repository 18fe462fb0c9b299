"""Functions enter; interleaved timings with median, spread and the bootstrap interval of their ratio leave.

Machines are shared and clocks wander, so peers run in one process, in turns, in an order that is drawn anew each round; a
ratio is taken within each round, and its interval is a bootstrap over rounds.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one peer is as another: median over rounds, with a 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Timings:
    """Seconds of each peer in each round, and what was raised by those that are dropped."""

    seconds: dict[str, list[float]]
    errors: dict[str, Exception] = field(default_factory=dict)

    def rate(self, name: str, units: int) -> dict[str, Any]:
        """Units per second of a call that handles `units`: median, and the 10th and 90th percentile over rounds."""
        rates = [units / seconds for seconds in self.seconds[name]]
        low, high = np.percentile(rates, [10, 90])
        return {"median": median(rates), "p10": float(low), "p90": float(high), "rounds": len(rates)}

    def speedup(self, faster: str, slower: str) -> Ratio:
        """Time of `slower` over time of `faster`, round by round."""
        return bootstrap_ratio(self.seconds[slower], self.seconds[faster])


def interleaved(
    peers: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 1, seed: int = 0, drop: bool = False
) -> Timings:
    """Call every peer once a round, `rounds` times, in an order drawn anew each round, after `warmup` untimed rounds.

    Peers must be finished when they return (a GPU's work synchronised). drop: a peer that raises has no further turns and no
    seconds, only its error, and the others go on in the order they would have had; else the exception is the caller's.
    """
    errors: dict[str, Exception] = {}
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    order, shuffle = list(peers), random.Random(seed)
    for number in range(warmup + rounds):
        shuffle.shuffle(order)
        for name in order:
            if name in errors:
                continue
            started = time.perf_counter()
            try:
                peers[name]()
            except Exception as error:
                if not drop:
                    raise
                errors[name] = error
                del seconds[name]
                continue
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return Timings(seconds, errors)


def bootstrap_ratio(numerator: list[float], denominator: list[float], *, samples: int = 2000, seed: int = 0) -> Ratio:
    """Median of paired ratios with a 95 % percentile bootstrap interval."""
    ratios = np.array(numerator) / np.array(denominator)
    picks = np.random.default_rng(seed).integers(len(ratios), size=(samples, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; the CPU is done when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()
