"""Batches made smaller or larger on the device: bilinear, antialiased, as two matrix products."""

from functools import cache

import torch
from torch import Tensor

from fastcifar.device import upload
from kernels.augment.operations import CIFAR, Size

Weights = tuple[Tensor, Tensor]  # of rows [h, H]; of a row's channels side by side [3 W, 3 w]


def bilinear(length: int, size: int) -> Tensor:
    """The weight of each of `length` pixels of a line in each of `size`: [size, length] float64, whose rows sum to 1.

        w[i, j] ~ max(0, 1 - |j + 1/2 - c_i| / s),   c_i = (i + 1/2) length / size,   s = max(1, length / size)

    A triangle as wide as a pixel of the result, as F.interpolate's with antialias=True.
    """
    scale = length / size
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(length, dtype=torch.float64) + 0.5 - centres[:, None]).abs()
    weights = (1 - distance / max(1.0, scale)).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


@cache
def resize_weights(size: Size, dtype: torch.dtype, device: torch.device, whole: Size = CIFAR) -> Weights:
    """What `resize` takes for images of `whole` and `dtype`, copied to `device` once, without waiting for it."""
    rows, columns = (bilinear(length, short) for length, short in zip(whole, size, strict=True))
    columns = torch.kron(columns.T.contiguous(), torch.eye(3, dtype=torch.float64))
    return upload(rows.to(dtype), device), upload(columns.to(dtype), device)


def resize(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images [B, 3, H, W], channels_last, as [B, 3, h, w] of the same dtype and layout."""
    count, _, height, width = x.shape
    lines = x.permute(0, 2, 3, 1).reshape(count * height, width * 3)
    narrow = (lines @ columns).view(count, height, -1)
    return torch.matmul(rows, narrow).view(count, len(rows), -1, 3).permute(0, 3, 1, 2)
