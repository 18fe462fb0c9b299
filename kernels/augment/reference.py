"""The definitions of crop, flip and cutout, as drawn, of normalisation and of erasing with noise.

Draws are one set of expressions for NumPy and PyTorch. `augment_torch` is the form for any device and for the compiler,
`augment_numpy` the plain one that the tests believe: one image, one array operation after the other.
"""

from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kernels.augment.operations import SIDE
from kernels.philox import Purpose, Words, below, philox

Flip = Literal["off", "random", "alternating"]


def draw_geometry(samples: Words, seed: Any, epoch: Any, padding: int, flip: Flip) -> tuple[Words, Words, Words]:
    """Crop offsets [N], uniform in -padding..padding, and flip [N].

    flip: off; random, with probability 1/2; alternating, every other epoch, beginning with a first draw of the sample's own.
    epoch, seed: numbers, or 0-d tensors on the samples' device.
    """
    down, right, flip_word, _ = philox(seed, samples, epoch, Purpose.CROP_FLIP)
    if flip == "alternating":
        first, _, _, _ = philox(seed, samples, 0, Purpose.FIRST_FLIP)
        flipped = (below(first, 2) + epoch) % 2 == 1
    else:
        flipped = (below(flip_word, 2) == 1) & (flip == "random")
    return below(down, 2 * padding + 1) - padding, below(right, 2 * padding + 1) - padding, flipped


def draw_cutout(samples: Words, seed: Any, epoch: Any, side: int) -> tuple[Words, Words, Words, Words]:
    """Top, bottom, left, right [N] of boxes of `side` pixels around a uniform centre, not clipped.

    An even side covers centre - side/2 .. centre + side/2 - 1.
    """
    row, column, _, _ = philox(seed, samples, epoch, Purpose.CUTOUT)
    top, left = below(row, SIDE) - side // 2, below(column, SIDE) - side // 2
    return top, top + side, left, left + side


def crop_and_flip(images: Tensor, positions: Tensor, down: Tensor, right: Tensor, flipped: Tensor, *, reflect: bool) -> Tensor:
    """Gather images [N, 32, 32, 3] uint8 at `positions` [B], each moved and flipped in its own way: [B, 32, 32, 3] uint8.

    down, right: [B] int64, -31..31, where the crop's corner lies from the image's. flipped: [B] bool, the crop left-right.
    reflect: outside lies the image reflected about its edge pixels, not black. Crop and flip are one gather: output column
    x shows column x (or 31 - x) + right.
    """
    place = torch.arange(SIDE, device=images.device)
    rows = place + down[:, None]  # [B, 32]
    columns = torch.where(flipped[:, None], SIDE - 1 - place, place) + right[:, None]
    if reflect:  # without repeating the edge: -1 shows 1, 32 shows 30
        inside_rows, inside_columns = ((SIDE - 1 - (SIDE - 1 - line.abs()).abs()) for line in (rows, columns))
    else:
        inside_rows, inside_columns = rows.clamp(0, SIDE - 1), columns.clamp(0, SIDE - 1)
    # Whole rows of 96 bytes first, then bytes within rows: five times as fast on a CPU as one gather of pixels.
    row_bytes = SIDE * 3
    lines = images.view(-1, row_bytes).index_select(0, (positions[:, None] * SIDE + inside_rows).view(-1))
    lines = lines.view(len(positions), SIDE, row_bytes)  # [B, 32, 96]
    bytes_in_row = (inside_columns[:, :, None] * 3 + torch.arange(3, device=images.device)).view(-1, 1, row_bytes)
    picked = lines.gather(2, bytes_in_row.expand(-1, SIDE, -1))
    if not reflect:
        picked.mul_((columns == inside_columns).repeat_interleave(3, 1)[:, None, :]).mul_((rows == inside_rows)[:, :, None])
    return picked.view(-1, SIDE, SIDE, 3)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Levels [B, 32, 32, 3] -> float32 [B, 3, 32, 32] channels_last, a view of NHWC: (x - 255 mean) / (255 std).

    Subtract, then multiply: that cannot become one rounding, so all backends agree to the bit (a compiler that computes 255
    mean beside it must be told not to fuse those two). The constants are repeated along a whole image row, since loops over
    three channels do not vectorise.
    """
    rows = pixels.reshape(len(pixels), SIDE, SIDE * 3).float()  # [B, 32, 96]
    rows = (rows - (255 * mean).repeat(SIDE)).mul_((1 / (255 * std)).repeat(SIDE))
    return rows.reshape(pixels.shape).permute(0, 3, 1, 2)


def level_table(mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """The normalised value of every level 0..255 in every channel: [3, 256] of `dtype`."""
    levels = torch.arange(256, device=mean.device, dtype=torch.float32)
    return ((levels - (255 * mean)[:, None]) * (1 / (255 * std))[:, None]).to(dtype)


def clear_box(x: Tensor, box: Tensor) -> Tensor:
    """Set a box [B, 4] (top, bottom, left, right; clipped, maybe empty) of each image [B, 32, 32, 3] to 0."""
    place = torch.arange(SIDE, device=x.device)
    rows = (place >= box[:, :1]) & (place < box[:, 1:2])
    columns = (place >= box[:, 2:3]) & (place < box[:, 3:])
    inside = rows[:, :, None] & columns.repeat_interleave(3, 1)[:, None, :]  # [B, 32, 96]: along whole rows, as normalise
    return x.reshape(len(x), SIDE, SIDE * 3).masked_fill(inside, 0).reshape(x.shape)


@cache
def noise_quantiles() -> Tensor:
    """The standard normal distribution's 65,536 equally likely values [65536] float32, between -4.2 and 4.2."""
    return torch.special.ndtri((torch.arange(65_536, dtype=torch.float64) + 0.5) / 65_536).float()


