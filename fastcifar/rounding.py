"""Convolutions' weights rounded for a whole step at once: autocast would launch a cast for each, and one for each gradient."""

import torch
from torch import Tensor, nn


class RoundedWeights:
    """Weights and biases of a model's convolutions in autocast's dtype, and the way of their gradients back to the parameters.

    The same roundings of the same numbers as autocast's. dtype: None leaves everything to the model.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        parts = [(f"{name}.{part}", weight) for name, module in convolutions for part, weight in module.named_parameters()]
        self._weights: list[Tensor] = [weight for _, weight in parts] if dtype is not None else []
        self.by_name: dict[str, Tensor] = {
            name: torch.empty_like(weight, dtype=dtype, requires_grad=True) for name, weight in parts if dtype is not None
        }

    @torch.no_grad()
    def round(self) -> None:
        """Take the parameters' values and whether they are trained, and forget the gradients."""
        rounded = list(self.by_name.values())
        for each, weight in zip(rounded, self._weights, strict=True):
            each.grad = None
            each.requires_grad_(weight.requires_grad)
        if rounded:
            torch._foreach_copy_(rounded, self._weights)

    @torch.no_grad()
    def widen(self) -> None:
        """Give the parameters the gradients of their rounded values."""
        rounded = zip(self._weights, self.by_name.values(), strict=True)
        pairs = [(weight, each.grad) for weight, each in rounded if each.grad is not None]
        wide = [torch.empty_like(weight) for weight, _ in pairs]
        if wide:
            torch._foreach_copy_(wide, [gradient for _, gradient in pairs])
        for (weight, _), gradient in zip(pairs, wide, strict=True):
            weight.grad = gradient
