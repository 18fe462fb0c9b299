"""A tensor enters; its Mish leaves, in the same shape, dtype and memory layout, with a gradient.

    y = x tanh(ln(1 + exp(x)))

The operator `fastcifar::mish` serves what torch.compile, autograd and a captured graph see as one call: our Triton kernel on
CUDA (and on the CPU under Triton's interpreter), the definition elsewhere. It keeps nothing but x for its gradient.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.backends import Backend, describe, resolve, runs_triton


def mish(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Mish of x: any shape, float32, float16 or bfloat16 (any float for "torch"), computed in float32 within the kernel.

    A dense x (contiguous, channels_last, permuted) is read where it lies; one with gaps is copied first, and the result has
    the layout PyTorch's own elementwise operations give. Autocast leaves the dtype as it is.

    Raises ValueError where the backend cannot serve x: naming its shape, dtype and device.
    """
    if not x.is_floating_point():
        raise ValueError(f"mish: x must be of a floating-point dtype, got {describe(x)}")
    return reference.mish(x) if resolve("mish", backend, x) == "torch" else _mish(x)


@torch.library.custom_op("fastcifar::mish", mutates_args=())
def _mish(x: Tensor) -> Tensor:
    if not runs_triton(x):
        return reference.mish(x)
    from kernels import mish_triton

    y = torch.empty_like(x)
    mish_triton.forward(like(x, y), y)
    return y


@torch.library.custom_op("fastcifar::mish_backward", mutates_args=())
def _mish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    if not runs_triton(x):
        return like(torch.ops.aten.mish_backward(gradient, x), torch.empty_like(x))
    from kernels import mish_triton

    result = torch.empty_like(x)
    mish_triton.backward(like(gradient, result), like(x, result), result)
    return result


def like(x: Tensor, layout: Tensor) -> Tensor:
    """x itself when it lies in memory as `layout` does, else a copy that does: kernels then walk memory, not indices."""
    return x if x.stride() == layout.stride() else torch.empty_like(layout, dtype=x.dtype).copy_(x)


@_mish.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_mish_backward.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
    return _mish_backward(gradient, *ctx.saved_tensors)  # type: ignore[attr-defined]


_mish.register_autograd(_gradient, setup_context=_keep)
