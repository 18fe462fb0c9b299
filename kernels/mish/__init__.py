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
    form = resolve("mish", backend, x)
    return reference.mish(x) if form == "torch" else _mish(x, form)


def like(x: Tensor, layout: Tensor) -> Tensor:
    """x itself when it lies in memory as `layout` does, else a copy that does: kernels then walk memory, not indices."""
    return x if x.stride() == layout.stride() else torch.empty_like(layout, dtype=x.dtype).copy_(x)


def _form(x: Tensor, form: str) -> Any:
    """The module whose forward and backward fill what they are given, or None; Triton's interpreter only if it is asked for."""
    if form == "triton" and runs_triton(x):
        from kernels.mish import triton

        return triton
    if runs_numba(x):
        from kernels.mish import numba

        return numba
    return None


@torch.library.custom_op("fastcifar::mish", mutates_args=())
def _mish(x: Tensor, form: str) -> Tensor:
    module, y = _form(x, form), torch.empty_like(x)
    if module is None:
        return reference.mish(x)
    module.forward(like(x, y), y)
    return y


@torch.library.custom_op("fastcifar::mish_backward", mutates_args=())
def _mish_backward(gradient: Tensor, x: Tensor, form: str) -> Tensor:
    module, result = _form(x, form), torch.empty_like(x)
    if module is None:
        return like(reference.gradient(gradient, x), result)
    module.backward(like(gradient, result), like(x, result), result)
    return result


def _keep(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    x, ctx.form = inputs
    ctx.save_for_backward(x)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _mish_backward(gradient, *ctx.saved_tensors, ctx.form), None


register_fake(_mish)(lambda x, _: torch.empty_like(x))
register_fake(_mish_backward)(lambda _, x, __: torch.empty_like(x))
_mish.register_autograd(_gradient, setup_context=_keep)
