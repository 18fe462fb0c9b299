# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Mish in Triton, and the activations of all kernels here: the formulas of `activations.py` on float32 blocks."""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program; 8 a thread: one 16-byte access of bf16, two of float32
WARPS = 4


@triton.jit
def mish_value(x):
    e = tl.exp(tl.minimum(x, 20.0))
    q = e * (e + 2.0)
    return x * (q / (q + 2.0))


@triton.jit
def mish_slope(x):
    e = tl.exp(tl.minimum(x, 20.0))
    q = e * (e + 2.0)
    w = 1.0 / (q + 2.0)
    return tl.where(x > 20.0, 1.0, q * w + x * (4.0 * e * (e + 1.0) * w * w))


@triton.jit
def activate(x, activation: tl.constexpr):
    """act(x); NaN stays NaN."""
    if activation == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif activation == "mish":
        x = mish_value(x)
    return x


@triton.jit
def times_slope(gradient, x, activation: tl.constexpr):
    """gradient * act'(x)."""
    if activation == "relu":
        gradient = tl.where(x > 0.0, gradient, 0.0)
    elif activation == "mish":
        gradient = gradient * mish_slope(x)
    return gradient


@triton.jit
def forward_kernel(x, y, size, block: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * block  # 64 bits for the program's first element only
    lane = tl.arange(0, block)
    mask = lane < size - start
    value = tl.load(x + start + lane, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + start + lane, mish_value(value).to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(gradient, x, out, size, block: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * block
    lane = tl.arange(0, block)
    mask = lane < size - start
    g = tl.load(gradient + start + lane, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + start + lane, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + start + lane, (g * mish_slope(value)).to(out.dtype.element_ty), mask=mask)


def launch(kernel: Any, *tensors: Tensor) -> None:
    """Fill the last of `tensors`, all of them of one dtype and strides, without gaps."""
    size = tensors[0].numel()
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(size, BLOCK),)](*tensors, size, block=BLOCK, num_warps=WARPS)


forward, backward = partial(launch, forward_kernel), partial(launch, backward_kernel)
