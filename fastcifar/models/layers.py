"""The layers between the convolutions, on feature maps [N, C, H, W]."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.activations import Activation
from kernels.backends import resolve
from kernels.residual_tail import residual_tail, variant

# A backend of the kernels, or their algebra in PyTorch operations for the compiler to fuse: a baseline in measurements.
Kernels = Literal["auto", "torch", "triton", "fusable"]
StochasticDepthMode = Literal["sample", "batch"]
ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.Mish: "mish"}  # what the kernels know


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """A convolution whose padding keeps the map's size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's, but for its count of batches, which the training step moves for all layers at once."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.momentum is not None
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)


class SqueezeExcitation(nn.Module):
    """Scale each channel by what the whole map says of it (Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018).

        s = sigmoid(W_expand act(W_reduce mean_hw(x) + b_reduce) + b_expand)        y = x * s

    The bottleneck has channels // reduction units, at least one. bias: whether b_reduce and b_expand exist.
    """

    def __init__(
        self, channels: int, activation: Callable[[], nn.Module], *, reduction: int = 16, bias: bool, kernels: Kernels = "torch"
    ) -> None:
        super().__init__()
        self.kernels = kernels
        hidden = max(channels // reduction, 1)
        self.reduce = nn.Linear(channels, hidden, bias=bias)
        self.activation = activation()
        self.expand = nn.Linear(hidden, channels, bias=bias)

    @property
    def parameters_of_kernels(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """w_reduce [R, C], w_expand [C, R], b_reduce [R] and b_expand [C], as the kernels take them."""
        return self.reduce.weight, self.expand.weight, self.reduce.bias, self.expand.bias

    def forward(self, x: Tensor) -> Tensor:
        if _form("squeeze_excite", self.kernels, x, self.activation) == "triton":
            from kernels.squeeze_excite import squeeze_excite

            w_reduce, w_expand, b_reduce, b_expand = self.parameters_of_kernels
            activation = ACTIVATIONS[type(self.activation)]
            return squeeze_excite(x, w_reduce, w_expand, activation, b_reduce, b_expand, backend="triton")
        squeezed = x.mean(dim=(2, 3))  # [N, C]
        scale = torch.sigmoid(self.expand(self.activation(self.reduce(squeezed))))
        return x * scale[:, :, None, None].to(x.dtype)


class StochasticDepth(nn.Module):
    """Drop a residual branch in training (Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016).

    mode: sample draws for every sample and scales the kept by 1 / survival; batch draws once for the whole batch and scales
    nothing, as report C does. Report C's dropped blocks have no gradients, so that its SGD skips their weights in that step;
    ours are 0, and momentum and decay go on: a multiplication needs no host wait, a branch would.
    """

    def __init__(self, drop_probability: float, mode: StochasticDepthMode = "sample") -> None:
        super().__init__()
        self.drop_probability, self.mode = drop_probability, mode

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_probability == 0:
            return branch
        survival = 1 - self.drop_probability
        if self.mode == "batch":
            return branch * (torch.rand(1, 1, 1, 1, device=branch.device) < survival).to(branch.dtype)
        kept = torch.rand(len(branch), 1, 1, 1, device=branch.device) < survival
        return branch * (kept / survival).to(branch.dtype)

    def extra_repr(self) -> str:
        return f"p={self.drop_probability:.3g}, mode={self.mode}"


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
    shortcut_bn: nn.Module | None = None,
) -> Tensor:
    """activation(shortcut_bn(shortcut) + se(bn(x))), each where given: by the modules themselves or as one fused operation."""
    squeezing = se if isinstance(se, SqueezeExcitation) else None
    name = ACTIVATIONS.get(type(activation), "none")
    form = _form(variant(shortcut, squeezing, name), kernels, x, activation, *([squeezing.activation] if squeezing else []))
    if shortcut is not None and shortcut_bn is not None and form != "triton":
        shortcut, shortcut_bn = shortcut_bn(shortcut), None
    if form == "torch":
        y = bn(x) if se is None else se(bn(x))
        return activation(y if shortcut is None else shortcut + y)
    assert isinstance(bn, nn.BatchNorm2d)
    tail: Callable[..., Tensor] = partial(residual_tail, backend=form)
    return tail(
        x, shortcut, *_vectors(bn), shortcut_bn=None if shortcut_bn is None else _vectors(shortcut_bn),
        training=bn.training, momentum=bn.momentum, eps=bn.eps, activation=name,
        se=squeezing.parameters_of_kernels if squeezing else None,
        se_activation=ACTIVATIONS[type(squeezing.activation)] if squeezing else "relu",
    )  # fmt: skip


def _vectors(bn: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, bias, running mean and variance, as the kernels take them."""
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def idle(*layers: nn.Module) -> bool:
    """Whether dropout and stochastic depth of these layers do nothing now."""
    return not any(layer.training and not isinstance(layer, nn.Identity) for layer in layers)


def _form(kernel: str, kernels: Kernels, x: Tensor, *activations: nn.Module) -> Literal["torch", "triton", "fusable"]:
    """Which implementation of `kernel` serves x: "torch" where the kernels lack one of the activations."""
    if kernels == "torch" or any(type(activation) not in ACTIVATIONS for activation in activations):
        return "torch"
    return "fusable" if kernels == "fusable" else resolve(kernel, kernels, x)
