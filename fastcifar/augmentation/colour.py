"""Grey levels [B, 3, 32, 32] and per-sample strengths enter, recoloured grey levels leave.

Grey levels are float32 that hold whole numbers 0..255, rounded after every operation as torchvision rounds its uint8
images, so that each operation equals torchvision's on the same strength. Strengths are [B] float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TOP = 255.0  # the brightest level
GREY = (0.2989, 0.587, 0.114)  # weights of R, G, B in a grey level (ITU-R BT.601, as torchvision)


def grey(pixels: Tensor) -> Tensor:
    """Grey levels [B, 1, 32, 32] of a colour image."""
    red, green, blue = pixels.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue).floor_()[:, None]


def blend(pixels: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """share x + (1 - share) other, cut off at 0 and 255; a share above 1 extrapolates."""
    share = share[:, None, None, None]
    return (pixels * share + other * (1 - share)).clamp_(0, TOP).floor_()


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return (pixels * factor[:, None, None, None]).clamp_(0, TOP).floor_()


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean grey level."""
    return blend(pixels, grey(pixels).mean((1, 2, 3), keepdim=True), factor)


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image."""
    return blend(pixels, grey(pixels), factor)


def sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with a 3x3 blur (centre weight 5/13, the rest 1/13) everywhere but on the edge pixels."""
    kernel = torch.full((3, 1, 3, 3), 1 / 13, device=pixels.device)
    kernel[:, :, 1, 1] = 5 / 13
    blurred = F.pad(F.conv2d(pixels, kernel, groups=3).round_(), (1, 1, 1, 1))
    edge = F.pad(torch.zeros_like(blurred[:1, :1, 1:-1, 1:-1]), (1, 1, 1, 1), value=1.0)
    return blend(pixels, torch.where(edge == 1, pixels, blurred), factor)


def hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by `turn` turns, -0.5..0.5, keeping HSV saturation and value.

    With the hue h in sixths of a turn, value v, saturation s:  channel = v - v s max(0, min(k, 4 - k, 1)),  k = (n + h) mod 6,
    n = 5, 3, 1 for R, G, B (Smith, "Color gamut transform pairs", SIGGRAPH 1978, without its case distinction).
    """
    levels = pixels / TOP
    red, green, blue = levels.unbind(1)
    value, least = levels.amax(1), levels.amin(1)
    chroma = value - least
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sixths = torch.remainder(sixths / 6 + 1 + turn[:, None, None], 1.0) * 6
    channels = []
    for n in (5.0, 3.0, 1.0):
        k = torch.remainder(sixths + n, 6.0)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return (torch.stack(channels, 1).clamp_(0, 1) * (TOP + 1 - 1e-3)).floor_()


def posterize(pixels: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `bits` bits of every level, 0..8."""
    step = torch.exp2(8 - bits)[:, None, None, None]
    return (pixels / step).floor_() * step


def solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    """Invert the levels at and above `threshold`, in 0..1 of the range."""
    return torch.where(pixels >= TOP * threshold[:, None, None, None], TOP - pixels, pixels)


def auto_contrast(pixels: Tensor) -> Tensor:
    """Stretch each channel to the whole range; a channel of one level stays."""
    least, most = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    flat = least == most
    scale = torch.where(flat, 1.0, (most - least) * (1 / TOP))
    return ((pixels - torch.where(flat, 0.0, least)) / scale).clamp_(0, TOP).floor_()


def equalize(pixels: Tensor) -> Tensor:
    """Flatten each channel's histogram as PIL does.

    With the cumulative histogram H and step = (pixels below the channel's maximum) // 255: level k becomes (H[k-1] + step
    // 2) // step; a channel whose step is 0 stays.
    """
    flat = pixels.flatten(2).to(torch.int64)  # [B, 3, 1024]
    histogram = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=pixels.device)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = flat.amax(2, keepdim=True)
    step = (flat.shape[2] - histogram.gather(2, brightest)).div_(255, rounding_mode="floor")
    below = histogram.cumsum(2) - histogram  # pixels darker than each level
    table = ((below + step // 2).div_(step.clamp(min=1), rounding_mode="floor")).clamp_(0, 255)
    table = torch.where(step == 0, torch.arange(256, device=pixels.device), table)
    return table.gather(2, flat).reshape(pixels.shape).to(pixels.dtype)


def invert(pixels: Tensor) -> Tensor:
    """255 - x."""
    return TOP - pixels


def apply_where(pixels: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """`operation(pixels, *parameters)` for the samples in `chosen` [B] bool, the others as they are. May overwrite `pixels`.

    On the CPU only the chosen samples are computed; on a GPU, where their number is not known without waiting, and under the
    compiler, where shapes stand still, all are computed and chosen from. The pixels are the same.
    """
    if pixels.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = chosen.nonzero().squeeze(1)
        if len(rows):
            pixels[rows] = operation(pixels[rows], *(parameter[rows] for parameter in parameters))
        return pixels
    return torch.where(chosen[:, None, None, None], operation(pixels, *parameters), pixels)
