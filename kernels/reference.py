"""The definitions in plain PyTorch: tensors enter, the same functions' results leave.

They are the oracle of every test (in float64), the path of CPU tensors, and the baseline of every measurement.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "mish"]
# w_reduce [R, C], w_expand [C, R] and, where there are any, b_reduce [R] and b_expand [C]
SqueezeExcitation = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def mish(x: Tensor) -> Tensor:
    """x tanh(ln(1 + exp(x))) (Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", BMVC 2020)."""
    return F.mish(x)


def squeeze_excite(
    x: Tensor,
    w_reduce: Tensor,
    w_expand: Tensor,
    activation: Activation = "relu",
    b_reduce: Tensor | None = None,
    b_expand: Tensor | None = None,
) -> Tensor:
    """x * sigmoid(w_expand act(w_reduce mean_hw(x) + b_reduce) + b_expand) (Hu et al., CVPR 2018).

    x [N, C, H, W], w_reduce [R, C], w_expand [C, R], b_reduce [R], b_expand [C]; the result has x's shape and dtype.
    """
    squeezed = x.mean(dim=(2, 3)).to(w_reduce.dtype)  # [N, C]
    hidden = F.linear(squeezed, w_reduce, b_reduce)  # [N, R]
    scale = torch.sigmoid(F.linear(mish(hidden) if activation == "mish" else F.relu(hidden), w_expand, b_expand))
    return x * scale[:, :, None, None].to(x.dtype)


def residual_tail(
    conv_out: Tensor,
    shortcut: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float,
    eps: float,
    se: SqueezeExcitation | None = None,
    se_activation: Activation = "relu",
    activation: Literal["relu", "mish", "none"] = "relu",
) -> Tensor:
    """act(shortcut + SE(BN(conv_out))), the end of a residual block (He et al., CVPR 2016); running statistics move in place.

    conv_out, shortcut [N, C, H, W]; the statistics and bn_* [C]; se: (w_reduce [R, C], w_expand [C, R]),
    or these and (b_reduce [R] or None, b_expand [C] or None).
    """
    y = F.batch_norm(conv_out, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    if se is not None:
        y = squeeze_excite(y, se[0], se[1], se_activation, *se[2:])
    if shortcut is not None:
        y = shortcut + y
    y = mish(y) if activation == "mish" else F.relu(y) if activation == "relu" else y
    return y.contiguous(memory_format=torch.channels_last)