def noise(seeds: Tensor, quantiles: Tensor) -> Tensor:
    """Noise N(0, 1) of images [B, 32, 32, 3] float32, keyed by seeds [B]: value i takes the i-th 16 bits of its stream."""
    values = SIDE * SIDE * 3
    words = torch.stack(philox(seeds[:, None], torch.arange(values // 8, device=seeds.device)[None], 0, Purpose.NOISE), 2)
    halves = torch.stack([words & 0xFFFF, words >> 16], 3)  # [B, 384, 4, 2]
    return quantiles[halves].view(-1, SIDE, SIDE, 3)


def fill_with_noise(x: Tensor, box: Tensor, seeds: Tensor, *, quantiles: Tensor) -> Tensor:
    """Replace a box [B, 4] of each normalised image [B, 32, 32, 3] by its noise."""
    inside = clear_box(torch.ones_like(x), box) == 0
    return torch.where(inside, noise(seeds, quantiles), x)


def augment_torch(
    images: Tensor, labels: Tensor, index: Tensor, positions: Tensor, epoch: Any, seed: Any, *,
    padding: int, reflect: bool, flip: Flip, cutout: int, mean: Tensor, std: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator in PyTorch operations, at `positions` [B]; no host sync."""
    samples = index[positions]
    down, right, flipped = draw_geometry(samples, seed, epoch, padding, flip)
    pixels = crop_and_flip(images, positions, down, right, flipped, reflect=reflect)
    x = normalise(pixels, mean, std)
    if cutout:
        box = torch.stack(draw_cutout(samples, seed, epoch, cutout), 1)
        x = clear_box(x.permute(0, 2, 3, 1), box).permute(0, 3, 1, 2)
    return x.to(dtype), labels[positions]


def augment_numpy(
    images: np.ndarray, labels: np.ndarray, index: np.ndarray, positions: np.ndarray, epoch: int, seed: int, *,
    padding: int, reflect: bool, flip: Flip, cutout: int, mean: np.ndarray, std: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The operator in NumPy: float32 [B, 3, 32, 32] and labels [B]."""
    samples = index[positions]
    downs, rights, flips = draw_geometry(samples, seed, epoch, padding, flip)
    boxes = draw_cutout(samples, seed, epoch, cutout)
    offset, scale = np.float32(255) * mean, np.float32(1) / (np.float32(255) * std)
    batch = np.empty((len(positions), 3, SIDE, SIDE), np.float32)
    border = ((padding, padding), (padding, padding), (0, 0))
    for b, position in enumerate(positions):
        padded = np.pad(images[position], border, mode="reflect" if reflect else "constant")
        top, left = downs[b] + padding, rights[b] + padding
        crop = padded[top : top + SIDE, left : left + SIDE]
        crop = crop[:, ::-1] if flips[b] else crop
        x = (crop.astype(np.float32) - offset) * scale
        if cutout:
            top, bottom, left, right = (max(0, side[b]) for side in boxes)
            x[top:bottom, left:right] = 0
        batch[b] = x.transpose(2, 0, 1)
    return batch, labels[positions]
