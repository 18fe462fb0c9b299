"""What changes in the course of a training besides the learning rate: the size of its images, and which parameters are trained.

Epochs are the schedule's, stretched like it and then rounded to whole epochs of the run.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

from fastcifar.beton import SIDE
from fastcifar.errors import require

SMALLEST, LARGEST = 16, 48  # pixels: what every architecture takes
MOST = 6  # sizes: each has a step of its own, compiled and recorded


@dataclass(frozen=True)
class Phase:
    """What holds for whole epochs, and for which a step is compiled and recorded anew."""

    size: int = SIDE  # of an image's side, in pixels


PLAIN = Phase()


@dataclass(frozen=True)
class Phases:
    """What a recipe changes by epochs."""

    # sides of the training images in pixels, one size after another, 16..48; (): as they are, and as evaluation sees them
    sizes: tuple[int, ...] = ()
    size_epochs: tuple[float, ...] = ()  # epochs of schedule_epochs at which the second of `sizes` begins, the third, ...

    def __post_init__(self) -> None:
        require(self, all(SMALLEST <= size <= LARGEST for size in self.sizes), "sizes", f"{SMALLEST}..{LARGEST} pixels each")
        require(self, len(self.sizes) <= MOST, "sizes", f"at most {MOST}")
        starts = self.size_epochs
        require(self, len(starts) == max(0, len(self.sizes) - 1), "size_epochs", f"one fewer than sizes ({len(self.sizes)})")
        require(self, all(0 < start < math.inf for start in starts), "size_epochs", "above 0")
        require(self, list(starts) == sorted(set(starts)), "size_epochs", "in rising order")

    def at(self, epoch: int, stretch: float) -> Phase:
        """The phase of epoch `epoch` (from 0) of a run `stretch` times as long as its schedule."""
        starts = [_whole(start * stretch) for start in self.size_epochs]
        return Phase(self.sizes[bisect_right(starts, epoch)] if self.sizes else SIDE)


def _whole(epochs: float) -> int:
    """Rounded; a half upwards."""
    return math.floor(epochs + 0.5)
