"""Dropout drawn by Philox (Srivastava et al., "Dropout", JMLR 2014): what is dropped depends on the sample, not on its batch.

    y = x keep / (1 - p)        dx = dy keep / (1 - p)        keep = r >= round(2^16 p)

r of a sample's element e, counted as channels_last memory has them (h, w, c), is the 16-bit value e mod 8 of the Philox words
at the counter (sample, epoch, DROPOUT | layer << 8, e // 8), the low half of each word first. For the backward pass a byte is
kept for every eight elements.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.backends import describe
from kernels.dropout import reference
from kernels.operators import register_fake


def dropout(x: Tensor, samples: Tensor, epoch: Tensor, *, probability: float, layer: int, seed: int) -> Tensor:
    """x with each element dropped, or divided by 1 - probability: computed in float32 (float64 for float64), rounded once.

    x: [N, C, ...], any float; the result's memory is channels_last. samples: [N] int64 and epoch: [] int64, each 0..2^32-1, on
    x's device. probability: 0 to below 1. layer: 0..2^24-1, apart for every layer of a network. seed: 0..2^63-1. Numba computes
    float32 and bfloat16 on a CPU, PyTorch the rest, bit for bit alike.

    Raises ValueError where an argument is not so.
    """
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(f"dropout: x must be [N, C, ...] of a floating-point dtype, got {describe(x)}")
    if samples.shape != x.shape[:1] or epoch.shape or {samples.dtype, epoch.dtype} != {torch.int64}:
        raise ValueError(f"dropout: samples must be [{len(x)}] and epoch [], int64, got {describe(samples)}, {describe(epoch)}")
    if not (0 <= probability < 1 and 0 <= layer < 1 << 24):
        raise ValueError(f"dropout: probability must be 0 to below 1, layer 0..2^24-1, got {probability} and {layer}")
    return _dropout(x, samples, epoch, probability, layer, seed)[0] if probability else x


def as_rows(x: Tensor) -> Tensor:
    """[N, C, ...] -> [N, E] contiguous, each sample's elements in channels_last order; no copy where they lie so."""
    return x.movedim(1, -1).flatten(1).contiguous()


def as_map(rows: Tensor, x: Tensor) -> Tensor:
    """Rows [N, E] shaped as x: [N, C, ...] channels_last."""
    return rows.view(x.movedim(1, -1).shape).movedim(-1, 1)


def _kernels(x: Tensor) -> ModuleType:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return reference
    from kernels.dropout import numba

    return numba


@torch.library.custom_op("fastcifar::dropout", mutates_args=())
def _dropout(x: Tensor, samples: Tensor, epoch: Tensor, probability: float, layer: int, seed: int) -> tuple[Tensor, Tensor]:
    """y, and the mask [N, ceil(E / 8)] uint8, whose lowest bit is the first of eight elements."""
    rows = as_rows(x)
    mask = _kernels(x).draw(samples, epoch, rows.shape[1], probability, layer, seed)
    return as_map(_kernels(x).apply(rows, mask, probability), x), mask


@torch.library.custom_op("fastcifar::dropout_backward", mutates_args=())
def _dropout_backward(gradient: Tensor, mask: Tensor, probability: float) -> Tensor:
    return as_map(_kernels(gradient).apply(as_rows(gradient), mask, probability), gradient)


def _gradient(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _dropout_backward(gradient, *ctx.saved_tensors, ctx.probability), None, None, None, None, None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.probability = inputs[3]


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = as_rows(x)
    mask = torch.empty(len(rows), -(-rows.shape[1] // 8), dtype=torch.uint8, device=x.device)
    return as_map(torch.empty_like(rows), x), mask


register_fake(_dropout)(lambda x, *_: _results(x))
register_fake(_dropout_backward)(lambda gradient, *_: _results(gradient)[0])
_dropout.register_autograd(_gradient, setup_context=_keep)
