"""Figures of variants enter; where every point, line, tick and label of the charts stands, in pixels, leaves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from bench.figures import EPOCH_IMAGES, Figures, elapsed
from bench.intervals import pareto_front
from bench.view.labels import place_labels
from bench.view.model import Curves, Frame, Mark, Panel, Scatter, Tick
from bench.view.wording import count, percent, significant

WIDE, NARROW = (1000, 460), (358, 400)  # pixels: a desktop's page and a phone's
PANEL = (190, 140)
LONGEST = 40  # characters of a label that fit on a phone

Axis = Callable[[float], float]  # a value to its place in pixels


def scatter(rows: list[Figures], size: tuple[int, int]) -> Scatter:
    """Epochs per second (logarithmic) against final top-1; bars: lowest to highest seed, 10th to 90th percentile of epochs."""
    tops = [[100 * cell.final_top1 for cell in row.cells] for row in rows]
    rates = [row.images_per_second for row in rows]
    x_range = _logarithmic_range([rate.p10 / EPOCH_IMAGES for rate in rates] + [rate.p90 / EPOCH_IMAGES for rate in rates])
    y_range = _linear_range([top for seeds in tops for top in seeds], 0.12, 100.0)
    frame, x, y = _frame(size, x_range, y_range, log=True, left=46, top=26, bottom=44)
    front = pareto_front([(row.epochs_per_second, row.final.mean) for row in rows])
    marks = [
        Mark(
            label=row.label if len(row.label) <= LONGEST else row.label[: LONGEST - 1] + "…",
            title=f"{row.label}: {significant(row.epochs_per_second)} epochs/s, {percent(row.final.mean)} "
            f"({count(row.final.n, 'seed')})",
            x=x(row.epochs_per_second), y=y(100 * row.final.mean),
            x_low=x(rate.p10 / EPOCH_IMAGES), x_high=x(rate.p90 / EPOCH_IMAGES),
            y_low=y(min(seeds)), y_high=y(max(seeds)), front=place in front,
        )
        for place, (row, rate, seeds) in enumerate(zip(rows, rates, tops, strict=True))
    ]  # fmt: skip
    steps = _staircase([marks[place] for place in front], frame)
    return Scatter(frame, place_labels(marks, frame, steps), _path(steps))


def _staircase(front: list[Mark], frame: Frame) -> list[tuple[float, float]]:
    """Corners of the border of what some variant offers: at least so fast and at least so accurate."""
    front = sorted(front, key=lambda mark: (mark.x, mark.y))
    corners = [(frame.left, front[0].y)]
    for mark, after in zip(front, [*front[1:], None], strict=True):
        corners += [(mark.x, mark.y), (mark.x, after.y if after else frame.bottom)]
    return corners


def learning_curves(rows: list[Figures]) -> list[Curves]:
    """Test accuracy against epochs and, on a logarithmic axis, against training seconds."""
    by_epoch = [_curve(row, lambda cell_times, epoch: float(epoch + 1)) for row in rows]
    by_seconds = [_curve(row, lambda cell_times, epoch: fmean(times[epoch] for times in cell_times)) for row in rows]
    kinds = [
        ("curves-epochs", "Against epochs", "epochs", by_epoch, False),
        ("curves-seconds", "Against training time", "seconds, logarithmic", by_seconds, True),
    ]
    return [_curves(rows, *kind) for kind in kinds]


Curve = list[tuple[float, float, float, float]]  # x, mean, lowest and highest accuracy in percent


def _curve(row: Figures, x_of: Callable[[list[list[float]], int], float]) -> Curve:
    times = [elapsed(cell) for cell in row.cells]
    points = []
    for epoch in range(min(len(cell.epochs) for cell in row.cells)):
        tops = [100 * cell.epochs[epoch].test_top1 for cell in row.cells]
        points.append((x_of(times, epoch), fmean(tops), min(tops), max(tops)))
    return points


def _curves(rows: list[Figures], anchor: str, title: str, x_title: str, curves: list[Curve], log: bool) -> Curves:
    xs = [x for curve in curves for x, *_ in curve]
    x_range = _logarithmic_range(xs) if log else (0.0, max(xs))
    y_range = _linear_range([top for curve in curves for _, _, *ends in curve for top in ends], 0.05, 100.0)
    frame, x, y = _frame(PANEL, x_range, y_range, log=log, left=30, top=8, bottom=22)
    lines = [_path([(x(at), y(mean)) for at, mean, _, _ in curve]) for curve in curves]
    panels = []
    for row, curve, line in zip(rows, curves, lines, strict=True):
        band = ""
        if len(row.cells) > 1:
            upper, lower = [(x(at), y(high)) for at, _, _, high in curve], [(x(at), y(low)) for at, _, low, _ in curve]
            band = _path([*upper, *reversed(lower)]) + "Z"
        panels.append(Panel(row.label, f"{percent(row.final.mean, 1)}, {count(row.final.n, 'seed')}", line, band))
    return Curves(anchor, title, x_title, frame, panels, "".join(lines))


def _path(points: list[tuple[float, float]]) -> str:
    steps = " ".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f"M{steps}" + ("h.1" if len(points) == 1 else "")  # one epoch: a dot, by the line's round cap


def _frame(
    size: tuple[int, int],
    xs: tuple[float, float],
    ys: tuple[float, float],
    *,
    log: bool,
    left: float,
    top: float,
    bottom: float,
) -> tuple[Frame, Axis, Axis]:
    """The plotting area with its ticks, and the two axes as functions from values to pixels."""
    width, height = size
    frame = Frame(width, height, left, top, width - 16.0, height - bottom, [], [])
    scale = math.log if log else float

    def x(value: float) -> float:
        share = (scale(value) - scale(xs[0])) / (scale(xs[1]) - scale(xs[0]))
        return frame.left + share * (frame.right - frame.left)

    def y(value: float) -> float:
        return frame.bottom - (value - ys[0]) / (ys[1] - ys[0]) * (frame.bottom - frame.top)

    most = max(4, int((frame.right - frame.left) / 62))
    x_values = logarithmic_ticks(*xs, most) if log else linear_ticks(*xs, most)
    y_values = linear_ticks(*ys, max(4, int((frame.bottom - frame.top) / 45)))
    x_ticks = [Tick(x(value), tick_text(value)) for value in x_values]
    y_ticks = [Tick(y(value), tick_text(value)) for value in y_values]
    return replace(frame, x_ticks=x_ticks, y_ticks=y_ticks), x, y


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers from low to high, at the smallest step of 1, 2 or 5 times a power of ten that allows it."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (s * power for s in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [number * step for number in range(first, last + 1)]


def logarithmic_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, evenly spread as a logarithm: the finest of several rows that keeps to `most`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    candidates = [
        [d * 10.0**power for power in powers for d in digits if low <= d * 10.0**power <= high]
        for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
    ]
    if len(candidates[0]) < 2:  # a range so narrow that a logarithm is nearly straight
        return linear_ticks(low, high, most)
    fitting = [ticks for ticks in candidates if 2 <= len(ticks) <= most]
    return fitting[0] if fitting else candidates[0][:: len(candidates[0]) // most + 1]


def tick_text(value: float) -> str:
    """As short as the number allows: 0.005, 0.01, 60, 1,000, 30k."""
    scaled, unit = (value / 1000, "k") if value >= 10_000 else (value, "")
    return f"{scaled:,.10f}".rstrip("0").rstrip(".") + unit


def _logarithmic_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max((high / low) ** 0.06, 1.03)
    return low / room, high * room


def _linear_range(values: Sequence[float], room: float, limit: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = max(room * (high - low), 0.5)
    return max(low - pad, 0.0), min(high + pad, limit)
