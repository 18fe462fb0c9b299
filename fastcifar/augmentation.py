"""A batch of the resident uint8 set enters as positions; normalised, augmented images [B, 3, 32, 32] channels_last leave.

Each sample's parameters come from Philox at (sample number, epoch, purpose): no generator, no loop over samples, no host sync.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastcifar.errors import require
from kernels.philox import Purpose, below, philox, uniform

SIDE = 32  # pixels
CropMode = Literal["zero", "reflect"]


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image; every field in the units of its comment, 0 = off."""

    crop_padding: int = 4  # pixels added on every side before a random 32x32 crop, 0..31
    crop_mode: CropMode = "zero"  # what the padding shows: black, as torchvision's RandomCrop, or the mirrored image
    flip: bool = True  # mirror left-right with probability 1/2
    cutout: int = 0  # side in pixels of a square set to the mean colour, 0..32; its centre is uniform, its edges clipped
    mixup_alpha: float = 0.0  # Beta(alpha, alpha) of the share in mixup at the start of training, 0..10
    mixup_alpha_end: float | None = None  # alpha at the end of training, reached linearly; None: constant
    cutmix_alpha: float = 0.0  # Beta(alpha, alpha) of the kept area in CutMix, 0..10; with mixup: either, equally likely
    mix_probability: float = 1.0  # probability that a batch is mixed at all, 0..1
    brightness: float = 0.0  # colour jitter: factor drawn from 1 - x .. 1 + x, 0..1
    contrast: float = 0.0  # colour jitter: factor drawn from 1 - x .. 1 + x, 0..1
    saturation: float = 0.0  # colour jitter: factor drawn from 1 - x .. 1 + x, 0..1
    hue: float = 0.0  # colour jitter: turn drawn from -x .. x, in turns, 0..0.5
    grayscale: float = 0.0  # probability of a grey image, 0..1
    rotation: float = 0.0  # degrees; angle drawn from -x .. x, 0..180
    rand_augment: int = 0  # RandAugment: operations per image, 0..14
    rand_augment_magnitude: int = 9  # RandAugment: strength on torchvision's scale, 0..30
    random_erasing: float = 0.0  # probability that a rectangle is erased, 0..1

    def __post_init__(self) -> None:
        require(self, 0 <= self.crop_padding < SIDE, "crop_padding", "0..31 pixels")
        require(self, self.crop_mode in get_args(CropMode), "crop_mode", f"one of {', '.join(get_args(CropMode))}")
        require(self, 0 <= self.cutout <= SIDE, "cutout", "0..32 pixels")
        for field in ("mixup_alpha", "cutmix_alpha"):
            require(self, 0 <= getattr(self, field) <= 10, field, "0..10")
        require(
            self,
            self.mixup_alpha_end is None or 0 < self.mixup_alpha_end <= 10,
            "mixup_alpha_end",
            "above 0, at most 10",
        )
        for field in ("mix_probability", "brightness", "contrast", "saturation", "grayscale", "random_erasing"):
            require(self, 0 <= getattr(self, field) <= 1, field, "0..1")
        require(self, 0 <= self.hue <= 0.5, "hue", "0..0.5 turns")
        require(self, 0 <= self.rotation <= 180, "rotation", "0..180 degrees")
        require(self, 0 <= self.rand_augment <= 14, "rand_augment", "0..14 operations")
        require(self, 0 <= self.rand_augment_magnitude <= 30, "rand_augment_magnitude", "0..30")

    @property
    def mixes(self) -> bool:
        """Whether any batch is mixed."""
        return self.mix_probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    @property
    def not_applied(self) -> list[str]:
        """The fields that are set but have no operation in this version yet."""
        names = (
            "brightness",
            "contrast",
            "saturation",
            "hue",
            "grayscale",
            "rotation",
            "rand_augment",
            "random_erasing",
        )
        return [name for name in names if getattr(self, name)]


