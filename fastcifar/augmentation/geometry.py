"""Rotation, shear and translation of batches of images, each by a matrix of its own."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.augment.operations import Size

Interpolation = Literal["nearest", "bilinear"]


def affine(pixels: Tensor, matrix: Tensor, interpolation: Interpolation) -> Tensor:
    """Move pixel values [B, 3, H, W] by inverse matrices [B, 2, 3], which take output to input pixels from the centre.

    Outside is black. Values stay whole numbers (bilinear ones are rounded). Equals torchvision's `affine` and `rotate`.
    """
    height, width = pixels.shape[2:]
    rows, columns = (torch.arange(n, device=pixels.device, dtype=torch.float32) - (n - 1) / 2 for n in (height, width))
    to_x, to_y = matrix.unbind(1)  # [B, 3]: the input's column and row, grid_sample's from -1 to 1
    scaled = torch.stack([to_x / (width / 2), to_y / (height / 2)], 1)
    along_x = scaled[:, :, :1] * columns  # [B, 2, W]: what a column adds to both input coordinates
    along_y = scaled[:, :, 1:2] * rows + scaled[:, :, 2:]  # [B, 2, H]: what a row adds, and the shift
    grid = (along_y[:, :, :, None] + along_x[:, :, None, :]).permute(0, 2, 3, 1)  # [B, H, W, 2]
    moved = F.grid_sample(pixels, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    return moved if interpolation == "nearest" else moved.round_()


def rotation_matrix(degrees: Tensor) -> Tensor:
    """Inverse matrices [B, 2, 3] that turn images counter-clockwise by `degrees` [B] about the centre.

    x' = cos a x - sin a y        y' = sin a x + cos a y        (y points down)
    """
    angle = degrees * (math.pi / 180)
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).reshape(-1, 2, 3)


def shear_translate_matrix(shear_x: Tensor, shear_y: Tensor, right: Tensor, down: Tensor, size: Size) -> Tensor:
    """Inverse matrices [B, 2, 3] of a shear about the upper left corner, then a move by whole pixels to the right and down.

    x' = x + shear_x (y + H/2) - right        y' = y + shear_y (x + W/2) - down
    """
    one, (height, width) = torch.ones_like(shear_x), size
    shift_x, shift_y = height / 2 * shear_x - right, width / 2 * shear_y - down
    return torch.stack([one, shear_x, shift_x, shear_y, one, shift_y], dim=1).reshape(-1, 2, 3)
