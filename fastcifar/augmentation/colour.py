"""Colour operations on pixel values [B, 3, H, W], each image with strengths of its own.

Pixel values are float32 that hold whole numbers 0..255, rounded after every operation as torchvision rounds its uint8
images, so that each operation equals torchvision's on the same strength. Strengths are [B] float32.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.augment.operations import CONTRAST, HUE, LUMA, SATURATION, TOP


def grey(pixels: Tensor) -> Tensor:
    """The grey image [B, 1, H, W] of a colour image.

    Sums of whole numbers below 2^24 are exact, and half a unit keeps the product away from every whole number: the value
    comes out the same whether a compiler fuses the operations or not.
    """
    red, green, blue = pixels.unbind(1)
    weighed = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return weighed.add_(0.5).mul_(1e-4).floor_()[:, None]


def blend(pixels: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """other + (x - other) share, cut off at 0 and 255; a share above 1 extrapolates.

    Not `torch.lerp`: it fuses in vectors and not in the rest of a loop, so its last bit depends on the place in the batch.
    """
    return (pixels - other).mul_(share[:, None, None, None]).add_(other).clamp_(0, TOP).floor_()


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return (pixels * factor[:, None, None, None]).clamp_(0, TOP).floor_()


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the grey image."""
    return blend(pixels, mean(grey(pixels)), factor)


def mean(greys: Tensor) -> Tensor:
    """The mean [B, 1, 1, 1] of grey images; its sum is exact, and no device divides in a way of its own."""
    return greys.sum((1, 2, 3), keepdim=True) * (1 / greys[0].numel())


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image."""
    return blend(pixels, grey(pixels), factor)


def sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with a 3x3 blur (centre weight 5/13, the rest 1/13) everywhere but on the edge pixels."""
    lines = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    around = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]  # sums of 3x3, whole numbers
    blurred = pixels.clone()
    blurred[:, :, 1:-1, 1:-1] = around.add_(pixels[:, :, 1:-1, 1:-1], alpha=4).div_(13).round_()
    return blend(pixels, blurred, factor)


def hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by `turn` turns, -0.5..0.5, keeping HSV saturation and value.

    With the hue h in sixths of a turn, 0..6, the least channel m and the chroma c = largest - least (Smith, "Color gamut
    transform pairs", SIGGRAPH 1978, with its six cases folded into one line a channel):

        R = m + c clamp(|h - 3| - 1, 0, 1)      G = m + c clamp(2 - |h - 2|, 0, 1)      B = m + c clamp(2 - |h - 4|, 0, 1)
    """
    red, green, blue = pixels.unbind(1)
    # Sorting the channels finds hue and chroma without six cases (Hocevar, "Fast branchless RGB to HSV conversion", 2013);
    # `offset` says which order it was. `torch.where` would cost six times as much as an operation here.
    swapped = (blue - green).sign_().clamp_(min=0)  # 1 where green < blue
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    behind = (high - red).sign_().clamp_(min=0)  # 1 where red is not the largest
    most, middle = torch.maximum(red, high), torch.minimum(red, high)
    least = torch.minimum(middle, low)
    chroma = most - least
    offset = (2 * swapped).sub_(1 / 3).mul_(behind).sub_(swapped)
    turns = (middle - low).div_((6 * chroma).clamp_(min=1.0)).add_(offset).abs_().add_(turn[:, None, None])
    sixths = (turns - turns.floor()).mul_(6)
    # The three channels at once, in place: a fresh tensor costs more than an operation on one that is there.
    sign, shift = _per_channel((1.0, -1.0, -1.0), pixels), _per_channel((-1.0, 2.0, 2.0), pixels)
    channels = (sixths[:, None] - _per_channel((3.0, 2.0, 4.0), pixels)).abs_().mul_(sign).add_(shift).clamp_(0, 1)
    back = (TOP + 1 - 1e-3) / TOP  # torchvision's way from 0..1 back to 0..255
    return channels.mul_((chroma * back)[:, None]).add_((least * back)[:, None]).floor_()


def _per_channel(values: tuple[float, float, float], like: Tensor) -> Tensor:
    """A constant [3, 1, 1] made on the device, where `torch.tensor` would copy it from the host."""
    return torch.stack([torch.full((1, 1), value, device=like.device) for value in values])


def jitter(pixels: Tensor, factors: Tensor, order: Tensor, *, turns_hue: bool) -> Tensor:
    """Brightness, contrast, saturation and hue by `factors` [B, 4], in each image's own `order` [B, 4]. May overwrite `pixels`.

    The first three are blends and need no case distinction; images are told apart by the place of the hue alone.
    turns_hue: False leaves the hue out.
    """
    place = (order == HUE).to(torch.int64).argmax(1)
    kept = torch.arange(3, device=order.device).expand(len(order), 3)
    kinds = order.gather(1, kept + (kept >= place[:, None]))  # the order with the hue left out
    shares = factors.gather(1, kinds)
    for at in range(4):
        pixels = apply_where(pixels, place == at, partial(_blends_and_hue, at, turns_hue), kinds, shares, factors[:, HUE])
    return pixels


def _blends_and_hue(hue_at: int, turns_hue: bool, pixels: Tensor, kinds: Tensor, shares: Tensor, turn: Tensor) -> Tensor:
    """Three blends of `kinds` [B, 3] with `shares` [B, 3], the hue before the blend number `hue_at`, or last."""
    for at in range(4):
        if at == hue_at and turns_hue:
            pixels = hue(pixels, turn)
        if at < 3:
            greys = grey(pixels)
            average = mean(greys)
            kind = kinds[:, at, None, None, None]
            # The image's grey, its mean, or black; weights of 0 and 1, since `torch.where` is slow.
            other = greys.mul_((kind == SATURATION).to(greys.dtype)).add_(average * (kind == CONTRAST))
            pixels = blend(pixels, other, shares[:, at])
    return pixels


def posterize(pixels: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `bits` bits of every value, 0..8."""
    step = torch.exp2(8 - bits)[:, None, None, None]
    return (pixels / step).floor_() * step


def solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values at and above `threshold`, in 0..1 of the range."""
    return torch.where(pixels >= TOP * threshold[:, None, None, None], TOP - pixels, pixels)


def auto_contrast(pixels: Tensor) -> Tensor:
    """Stretch each channel to the whole range; a channel of one value stays."""
    least, most = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    flat = least == most
    scale = torch.where(flat, 1.0, (most - least) * (1 / TOP))
    return ((pixels - torch.where(flat, 0.0, least)) / scale).clamp_(0, TOP).floor_()


def equalize(pixels: Tensor) -> Tensor:
    """Flatten each channel's histogram as PIL does.

    With the cumulative histogram H and step = (pixels below the channel's maximum) // 255: value k becomes (H[k-1] + step
    // 2) // step; a channel whose step is 0 stays.
    """
    flat = pixels.flatten(2).to(torch.int64)  # [B, 3, H W]
    histogram = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=pixels.device)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = flat.amax(2, keepdim=True)
    step = (flat.shape[2] - histogram.gather(2, brightest)).div_(255, rounding_mode="floor")
    below = histogram.cumsum(2) - histogram  # pixels darker than each value
    table = ((below + step // 2).div_(step.clamp(min=1), rounding_mode="floor")).clamp_(0, 255)
    table = torch.where(step == 0, torch.arange(256, device=pixels.device), table)
    return table.gather(2, flat).reshape(pixels.shape).to(pixels.dtype)


def invert(pixels: Tensor) -> Tensor:
    """255 - x."""
    return TOP - pixels


def apply_where(pixels: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """`operation(pixels, *parameters)` for the samples in `chosen` [B] bool, the others as they are. May overwrite `pixels`.

    pixels: contiguous. On the CPU only the chosen samples are computed; on a GPU, where their number is not known without
    waiting, and under the compiler, where shapes stand still, all are computed and chosen from. The pixels are the same.
    """
    if pixels.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = chosen.nonzero().squeeze(1)
        if len(rows):
            some = operation(pixels.index_select(0, rows), *(parameter[rows] for parameter in parameters))
            # index_copy_ moves an element at a time: sixteen bytes are six times as fast as four.
            width = torch.complex128 if pixels[0].numel() % 4 == 0 else pixels.dtype
            wide, some_wide = (x.view(len(x), -1).view(width) for x in (pixels, some.contiguous()))
            wide.index_copy_(0, rows, some_wide)
        return pixels
    return torch.where(chosen.view(-1, *[1] * (pixels.ndim - 1)), operation(pixels, *parameters), pixels)
