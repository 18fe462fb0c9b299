"""Mish, y = x tanh(ln(1 + exp(x))) (Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", BMVC 2020).

The operator `fastcifar::mish` keeps nothing but x for its gradient. The formulas of value and slope: `activations.py`.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.backends import Backend, describe, resolve, runs_numba, runs_triton
from kernels.mish import reference
from kernels.operators import register_fake


def mish(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Mish of x: any shape, float32, float16 or bfloat16 (any float for "torch"), computed in float32 within the kernel.

    A dense x (contiguous, channels_last, permuted) is read where it lies; one with gaps is copied first, and the result has
    the layout PyTorch's own elementwise operations give. Autocast leaves the dtype as it is.

    Raises ValueError where the backend cannot serve x: naming its shape, dtype and device.
    """
    if not x.is_floating_point():
        raise ValueError(f"mish: x must be of a floating-point dtype, got {describe(x)}")
    return reference.mish(x) if resolve("mish", backend, x) == "torch" else _mish(x)


def like(x: Tensor, layout: Tensor) -> Tensor:
    """x itself when it lies in memory as `layout` does, else a copy that does: kernels then walk memory, not indices."""
    return x if x.stride() == layout.stride() else torch.empty_like(layout, dtype=x.dtype).copy_(x)


def _form(x: Tensor) -> Any:
    """The module whose forward and backward fill what they are given, or None."""
    if runs_triton(x):
        from kernels.mish import triton

        return triton
    if runs_numba(x):
        from kernels.mish import numba

        return numba
    return None


@torch.library.custom_op("fastcifar::mish", mutates_args=())
def _mish(x: Tensor) -> Tensor:
    form, y = _form(x), torch.empty_like(x)
    if form is None:
        return reference.mish(x)
    form.forward(like(x, y), y)
    return y


@torch.library.custom_op("fastcifar::mish_backward", mutates_args=())
def _mish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    form, result = _form(x), torch.empty_like(x)
    if form is None:
        return like(reference.gradient(gradient, x), result)
    form.backward(like(gradient, result), like(x, result), result)
    return result


def _gradient(ctx: Any, gradient: Tensor) -> Tensor:
    return _mish_backward(gradient, *ctx.saved_tensors)


register_fake(_mish)(lambda x: torch.empty_like(x))
register_fake(_mish_backward)(lambda _, x: torch.empty_like(x))
_mish.register_autograd(_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
