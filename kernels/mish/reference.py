"""Mish in plain PyTorch: the definition, the oracle of the tests (in float64), what CPU tensors run."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mish(x: Tensor) -> Tensor:
    """x tanh(ln(1 + exp(x)))."""
    return F.mish(x)


def gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of mish(x)."""
    return torch.ops.aten.mish_backward(gradient, x)
