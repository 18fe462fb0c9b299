"""Feature maps [N, C, H, W] enter, feature maps leave: the layers between the convolutions."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.activations import Activation
from kernels.backends import resolve
from kernels.residual_tail import residual_tail, residual_tail_fusable, variant

# A backend of the kernels, or their algebra in PyTorch operations for the compiler to fuse: a peer in measurements.
Kernels = Literal["auto", "torch", "triton", "fusable"]
ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.Mish: "mish"}  # what the kernels know


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias whose padding keeps the map's size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class SqueezeExcitation(nn.Module):
    """Scale each channel by what the whole map says of it (Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018).

        s = sigmoid(W_expand act(W_reduce mean_hw(x)))        y = x * s

    No biases: with them none of the reports' parameter counts comes out. The bottleneck has channels // reduction units, at
    least one.
    """

    def __init__(self, channels: int, reduction: int, activation: Callable[[], nn.Module], kernels: Kernels = "torch") -> None:
        super().__init__()
        self.kernels = kernels
        hidden = max(channels // reduction, 1)
        self.reduce = nn.Linear(channels, hidden, bias=False)
        self.activation = activation()
        self.expand = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if _form("squeeze_excite", self.kernels, x, self.activation) == "triton":
            from kernels.squeeze_excite import squeeze_excite

            weights = (self.reduce.weight, self.expand.weight)
            return squeeze_excite(x, *weights, activation=ACTIVATIONS[type(self.activation)], backend="triton")
        squeezed = x.mean(dim=(2, 3))  # [N, C]
        scale = torch.sigmoid(self.expand(self.activation(self.reduce(squeezed))))
        return x * scale[:, :, None, None].to(x.dtype)


class StochasticDepth(nn.Module):
    """Drop a residual branch for whole samples in training, scaling the kept by 1 / survival (Huang et al., ECCV 2016)."""

    def __init__(self, drop_probability: float) -> None:
        super().__init__()
        self.drop_probability = drop_probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_probability == 0:
            return branch
        survival = 1 - self.drop_probability
        kept = torch.rand(len(branch), 1, 1, 1, device=branch.device) < survival
        return branch * (kept / survival).to(branch.dtype)

    def extra_repr(self) -> str:
        return f"p={self.drop_probability:.3g}"


def dropout(probability: float) -> nn.Module:
    """Dropout, or nothing at all when the probability is 0."""
    return nn.Dropout(probability) if probability else nn.Identity()


def norm_act(
    x: Tensor,
    bn: nn.Module,
    activation: nn.Module,
    kernels: Kernels,
    *,
    se: nn.Module | None = None,
    shortcut: Tensor | None = None,
) -> Tensor:
    """activation(shortcut + se(bn(x))), each of the two where given: by the modules themselves or as one fused operation."""
    squeezing = se if isinstance(se, SqueezeExcitation) else None
    name = ACTIVATIONS.get(type(activation), "none")
    form = _form(variant(shortcut, squeezing, name), kernels, x, activation, *([squeezing.activation] if squeezing else []))
    if form == "torch":
        y = bn(x) if se is None else se(bn(x))
        return activation(y if shortcut is None else shortcut + y)
    assert isinstance(bn, nn.BatchNorm2d)
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    linears = (squeezing.reduce, squeezing.expand) if squeezing else ()
    tail: Callable[..., Tensor] = residual_tail_fusable if form == "fusable" else partial(residual_tail, backend="triton")
    return tail(
        x, shortcut, bn.weight, bn.bias, bn.running_mean, bn.running_var,
        training=bn.training, momentum=bn.momentum, eps=bn.eps, activation=name,
        se=(*(linear.weight for linear in linears), *(linear.bias for linear in linears)) if squeezing else None,
        se_activation=ACTIVATIONS[type(squeezing.activation)] if squeezing else "relu",
    )  # fmt: skip


def idle(*layers: nn.Module) -> bool:
    """Whether dropout and stochastic depth of these layers do nothing now."""
    return not any(layer.training and not isinstance(layer, nn.Identity) for layer in layers)


def _form(kernel: str, kernels: Kernels, x: Tensor, *activations: nn.Module) -> Literal["torch", "triton", "fusable"]:
    """Which implementation of `kernel` serves x: "torch" where the kernels lack one of the activations."""
    if kernels == "torch" or any(type(activation) not in ACTIVATIONS for activation in activations):
        return "torch"
    return "fusable" if kernels == "fusable" else resolve(kernel, kernels, x)
