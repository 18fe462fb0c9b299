"""Numbers enter, the words and digits a page shows leave."""

import math
from collections.abc import Callable

from bench.intervals import Change, Interval, Mean

NONE = "–"


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent, thousands set apart: 0.00776, 6.41, 12,300."""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return minus(f"{round(value, decimals):,.{max(decimals, 0)}f}")


def minus(text: str) -> str:
    """A true minus sign, as wide as a plus."""
    return text.replace("-", "−")


def percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"


def points(share: float) -> str:
    """A difference of two shares, in percentage points with its sign."""
    return minus(f"{100 * share:+.2f}")


def seconds(value: float) -> str:
    return minus(f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} s")


def spread(low: float, high: float, form: Callable[[float], str]) -> str:
    """`15.4 to 15.9 s`; nothing where both ends read the same."""
    first, last = form(low), form(high)
    return "" if first == last else f"{first.removesuffix(' s')} to {last}"


def size(value: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:,.2f} GiB"


def millions(value: float) -> str:
    return f"{value / 1e6:,.0f} M"


def between(interval: Interval, form: Callable[[float], str]) -> str:
    return f"[{form(interval.low)},\N{NO-BREAK SPACE}{form(interval.high)}]"


def seeds_detail(mean: Mean) -> str:
    """The 95 % interval over seeds, in percent, or why there is none."""
    if mean.n == 1:
        return "one seed: no interval"
    if mean.interval is None:
        return f"{mean.n} equal seeds: no interval"
    # An accuracy lies in 0..1, whatever t says.
    return between(Interval(max(mean.interval.low, 0.0), min(mean.interval.high, 1.0)), lambda bound: f"{100 * bound:.2f}")


def over_seeds(mean: Mean) -> str:
    """Mean and standard deviation in percent, the unit left to the heading."""
    return f"{100 * mean.mean:.2f}" + (f" ± {100 * mean.deviation:.2f}" if mean.deviation is not None else "")


def factor(change: Change) -> str:
    return f"{change.ratio:.2f}×"


def factor_detail(change: Change) -> str:
    if change.interval is None:
        return f"{count(change.n, 'round')}: no interval"
    return between(change.interval, lambda bound: f"{bound:.2f}")


def verdict(change: Change) -> str:
    """What an interval shows, in words and not by colour alone."""
    if not change.shown:
        return "no difference shown"
    return "▲\N{NO-BREAK SPACE}faster" if change.ratio > 1 else "▼\N{NO-BREAK SPACE}slower"


def probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def count(number: int, noun: str) -> str:
    """1 seed, 2 seeds, 12,000 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def span(numbers: list[int]) -> str:
    """12, or 3 to 12."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
