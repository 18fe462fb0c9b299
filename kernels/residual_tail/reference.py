"""The residual tail in plain PyTorch: the definition, the oracle of the tests (in float64), the baseline of measurements."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activations import Activation, activate
from kernels.squeeze_excite.reference import squeeze_excite

TailActivation = Literal["relu", "mish", "none"]
BatchNorm = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, bias, running_mean and running_var, each [C]
# w_reduce [R, C], w_expand [C, R] and, where there are any, b_reduce [R] and b_expand [C]
SqueezeExcitation = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def residual_tail(
    conv_out: Tensor, shortcut: Tensor | None, bn_weight: Tensor, bn_bias: Tensor, running_mean: Tensor, running_var: Tensor, *,
    training: bool, momentum: float, eps: float, se: SqueezeExcitation | None = None, se_activation: Activation = "relu",
    activation: TailActivation = "relu", se_last: bool = False,
) -> Tensor:  # fmt: skip
    """act(shortcut + SE(BN(conv_out))), the end of a residual block (He et al., CVPR 2016); running statistics move in place.

    conv_out, shortcut [N, C, H, W]; the statistics and bn_* [C]; se: (w_reduce [R, C], w_expand [C, R]),
    or these and (b_reduce [R] or None, b_expand [C] or None). se_last: SE(act(BN(conv_out))) instead.
    """
    y = F.batch_norm(conv_out, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    if se is not None and not se_last:
        y = squeeze_excite(y, se[0], se[1], se_activation, *se[2:])
    y = activate(y if shortcut is None else shortcut + y, activation)
    if se is not None and se_last:
        y = squeeze_excite(y, se[0], se[1], se_activation, *se[2:])
    return y.contiguous(memory_format=torch.channels_last)
