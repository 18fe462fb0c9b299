"""Every sample's augmentation parameters of an epoch, drawn by (seed, epoch, sample, purpose) on the samples' device.

Drawn once an epoch for the whole set, so that a step only looks them up. A parameter depends on (seed, epoch, sample,
purpose) alone.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from fastcifar.augmentation.geometry import rotation_matrix
from fastcifar.augmentation.policies import (
    AUTO_AUGMENT,
    BINS,
    DRAWN,
    SIGNED,
    USUAL,
    WIDE,
    PolicyName,
    magnitude_table,
    move_matrices,
)
from kernels.augment.operations import CIFAR, NUMBER, Size
from kernels.backends import describe
from kernels.philox import Purpose, below, philox, uniform

ERASED_RATIO = (0.3, 3.3)  # random erasing: height to width, uniform in the logarithm (Zhong et al., AAAI 2020; torchvision)
ERASING_TRIES = 10
ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue
ROWS: dict[str, tuple[Any, ...]] = {  # the fields of Draws with a row for each sample: dtype, width; -1: a policy's operations
    "down": (torch.int64,), "right": (torch.int64,), "flipped": (torch.bool,), "jitter": (torch.float32, 4),
    "jitter_order": (torch.int64, 4), "grey": (torch.bool,), "degrees": (torch.float32,), "operations": (torch.int64, -1),
    "magnitudes": (torch.float32, -1), "cutout": (torch.int64, 4), "erased": (torch.int64, 4), "noise_seed": (torch.int64,),
}  # fmt: skip


@dataclass(frozen=True)
class Draws:
    """Parameters of N samples, or of a batch; what a recipe does not use is None."""

    down: Tensor  # [N] int64: where the crop's corner lies, pixels from the image's
    right: Tensor
    flipped: Tensor  # [N] bool
    seed: Tensor  # 0-d int64, like epoch: what all was drawn by, and a kernel can draw again
    epoch: Tensor
    jitter: Tensor | None = None  # [N, 4] float32: factors of brightness, contrast, saturation; turns of hue
    jitter_order: Tensor | None = None  # [N, 4] int64: which of the four comes first, second, ...
    grey: Tensor | None = None  # [N] bool
    degrees: Tensor | None = None  # [N] float32: rotation, counter-clockwise
    operations: Tensor | None = None  # [N, K] int64: a policy's operations
    magnitudes: Tensor | None = None  # [N, K] float32
    cutout: Tensor | None = None  # [N, 4] int64: top, bottom, left, right, not clipped
    erased: Tensor | None = None  # [N, 4] int64: the same of random erasing, empty where nothing is erased
    noise_seed: Tensor | None = None  # [N] int64: seed of the noise that erases
    quantiles: Tensor | None = None  # [65536] float32, what the noise is looked up in: shared by all samples
    size: Size = CIFAR  # of the images that all this is drawn for

    @cached_property
    def rows(self) -> int:
        """N. Raises ValueError where a field is of another dtype or shape, or lacks the one it is used with."""
        places = -1 if self.operations is None else self.operations.shape[-1]
        for name, (dtype, *widths) in ROWS.items():
            value = getattr(self, name)
            shape = [len(self.down), *(places if width == -1 else width for width in widths)]
            if value is not None and (list(value.shape) != shape or value.dtype != dtype):
                raise ValueError(f"draws: {name} must be {shape} {str(dtype).removeprefix('torch.')}, got {describe(value)}")
        for name, other in (("jitter", "jitter_order"), ("operations", "magnitudes"), ("noise_seed", "quantiles")):
            if (getattr(self, name) is None) != (getattr(self, other) is None):
                raise ValueError(f"draws: {name} and {other} go together, got only one of them")
        if self.quantiles is not None and list(self.quantiles.shape) != [65_536]:
            raise ValueError(f"draws: quantiles must be [65536], got {describe(self.quantiles)}")
        return len(self.down)

    @cached_property
    def moves(self) -> Tensor | None:
        """Inverse matrices [N, K, 2, 3] of a policy's operations that move pixels; of the others the identity."""
        if self.operations is None or self.magnitudes is None:
            return None
        return move_matrices(self.operations.flatten(), self.magnitudes.flatten(), self.size).view(*self.operations.shape, 2, 3)

    @cached_property
    def rotations(self) -> Tensor | None:
        """Inverse matrices [N, 2, 3] of the rotations."""
        return None if self.degrees is None else rotation_matrix(self.degrees)

    def at(self, positions: Tensor) -> "Draws":
        """The parameters of the samples at `positions` [B]."""
        values: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            values[entry.name] = value[positions] if value is not None and entry.name in ROWS else value
        batch = Draws(**values)
        for name in ("moves", "rotations"):  # what is computed already need not be computed again
            if self.__dict__.get(name) is not None:
                batch.__dict__[name] = self.__dict__[name][positions]
        return batch


