# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Mish in Triton: maps of one memory layout enter, the map or its gradient in that layout leaves.

Apart from `mish.py` so that `import kernels` does not import Triton; only what runs or compiles a kernel imports this.

    e = exp(min(x, 20))        q = e (e + 2)        y = x (q / (q + 2))
    w = 1 / (q + 2)            y' = 1 if x > 20, else q w + x (4 e (e + 1) w w)

tanh(ln(1 + e)) = q / (q + 2) exactly (Misra, "Mish", BMVC 2020), so one exponential serves. At x = 20 the quotient is 1 in
float32, and 4 e (e + 1) is still finite. Grouped so, nothing overflows at any finite x: x q alone would above 1.4e21.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program; 8 a thread: one 16-byte access of bf16, two of float32
WARPS = 4


@triton.jit
def mish_value(x):
    """Mish of a float32 block."""
    e = tl.exp(tl.minimum(x, 20.0))
    q = e * (e + 2.0)
    return x * (q / (q + 2.0))


@triton.jit
def mish_slope(x):
    """The derivative of Mish at a float32 block."""
    e = tl.exp(tl.minimum(x, 20.0))
    q = e * (e + 2.0)
    w = 1.0 / (q + 2.0)
    return tl.where(x > 20.0, 1.0, q * w + x * (4.0 * e * (e + 1.0) * w * w))


@triton.jit
def activated(z, activation: tl.constexpr):
    """act(z) of a float32 block; NaN stays NaN."""
    if activation == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif activation == "mish":
        z = mish_value(z)
    return z


@triton.jit
def forward_kernel(x_pointer, y_pointer, size, block: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * block
    lane = tl.arange(0, block)
    inside = lane < size - start
    x = tl.load(x_pointer + start + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_pointer + start + lane, mish_value(x).to(y_pointer.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(gradient_pointer, x_pointer, result_pointer, size, block: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * block
    lane = tl.arange(0, block)
    inside = lane < size - start
    gradient = tl.load(gradient_pointer + start + lane, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_pointer + start + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(result_pointer + start + lane, (gradient * mish_slope(x)).to(result_pointer.dtype.element_ty), mask=inside)


def forward(x: Tensor, y: Tensor) -> None:
    """Fill y, which has x's dtype and strides and, like x, no gaps."""
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), block=BLOCK, num_warps=WARPS)


def backward(gradient: Tensor, x: Tensor, result: Tensor) -> None:
    """Fill `result` = gradient * mish'(x); all three of one dtype and strides, without gaps."""
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(x.numel(), BLOCK),)
        backward_kernel[grid](gradient, x, result, x.numel(), block=BLOCK, num_warps=WARPS)
