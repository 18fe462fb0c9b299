"""What changes in the course of a training besides the learning rate: the size of its images, and which parameters are trained.

Epochs are the schedule's, stretched like it and then rounded to whole epochs of the run.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from fastcifar.beton import SIDE, Size
from fastcifar.errors import InputError, require, unknown

SMALLEST, LARGEST = 16, 48  # pixels: what every architecture takes
MOST = 6  # sizes: each has a step of its own, compiled and recorded


@dataclass(frozen=True)
class Phase:
    """What holds for whole epochs, and for which a step is compiled and recorded anew."""

    size: int = SIDE  # of a CIFAR image's side, in pixels; other images have the same share of theirs
    frozen: bool = False  # whether the parameters that the recipe freezes are

    def of(self, whole: Size) -> Size:
        """The height and width to which images of `whole` are brought, a half upwards."""
        height, width = ((2 * side * self.size + SIDE) // (2 * SIDE) for side in whole)
        return height, width


PLAIN = Phase()


@dataclass(frozen=True)
class Phases:
    """What a recipe changes by epochs."""

    # sides of the training images in pixels where the data's have 32, else the same shares of theirs: one size after another,
    # 16..48; (): as they are, and as evaluation sees them
    sizes: tuple[int, ...] = ()
    size_epochs: tuple[float, ...] = ()  # epochs of schedule_epochs at which the second of `sizes` begins, the third, ...
    # parameters not trained from frozen_from on: names, or patterns such as 'stem.*'; no gradient is computed for them then
    frozen: tuple[str, ...] = ()
    frozen_from: float = 0.0  # epoch of schedule_epochs from which they are not, 0: they never are

    def __post_init__(self) -> None:
        require(self, all(SMALLEST <= size <= LARGEST for size in self.sizes), "sizes", f"{SMALLEST}..{LARGEST} pixels each")
        require(self, len(self.sizes) <= MOST, "sizes", f"at most {MOST}")
        starts = self.size_epochs
        require(self, len(starts) == max(0, len(self.sizes) - 1), "size_epochs", f"one fewer than sizes ({len(self.sizes)})")
        require(self, all(0 < start < math.inf for start in starts), "size_epochs", "above 0")
        require(self, list(starts) == sorted(set(starts)), "size_epochs", "in rising order")
        require(self, 0 <= self.frozen_from < math.inf, "frozen_from", "0 or more")

    def smallest(self, whole: Size) -> Size:
        """The height and width of the smallest training images, where the data's are `whole`."""
        return Phase(min(self.sizes, default=SIDE)).of(whole)

    def at(self, epoch: int, stretch: float) -> Phase:
        """The phase of epoch `epoch` (from 0) of a run `stretch` times as long as its schedule."""
        starts = [_whole(start * stretch) for start in self.size_epochs]
        size = self.sizes[bisect_right(starts, epoch)] if self.sizes else SIDE
        return Phase(size, bool(self.frozen) and epoch >= _whole(self.frozen_from * stretch))


def freezable(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Parameter]:
    """The trained parameters that the names or patterns mean. Raises InputError where one means none, or all are meant."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    meant = {pattern: [name for name in trained if fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, names in meant.items():
        if not names:
            raise unknown("parameter in frozen", pattern, trained)
    chosen = set().union(*meant.values())
    if len(chosen) == len(trained):
        raise InputError(f"frozen must leave a parameter to train, got {', '.join(patterns)}")
    return [parameter for name, parameter in trained.items() if name in chosen]


def _whole(epochs: float) -> int:
    """Rounded; a half upwards."""
    return math.floor(epochs + 0.5)