def draw_jitter(samples: Tensor, seed: int, epoch: int | Tensor, strengths: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors [N, 4], uniform in 1 - x .. 1 + x (brightness, contrast, saturation) or -x .. x (hue), and their order [N, 4]."""
    words = philox(seed, samples, epoch, Purpose.JITTER)
    ranges = [(max(0.0, 1 - x), 1 + x) for x in strengths[:3]] + [(-strengths[3], strengths[3])]
    factors = [low + (high - low) * uniform(word) for word, (low, high) in zip(words, ranges, strict=True)]
    which, _, _, _ = philox(seed, samples, epoch, Purpose.JITTER_ORDER)
    orders = constant(jitter_orders, samples.device)
    return torch.stack(factors, 1), orders[below(which, len(ORDERS))]


@cache
def constant(make: Callable[..., Tensor], device: torch.device, *arguments: Any) -> Tensor:
    """What `make(*arguments)` returns, copied to `device` once."""
    return make(*arguments).to(device)


def jitter_orders() -> Tensor:
    """The orders [24, 4] of brightness, contrast, saturation, hue."""
    return torch.tensor(ORDERS)


def draw_grey(samples: Tensor, seed: int, epoch: int | Tensor, probability: float) -> Tensor:
    """Whether each image turns grey [N]."""
    return uniform(philox(seed, samples, epoch, Purpose.JITTER_ORDER)[1]) < probability


def draw_rotation(samples: Tensor, seed: int, epoch: int | Tensor, largest: float) -> Tensor:
    """Angles [N] in degrees, uniform in -largest..largest."""
    return (2 * uniform(philox(seed, samples, epoch, Purpose.ROTATION)[0]) - 1) * largest


def draw_policy(
    samples: Tensor, seed: int, epoch: int | Tensor, policy: PolicyName, operations: int, magnitude: int, size: Size = CIFAR
) -> tuple[Tensor, Tensor]:
    """Operations [N, K] and signed magnitudes [N, K] of a policy's sequence.

    operations, magnitude: RandAugment's N and its bin 0..30. AutoAugment applies two, TrivialAugment one.
    """
    if policy in AUTO_AUGMENT:
        return _draw_auto_augment(samples, seed, epoch, policy, size)
    table = constant(magnitude_table, samples.device, WIDE if policy == "trivial_augment" else USUAL, BINS, size)
    drawn, magnitudes = [], []
    for place in range(1 if policy == "trivial_augment" else operations):
        which, sign, strength, _ = philox(seed, samples, epoch, Purpose.POLICY, block=place)
        operation = below(which, DRAWN)
        chosen = below(strength, BINS) if policy == "trivial_augment" else torch.full_like(operation, magnitude)
        drawn.append(operation)
        magnitudes.append(_signed(table[operation, chosen], operation, sign))
    return torch.stack(drawn, 1), torch.stack(magnitudes, 1)


def pair_column(policy: PolicyName, column: int) -> Tensor:
    """Of both operations of AutoAugment's 25 pairs [25, 2]: number (column 0), probability (1) or bin (2)."""
    return torch.tensor([[(NUMBER[part[0]], *part[1:])[column] for part in pair] for pair in AUTO_AUGMENT[policy]])


def _draw_auto_augment(
    samples: Tensor, seed: int, epoch: int | Tensor, policy: PolicyName, size: Size
) -> tuple[Tensor, Tensor]:
    """One of the 25 pairs for each image; each operation of the pair is applied with its own probability."""
    numbers, chances, bins = (constant(pair_column, samples.device, policy, column) for column in range(3))
    table = constant(magnitude_table, samples.device, USUAL, 10, size)
    pair = below(philox(seed, samples, epoch, Purpose.POLICY)[0], len(numbers))
    drawn, magnitudes = [], []
    for place in range(2):
        _, sign, applied, _ = philox(seed, samples, epoch, Purpose.POLICY, block=place)
        operation = torch.where(uniform(applied) < chances[pair, place], numbers[pair, place], NUMBER["Identity"])
        drawn.append(operation)
        magnitudes.append(_signed(table[operation, bins[pair, place]], operation, sign))
    return torch.stack(drawn, 1), torch.stack(magnitudes, 1)


def _signed(magnitude: Tensor, operation: Tensor, word: Tensor) -> Tensor:
    """Negate half of the magnitudes of operations that have a direction."""
    has_sign = (operation >= SIGNED.start) & (operation < SIGNED.stop)
    return torch.where(has_sign & (below(word, 2) == 1), -magnitude, magnitude)


def draw_erasing(
    samples: Tensor, seed: int, epoch: int | Tensor, probability: float, areas: tuple[float, float] = (0.02, 0.33),
    size: Size = CIFAR,
) -> Tensor:  # fmt: skip
    """Boxes [N, 4] of random erasing: area and ratio are tried until the box is smaller than the image, then placed in it.

    areas: least and most, as shares of the image of `size`, uniform between them.
    """
    tall, wide = size
    chosen = uniform(philox(seed, samples, epoch, Purpose.ERASING)[0]) < probability
    box = torch.zeros(len(samples), 4, dtype=torch.int64, device=samples.device)
    found = ~chosen
    for attempt in range(1, ERASING_TRIES + 1):
        area_word, ratio_word, row, column = philox(seed, samples, epoch, Purpose.ERASING, block=attempt)
        area = tall * wide * (areas[0] + (areas[1] - areas[0]) * uniform(area_word))
        low, high = (math.log(ratio) for ratio in ERASED_RATIO)
        ratio = torch.exp(low + (high - low) * uniform(ratio_word))
        height, width = torch.sqrt(area * ratio).round().long(), torch.sqrt(area / ratio).round().long()
        top, left = row * (tall - height + 1) >> 32, column * (wide - width + 1) >> 32
        fits = (height < tall) & (width < wide) & ~found
        box = torch.where(fits[:, None], torch.stack([top, top + height, left, left + width], 1), box)
        found = found | fits
    return box


def draw_noise_seed(samples: Tensor, seed: int, epoch: int | Tensor) -> Tensor:
    """The seed [N], 0..2^63-1, of each sample's noise."""
    high, low, _, _ = philox(seed, samples, epoch, Purpose.ERASING, block=ERASING_TRIES + 1)
    return high << 31 | low >> 1
