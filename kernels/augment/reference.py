"""The definitions of crop, flip and cutout, as drawn, of normalisation and of erasing with noise.

Draws are one set of expressions for NumPy and PyTorch. `augment_torch` is the form for any device and for the compiler,
`augment_numpy` the plain one that the tests believe: one image, one array operation after the other.
"""

from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kernels.augment.operations import CIFAR, Size
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


def draw_cutout(samples: Words, seed: Any, epoch: Any, side: int, size: Size = CIFAR) -> tuple[Words, Words, Words, Words]:
    """Top, bottom, left, right [N] of boxes of `side` pixels around a uniform centre of images of `size`, not clipped.

    An even side covers centre - side/2 .. centre + side/2 - 1.
    """
    row, column, _, _ = philox(seed, samples, epoch, Purpose.CUTOUT)
    top, left = below(row, size[0]) - side // 2, below(column, size[1]) - side // 2
    return top, top + side, left, left + side


def crop_and_flip(images: Tensor, positions: Tensor, down: Tensor, right: Tensor, flipped: Tensor, *, reflect: bool) -> Tensor:
    """Gather images [N, H, W, 3] uint8 at `positions` [B], each moved and flipped in its own way: [B, H, W, 3] uint8.

    down, right: [B] int64, below H and W either way, where the crop's corner lies from the image's. flipped: [B] bool, the crop
    left-right. reflect: outside lies the image reflected about its edge pixels, not black. Crop and flip are one gather:
    output column x shows column x (or W - 1 - x) + right.
    """
    height, width = images.shape[1:3]
    place = torch.arange(width, device=images.device)
    rows = (place if height == width else torch.arange(height, device=images.device)) + down[:, None]  # [B, H]
    columns = torch.where(flipped[:, None], width - 1 - place, place) + right[:, None]  # [B, W]
    if reflect:
        inside_rows, inside_columns = reflected(rows, height), reflected(columns, width)
    else:
        inside_rows, inside_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    # Whole rows first, then bytes within rows: five times as fast on a CPU as one gather of pixels.
    row_bytes = width * 3
    lines = images.view(-1, row_bytes).index_select(0, (positions[:, None] * height + inside_rows).view(-1))
    lines = lines.view(len(positions), height, row_bytes)  # [B, H, 3 W]
    bytes_in_row = (inside_columns[:, :, None] * 3 + torch.arange(3, device=images.device)).view(-1, 1, row_bytes)
    picked = lines.gather(2, bytes_in_row.expand(-1, height, -1))
    if not reflect:
        picked.mul_((columns == inside_columns).repeat_interleave(3, 1)[:, None, :]).mul_((rows == inside_rows)[:, :, None])
    return picked.view(-1, height, width, 3)


def reflected(line: Tensor, length: int) -> Tensor:
    """Places on a line of `length` pixels reflected at its ends, without repeating these: -1 shows 1."""
    return length - 1 - (length - 1 - line.abs()).abs()


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Levels [B, H, W, 3] -> float32 [B, 3, H, W] channels_last, a view of NHWC: (x - 255 mean) / (255 std).

    Subtract, then multiply: that cannot become one rounding, so all backends agree to the bit (a compiler that computes 255
    mean beside it must be told not to fuse those two). The constants are repeated along a whole image row, since loops over
    three channels do not vectorise.
    """
    count, height, width, _ = pixels.shape
    rows = pixels.reshape(count, height, width * 3).float()  # [B, H, 3 W]
    rows = (rows - (255 * mean).repeat(width)).mul_((1 / (255 * std)).repeat(width))
    return rows.reshape(pixels.shape).permute(0, 3, 1, 2)


def level_table(mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """The normalised value of every level 0..255 in every channel: [3, 256] of `dtype`."""
    levels = torch.arange(256, device=mean.device, dtype=torch.float32)
    return ((levels - (255 * mean)[:, None]) * (1 / (255 * std))[:, None]).to(dtype)


def clear_box(x: Tensor, box: Tensor) -> Tensor:
    """Set a box [B, 4] (top, bottom, left, right; clipped, maybe empty) of each image [B, H, W, 3] to 0."""
    count, height, width, _ = x.shape
    place = torch.arange(width, device=x.device)
    row = place if height == width else torch.arange(height, device=x.device)
    rows = (row >= box[:, :1]) & (row < box[:, 1:2])
    columns = (place >= box[:, 2:3]) & (place < box[:, 3:])
    inside = rows[:, :, None] & columns.repeat_interleave(3, 1)[:, None, :]  # [B, H, 3 W]: along whole rows, as normalise
    return x.reshape(count, height, width * 3).masked_fill(inside, 0).reshape(x.shape)


@cache
def noise_quantiles() -> Tensor:
    """The standard normal distribution's 65,536 equally likely values [65536] float32, between -4.2 and 4.2."""
    return torch.special.ndtri((torch.arange(65_536, dtype=torch.float64) + 0.5) / 65_536).float()


def noise(seeds: Tensor, quantiles: Tensor, size: Size = CIFAR) -> Tensor:
    """Noise N(0, 1) of images [B, H, W, 3] float32, keyed by seeds [B]: value i takes the i-th 16 bits of its stream."""
    values = size[0] * size[1] * 3
    blocks = torch.arange(-(-values // 8), device=seeds.device)
    words = torch.stack(philox(seeds[:, None], blocks[None], 0, Purpose.NOISE), 2)
    halves = torch.stack([words & 0xFFFF, words >> 16], 3)  # [B, values / 8, 4, 2]
    return quantiles[halves].view(len(seeds), -1)[:, :values].view(-1, *size, 3)


def fill_with_noise(x: Tensor, box: Tensor, seeds: Tensor, *, quantiles: Tensor) -> Tensor:
    """Replace a box [B, 4] of each normalised image [B, H, W, 3] by its noise."""
    inside = clear_box(torch.ones_like(x), box) == 0
    return torch.where(inside, noise(seeds, quantiles, (x.shape[1], x.shape[2])), x)


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
        box = torch.stack(draw_cutout(samples, seed, epoch, cutout, (images.shape[1], images.shape[2])), 1)
        x = clear_box(x.permute(0, 2, 3, 1), box).permute(0, 3, 1, 2)
    return x.to(dtype), labels[positions]


def augment_numpy(
    images: np.ndarray, labels: np.ndarray, index: np.ndarray, positions: np.ndarray, epoch: int, seed: int, *,
    padding: int, reflect: bool, flip: Flip, cutout: int, mean: np.ndarray, std: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The operator in NumPy: float32 [B, 3, H, W] and labels [B]."""
    samples, (height, width) = index[positions], images.shape[1:3]
    downs, rights, flips = draw_geometry(samples, seed, epoch, padding, flip)
    boxes = draw_cutout(samples, seed, epoch, cutout, (height, width))
    offset, scale = np.float32(255) * mean, np.float32(1) / (np.float32(255) * std)
    batch = np.empty((len(positions), 3, height, width), np.float32)
    border = ((padding, padding), (padding, padding), (0, 0))
    for b, position in enumerate(positions):
        padded = np.pad(images[position], border, mode="reflect" if reflect else "constant")
        top, left = downs[b] + padding, rights[b] + padding
        crop = padded[top : top + height, left : left + width]
        crop = crop[:, ::-1] if flips[b] else crop
        x = (crop.astype(np.float32) - offset) * scale
        if cutout:
            top, bottom, left, right = (max(0, side[b]) for side in boxes)
            x[top:bottom, left:right] = 0
        batch[b] = x.transpose(2, 0, 1)
    return batch, labels[positions]