def augment(
    settings: Augmentation,
    images: Tensor,
    positions: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    seed: int,
    epoch: Tensor,
) -> Tensor:
    """Return float32 [B, 3, 32, 32] channels_last: crop, flip, normalise, cutout of the samples at `positions`.

    images: [N, 32, 32, 3] uint8, the resident set. positions: [B] int64 into it. index: [N] int64 sample numbers, the keys of
    randomness. mean, std: [3] float32 in 0..1. epoch: 0-d int64. All tensors on one device.
    """
    samples = index[positions]
    x = crop_and_flip(images, positions, samples, seed, epoch, settings.crop_padding, settings.crop_mode, settings.flip)
    x = normalise(x, mean, std)
    if settings.cutout:
        x = cutout(x, samples, seed, epoch, settings.cutout)
    return x


def crop_and_flip(
    images: Tensor,
    positions: Tensor,
    samples: Tensor,
    seed: int,
    epoch: Tensor,
    padding: int,
    mode: CropMode,
    flip: bool,
) -> Tensor:
    """Gather images [N, 32, 32, 3] uint8 at `positions` with each sample's own crop offset and mirroring: [B, 32, 32, 3] uint8.

    Offsets are uniform in 0..2*padding. Crop and mirror are one gather: output column x shows column
    x (or 31 - x) + offset - padding.
    """
    if not (padding or flip):
        return images[positions]
    down, right, mirror, _ = philox(seed, samples, epoch, Purpose.CROP_FLIP)
    place = torch.arange(SIDE, device=images.device)
    rows = place + below(down, 2 * padding + 1)[:, None] - padding  # [B, 32]
    columns = place.expand(len(samples), SIDE)
    if flip:
        columns = torch.where(below(mirror, 2)[:, None] == 1, SIDE - 1 - columns, columns)
    columns = columns + below(right, 2 * padding + 1)[:, None] - padding
    if mode == "reflect":  # without repeating the edge: -1 shows 1, 32 shows 30
        rows, columns = (SIDE - 1 - (SIDE - 1 - line.abs()).abs() for line in (rows, columns))
        return images[positions[:, None, None], rows[:, :, None], columns[:, None, :]]
    picked = images[positions[:, None, None], rows.clamp(0, SIDE - 1)[:, :, None], columns.clamp(0, SIDE - 1)[:, None, :]]
    inside = _within(rows)[:, :, None] & _within(columns)[:, None, :]
    return picked * inside[..., None]


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, 32, 32, 3] -> float32 [B, 3, 32, 32] channels_last: (x - 255 mean) / (255 std), a view, not a copy, of NHWC.

    Subtract, then multiply: no backend can fuse that into one rounding, so all of them agree to the bit.
    """
    return ((pixels.float() - 255 * mean) * (1 / (255 * std))).permute(0, 3, 1, 2)


def cutout(x: Tensor, samples: Tensor, seed: int, epoch: Tensor, side: int) -> Tensor:
    """Set a square of `side` pixels to 0, the mean colour, in normalised images [B, 3, 32, 32] (DeVries and Taylor, 2017).

    The centre is uniform over the image; what would lie outside is clipped. An even side covers
    centre - side/2 .. centre + side/2 - 1.
    """
    words = philox(seed, samples, epoch, Purpose.CUTOUT)
    place = torch.arange(SIDE, device=x.device)
    inside = []
    for word in words[:2]:
        start = below(word, SIDE)[:, None] - side // 2
        inside.append((place >= start) & (place < start + side))
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # [B, 1, 32, 32]
    return x.masked_fill(square, 0.0)


@dataclass(frozen=True)
class MixPlan:
    """How each batch of an epoch is mixed, drawn beforehand on the host, so that no step waits for anything."""

    share: Tensor  # [steps] float32 on the device: weight of the own label; 1 = not mixed
    box: Tensor  # [steps, 4] int64: top, bottom, left, right of the pasted rectangle; empty unless CutMix
    blend: Tensor  # [steps] float32: weight of the own pixels outside the box; below 1 only for mixup


def mix_plan(settings: Augmentation, seed: int, epoch: int, steps: int, progress: float, device: torch.device) -> MixPlan:
    """Draw the mixing of `steps` batches of epoch `epoch` from Philox at (batch number, epoch, MIX).

    progress: share of training done at this epoch, 0..1, for an alpha that changes.
    """
    batch = np.arange(steps, dtype=np.int64)
    chosen, which, row, column = philox(seed, batch, epoch, Purpose.MIX)
    mixed = (uniform(chosen) < settings.mix_probability) & settings.mixes
    both = settings.mixup_alpha > 0 and settings.cutmix_alpha > 0
    use_cutmix = below(which, 2) == 1 if both else np.full(steps, settings.cutmix_alpha > 0)

    end = settings.mixup_alpha if settings.mixup_alpha_end is None else settings.mixup_alpha_end
    alpha = np.where(use_cutmix, settings.cutmix_alpha, settings.mixup_alpha + (end - settings.mixup_alpha) * progress)
    share = np.where(mixed, beta(seed, batch, epoch, np.maximum(alpha, 1e-3)), 1.0)

    # CutMix (Yun et al., ICCV 2019): a box of relative area 1 - share around a uniform centre, clipped at the edges.
    half = np.where(mixed & use_cutmix, (SIDE * np.sqrt(1 - share) / 2).astype(np.int64), 0)
    top, left = below(row, SIDE), below(column, SIDE)
    box = np.stack([top - half, top + half, left - half, left + half], axis=1).clip(0, SIDE)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    blend = np.where(use_cutmix, 1.0, share)
    share = np.where(use_cutmix, 1 - area / SIDE**2, share)
    return MixPlan(
        share=torch.tensor(share, dtype=torch.float32, device=device),
        box=torch.tensor(box, dtype=torch.int64, device=device),
        blend=torch.tensor(blend, dtype=torch.float32, device=device),
    )


def mix(x: Tensor, blend: Tensor, box: Tensor) -> Tensor:
    """Mix every image of [B, 3, 32, 32] with its successor in the batch, which the epoch's permutation made a random partner.

        y = w x + (1 - w) partner,   w = 0 inside the box, `blend` outside

    One expression for mixup (empty box), CutMix (blend 1) and no mixing (both), so that the step has no branch.
    """
    place = torch.arange(SIDE, device=x.device)
    inside = ((place >= box[0]) & (place < box[1]))[:, None] & ((place >= box[2]) & (place < box[3]))
    return torch.lerp(partner(x), x, torch.where(inside, 0.0, blend).to(x.dtype))


def partner(values: Tensor) -> Tensor:
    """The values of each sample's mixing partner: the next in the batch, the first for the last."""
    return values.roll(-1, 0)


