"""Muon: momentum whose matrices are made orthogonal before they move the weights, and SGD for everything else.

Of a weight W [n, ...], seen as a matrix of n rows, with gradient G, momentum m, rate r (Jordan et al., "Muon: An optimizer for
hidden layers in neural networks", 2024; weights scaled as in airbench94_muon):

    M = m M + G        U = orthogonal(G + m M)        W = sqrt(n) W / |W| - r U

`orthogonal` brings all singular values of a matrix near 1 by a few Newton-Schulz steps; batch norm after a convolution makes
the weights' own scale meaningless, so it is set to that of orthogonal rows. (The last convolutions of report C's residual
branches have no norm before the sum: Muon fixes their scale.)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastcifar.device import computes_bf16

# Of the quintic a X + (b A + c A^2) X with A = X X^T: steepest at 0, so that few steps do; singular values end in 0.7..1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TINY = 1e-7


def orthogonal(matrices: Tensor, steps: int) -> Tensor:
    """`matrices` [K, n, m], each with its singular values brought near 1 by `steps` Newton-Schulz steps.

    Computed in the dtype given. The values are spread within 0.5..1.5 after 5 steps, a direction that was tiny is still small
    after 3.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) + TINY)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon on groups with `orthogonal`: True, SGD on the others. A group's `lr` may be a 0-d tensor on the device.

    momentum: Nesterov's, of groups that name none. weight_decay: added to the gradient of SGD's groups; the others have none,
    their scale is fixed. steps: of Newton and Schulz. Nothing in a step asks the host.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float = 1.0, *, momentum: float, weight_decay: float = 0.0, steps: int = 3
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "orthogonal": False})
        self.steps = steps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moved:
                continue
            directions = self._directions(moved, group)
            if group["orthogonal"]:
                directions = self._orthogonal(directions)
                norms = torch._foreach_norm(moved)
                torch._foreach_div_(norms, [len(weight) ** 0.5 for weight in moved])
                torch._foreach_div_(moved, norms)
            torch._foreach_mul_(directions, group["lr"])
            torch._foreach_sub_(moved, directions)

    def _directions(self, moved: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """New tensors: the gradients with Nesterov's momentum."""
        gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
        if group["weight_decay"] and not group["orthogonal"]:
            gradients = list(torch._foreach_add(gradients, moved, alpha=group["weight_decay"]))
        for parameter in moved:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in moved]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))

    def _orthogonal(self, directions: list[Tensor]) -> list[Tensor]:
        """Every direction made orthogonal, those of one shape in one product."""
        dtype = torch.bfloat16 if computes_bf16(directions[0].device) else torch.float32
        by_shape: dict[tuple[int, int], list[int]] = {}
        for number, direction in enumerate(directions):
            by_shape.setdefault((len(direction), direction[0].numel()), []).append(number)
        result = list(directions)
        for numbers in by_shape.values():
            stacked = torch.stack([directions[number].flatten(1) for number in numbers]).to(dtype)
            for number, made in zip(numbers, orthogonal(stacked, self.steps), strict=True):
                result[number] = made.to(directions[number].dtype).view(directions[number].shape)
        return result
