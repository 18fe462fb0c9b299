"""A model and the recipe's scalars enter, a PyTorch optimizer leaves."""

from typing import Literal

import torch
from torch import nn

Kind = Literal["sgd", "nesterov", "adamw"]


def build_optimizer(
    model: nn.Module, kind: Kind, *, momentum: float, weight_decay: float, decay_norm_and_bias: bool
) -> torch.optim.Optimizer:
    """Build SGD, SGD with Nesterov momentum, or AdamW (decoupled decay, betas `momentum` and 0.999), one fused kernel a step.

    decay_norm_and_bias: True decays every parameter, as the reports do; False only those with two or more dimensions.
    The learning rate is set at every step by the caller.
    """
    decayed = [p for p in model.parameters() if decay_norm_and_bias or p.ndim >= 2]
    spared = [p for p in model.parameters() if not (decay_norm_and_bias or p.ndim >= 2)]
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, betas=(momentum, 0.999), fused=True)
    return torch.optim.SGD(groups, lr=1.0, momentum=momentum, nesterov=kind == "nesterov", fused=True)
