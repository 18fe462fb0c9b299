"""Rotation, shear and translation of batches of images, each by a matrix of its own."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.augment.operations import SIDE

Interpolation = Literal["nearest", "bilinear"]


def affine(pixels: Tensor, matrix: Tensor, interpolation: Interpolation) -> Tensor:
    """Move pixel values [B, 3, 32, 32] by inverse matrices [B, 2, 3], which take output to input pixels from the centre.

    Outside is black. Values stay whole numbers (bilinear ones are rounded). Equals torchvision's `affine` and `rotate`.
    """
    place = (torch.arange(SIDE, device=pixels.device, dtype=torch.float32) - (SIDE - 1) / 2) / (SIDE / 2)  # -1..1
    along_x = matrix[:, :, :1] * place  # [B, 2, 32]: what a column adds to both input coordinates
    along_y = matrix[:, :, 1:2] * place + matrix[:, :, 2:] / (SIDE / 2)  # what a row adds, and the shift
    grid = (along_y[:, :, :, None] + along_x[:, :, None, :]).permute(0, 2, 3, 1)  # [B, 32, 32, 2]
    moved = F.grid_sample(pixels, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    return moved if interpolation == "nearest" else moved.round_()


def rotation_matrix(degrees: Tensor) -> Tensor:
    """Inverse matrices [B, 2, 3] that turn images counter-clockwise by `degrees` [B] about the centre.

    x' = cos a x - sin a y        y' = sin a x + cos a y        (y points down)
    """
    angle = degrees * (math.pi / 180)
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).reshape(-1, 2, 3)


def shear_translate_matrix(shear_x: Tensor, shear_y: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Inverse matrices [B, 2, 3] of a shear about the upper left corner, then a move by whole pixels to the right and down.

    x' = x + shear_x (y + 16) - right        y' = y + shear_y (x + 16) - down
    """
    one = torch.ones_like(shear_x)
    half = SIDE / 2
    return torch.stack([one, shear_x, half * shear_x - right, shear_y, one, half * shear_y - down], dim=1).reshape(-1, 2, 3)
