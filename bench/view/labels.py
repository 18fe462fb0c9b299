"""Points of a chart enter; the same points with places for their labels, so that none overlaps another, leave."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from bench.view.model import Frame, Mark

CHARACTER, LINE = 6.9, 14.0  # pixels a label takes at 12 px: width of a character, height; generous
REACHES = (9.0, 20.0, 34.0, 52.0, 74.0)  # pixels from the point; from the second on a line leads to the label
ROUNDS = 4  # of moving each label to where the others leave it the most room


class Box(NamedTuple):
    """A rectangle in pixels, top less than bottom."""

    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: "Box") -> float:
        """Area common to both."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


def place_labels(marks: list[Mark], frame: Frame, line: Sequence[tuple[float, float]] = ()) -> list[Mark]:
    """Give every mark the label's place that covers least: other labels, then points, bars and `line`, then distance."""
    fixed = [box for mark in marks for box in (_point(mark), *_bars(mark))]
    fixed += [_around(start, end) for start, end in pairwise(line)]
    placed = list(marks)
    boxes: list[Box | None] = [None] * len(marks)
    for _ in range(ROUNDS):
        for place, mark in enumerate(marks):
            others = [box for other, box in enumerate(boxes) if box is not None and other != place]
            points = [(other.x, other.y) for other in marks if other is not mark]
            best = min(_candidates(mark, frame), key=lambda candidate: _cost(candidate, others, fixed, points))
            placed[place], boxes[place] = best[0], label_box(best[0])
    return placed


def label_box(mark: Mark) -> Box:
    """The rectangle its label fills."""
    width = CHARACTER * len(mark.label)
    left = mark.label_x - {"start": 0.0, "middle": width / 2, "end": width}[mark.anchor]
    return Box(left, mark.label_y - LINE + 3, left + width, mark.label_y + 3)


def _cost(candidate: tuple[Mark, float], labels: list[Box], fixed: list[Box], points: list[tuple[float, float]]) -> float:
    mark, distance = candidate
    box = label_box(mark)
    crossed = sum(_distance(mark, point) < 8 for point in points)  # pixels: a line past another point seems to name it
    covered = 100 * sum(box.shared(other) for other in labels) + 10 * sum(box.shared(other) for other in fixed)
    return covered + 100 * crossed + distance


def _distance(mark: Mark, point: tuple[float, float]) -> float:
    """From a point to the line that leads from a mark to its label; far when there is none."""
    if mark.leader is None:
        return math.inf
    along = (mark.leader[0] - mark.x, mark.leader[1] - mark.y)
    share = ((point[0] - mark.x) * along[0] + (point[1] - mark.y) * along[1]) / (along[0] ** 2 + along[1] ** 2)
    share = min(max(share, 0.0), 1.0)
    return math.hypot(mark.x + share * along[0] - point[0], mark.y + share * along[1] - point[1])


def _candidates(mark: Mark, frame: Frame) -> Iterator[tuple[Mark, float]]:
    """The label at twelve sides and several distances, within the frame, with what each place costs by itself."""
    found = False
    for reach in REACHES:
        for side, angle in enumerate((0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200)):
            x = mark.x + reach * math.cos(math.radians(angle))
            y = mark.y - reach * math.sin(math.radians(angle))
            anchor = "middle" if angle in (90, 270) else "start" if math.cos(math.radians(angle)) > 0 else "end"
            baseline = y + 4 - (4 if angle == 90 else 0) + (5 if angle == 270 else 0)
            leader = (x, y) if reach > REACHES[0] else None
            candidate = replace(mark, label_x=x, label_y=baseline, anchor=anchor, leader=leader)
            box = label_box(candidate)
            if box.left >= 2 and box.right <= frame.width - 2 and box.top >= 2 and box.bottom <= frame.bottom - 2:
                found = True
                yield candidate, reach + 0.5 * side
    if not found:  # a label longer than the chart: from the left edge
        yield replace(mark, label_x=2.0, label_y=max(mark.y - 9, LINE), anchor="start"), 0.0


def _point(mark: Mark) -> Box:
    return Box(mark.x - 6, mark.y - 6, mark.x + 6, mark.y + 6)


def _bars(mark: Mark) -> list[Box]:
    return [
        Box(mark.x_low, mark.y - 1, mark.x_high, mark.y + 1),
        Box(mark.x - 1, mark.y_high, mark.x + 1, mark.y_low),
    ]


def _around(start: tuple[float, float], end: tuple[float, float]) -> Box:
    (x, y), (a, b) = start, end
    return Box(min(x, a) - 1, min(y, b) - 1, max(x, a) + 1, max(y, b) + 1)
