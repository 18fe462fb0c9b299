"""Mish of a CPU's float32 or bfloat16 values: one exponential, in vectors, where PyTorch takes three functions."""

from torch import Tensor

from kernels.map_loops import flat, mish_gradients, mish_values
from kernels.threads import run


def forward(x: Tensor, y: Tensor) -> None:
    """Fill y, dense and laid out like x."""
    run(mish_values, x.numel(), flat(x), flat(y))


def backward(gradient: Tensor, x: Tensor, out: Tensor) -> None:
    """Fill `out`, dense and laid out like the others, with the gradient of x."""
    run(mish_gradients, x.numel(), flat(gradient), flat(x), flat(out))
