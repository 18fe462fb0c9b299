"""Batches made smaller or larger on the device: bilinear, antialiased, as two matrix products."""

from functools import cache

import torch
from torch import Tensor

from fastcifar.beton import SIDE
from fastcifar.device import upload

Weights = tuple[Tensor, Tensor]  # of rows [size, 32]; of a row's channels side by side [3 x 32, 3 x size]


def bilinear(size: int) -> Tensor:
    """The weight of each of 32 pixels of a line in each of `size`: [size, 32] float64, whose rows sum to 1.

        w[i, j] ~ max(0, 1 - |j + 1/2 - c_i| / s),   c_i = (i + 1/2) 32 / size,   s = max(1, 32 / size)

    A triangle as wide as a pixel of the result, as F.interpolate's with antialias=True.
    """
    scale = SIDE / size
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(SIDE, dtype=torch.float64) + 0.5 - centres[:, None]).abs()
    weights = (1 - distance / max(1.0, scale)).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


@cache
def resize_weights(size: int, dtype: torch.dtype, device: torch.device) -> Weights:
    """What `resize` takes for images of `dtype`, copied to `device` once, without waiting for it."""
    rows = bilinear(size)
    columns = torch.kron(rows.T.contiguous(), torch.eye(3, dtype=torch.float64))
    return upload(rows.to(dtype), device), upload(columns.to(dtype), device)


def resize(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images [B, 3, 32, 32], channels_last, as [B, 3, size, size] of the same dtype and layout."""
    count, size = len(x), len(rows)
    lines = x.permute(0, 2, 3, 1).reshape(count * SIDE, SIDE * 3)
    narrow = (lines @ columns).view(count, SIDE, size * 3)
    return torch.matmul(rows, narrow).view(count, size, size, 3).permute(0, 3, 1, 2)
