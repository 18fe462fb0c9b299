"""The activations that the fused operations know, and their slopes, as PyTorch operations. Triton's are in mish/triton.py.

With e = exp(min(x, 20)), q = e (e + 2), w = 1 / (q + 2):

    mish(x) = x tanh(ln(1 + exp(x))) = x (q / (q + 2))        mish'(x) = 1 if x > 20, else q w + x (4 e (e + 1) w w)

Grouped so, nothing overflows at any finite x: x q alone would above 1.4e21, 4 x e on 256 of the bfloat16 values.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "mish"]


def activate(x: Tensor, activation: str) -> Tensor:
    """act(x); x itself for "none"."""
    return F.relu(x) if activation == "relu" else F.mish(x) if activation == "mish" else x


def slope(x: Tensor, activation: str) -> Tensor:
    """act'(x)."""
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "none":
        return torch.ones_like(x)
    e = x.clamp(max=20).exp()
    q = e * (e + 2)
    w = 1 / (q + 2)
    return torch.where(x > 20, 1, q * w + x * (4 * e * (e + 1) * w * w))
