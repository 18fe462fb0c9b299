"""Which implementation of an operation runs, and what all of them share.

torch    the reference in plain PyTorch: any device, any dtype, the baseline of every measurement
numba    our passes over a CPU's float32 and bfloat16 maps, where PyTorch has more
triton   our fused kernel: CUDA tensors, or CPU tensors under the interpreter (TRITON_INTERPRET=1 before the first import)
auto     numba on a CPU where it can serve and there is Mish or squeeze-excitation, else torch: which of a network's operations
         gain from our kernels is measured in its training step (`fastcifar.plan`)
"""

import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "numba", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "numba", "triton")
GAINS = ("mish", "se+", "squeeze_excite")  # kinds of operation with these in their name; PyTorch's ReLU tails are as fast
DTYPE_NAMES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOATS = tuple(DTYPE_NAMES.values())


def interpreting() -> bool:
    """Whether Triton runs on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve(kernel: str, backend: Backend, x: Tensor) -> Literal["torch", "numba", "triton"]:
    """Choose the implementation of `kernel` for a feature map x [N, C, H, W] (or any shape, for elementwise kernels).

    Raises ValueError for an unknown backend, and for numba and triton where they cannot run: naming x's shape, dtype, device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{kernel}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "numba" if runs_numba(x) and any(part in kernel for part in GAINS) else "torch"
    if backend == "triton" and not (x.is_cuda or interpreting()):
        raise ValueError(f"{kernel}: triton needs a CUDA tensor (or TRITON_INTERPRET=1), got {describe(x)}")
    if backend == "triton" and x.dtype not in FLOATS:
        raise ValueError(f"{kernel}: triton takes float32, float16 or bfloat16, got {describe(x)}")
    if backend == "numba" and not runs_numba(x):
        raise ValueError(f"{kernel}: numba takes filled float32 or bfloat16 tensors of a CPU, got {describe(x)}")
    return backend


def runs_triton(x: Tensor) -> bool:
    """Whether an operator called with x launches a Triton kernel: an empty tensor needs none."""
    return (x.is_cuda or interpreting()) and x.dtype in FLOATS and x.numel() > 0


def runs_numba(x: Tensor) -> bool:
    """Whether the loops of a CPU can serve x."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0


def wide(x: Tensor) -> Tensor:
    """x in the dtype everything is computed in: float32, or float64 for float64."""
    return cast(x, working_dtype(x))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; not even a call of `to` where it is so already.

    The compiler of torch 2.11 loses the gradient of a Function whose result is handed through by an operation that does
    nothing (`to`, `contiguous`): silently, the gradients are 0.
    """
    return x if x.dtype == dtype else x.to(dtype)


def working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def unfilled(x: Tensor, *shape: int) -> Tensor:
    """A new tensor on x's device in the dtype everything is computed in."""
    return torch.empty(shape, dtype=working_dtype(x), device=x.device)


def describe(x: Tensor) -> str:
    """For messages: shape, dtype and device."""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