def beta(seed: int, batch: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", epoch: int, alpha: np.ndarray) -> np.ndarray:
    """Draw Beta(alpha, alpha) for every batch number, float64: X / (X + Y) of two keyed gamma draws, in logarithms.

    Logarithms, because for small alpha both gammas underflow while their ratio does not.
    """
    x, y = (log_gamma_draw(seed, batch, epoch, alpha, stream) for stream in (1, 2))
    return 1 / (1 + np.exp(np.clip(y - x, -700, 700)))


def log_gamma_draw(
    seed: int, batch: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", epoch: int, alpha: np.ndarray, stream: int
) -> np.ndarray:
    """The logarithm of a Gamma(alpha, 1) draw for every batch number (Marsaglia and Tsang, ACM TOMS 26, 2000).

    Gamma(alpha) = Gamma(alpha + 1) * U^(1/alpha). Rejected tries (under 5 %) take the next block of the counter.
    """
    d = alpha + 1 - 1 / 3
    result = np.full(len(batch), np.nan)
    for attempt in range(64):  # the chance that one is still open is below 1e-80
        words = philox(seed, batch, epoch, Purpose.MIX, block=2 * attempt + stream)
        u1, u2, u3, u4 = ((word + 0.5) * 2.0**-32 for word in words)  # strictly inside 0..1
        normal = np.sqrt(-2 * np.log(u1)) * np.cos(2 * math.pi * u2)
        v = (1 + normal / np.sqrt(9 * d)) ** 3
        positive = np.maximum(v, 1e-300)
        accepted = (v > 0) & (np.log(u3) < normal**2 / 2 + d - d * v + d * np.log(positive))
        result = np.where(np.isnan(result) & accepted, np.log(d * positive) + np.log(u4) / alpha, result)
        if not np.isnan(result).any():
            break
    return result


def _within(line: Tensor) -> Tensor:
    return (line >= 0) & (line < SIDE)
