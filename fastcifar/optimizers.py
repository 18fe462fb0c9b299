"""PyTorch's optimizers as the recipes name them, and what a step sets on them."""

from typing import Literal

import torch
from torch import nn

Kind = Literal["sgd", "nesterov", "adam", "adamw"]


def build_optimizer(
    model: nn.Module, kind: Kind, *, momentum: float, weight_decay: float, decay_norm_and_bias: bool
) -> torch.optim.Optimizer:
    """Build SGD, SGD with Nesterov momentum, Adam or AdamW (betas `momentum` and 0.999), one fused kernel a step.

    Decay is added to the gradient (`sgd`, `nesterov`, `adam`) or decoupled from it (`adamw`). decay_norm_and_bias: True decays
    every parameter, as the reports do; False only those with two or more dimensions. Learning rate and momentum are set at
    every step by `set_step`.
    """
    decayed = [p for p in model.parameters() if decay_norm_and_bias or p.ndim >= 2]
    spared = [p for p in model.parameters() if not (decay_norm_and_bias or p.ndim >= 2)]
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    if kind in ("adam", "adamw"):
        adam = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
        return adam(groups, lr=1.0, betas=(momentum, 0.999), fused=True)
    return torch.optim.SGD(groups, lr=1.0, momentum=momentum, nesterov=kind == "nesterov", fused=True)


def set_step(optimizer: torch.optim.Optimizer, rate: float, momentum: float | None) -> None:
    """Set the learning rate and the momentum (Adam's first beta; None: as it is) of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        if momentum is None:
            continue
        if "momentum" in group:
            group["momentum"] = momentum
        else:
            group["betas"] = (momentum, group["betas"][1])
