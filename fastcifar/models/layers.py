"""Feature maps [N, C, H, W] enter, feature maps leave: the layers between the convolutions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias whose padding keeps the map's size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class SqueezeExcitation(nn.Module):
    """Scale each channel by what the whole map says of it (Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018).

        s = sigmoid(W_expand act(W_reduce mean_hw(x)))        y = x * s

    No biases: with them none of the reports' parameter counts comes out. The bottleneck has channels // reduction units, at
    least one.
    """

    def __init__(self, channels: int, reduction: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.reduce = nn.Linear(channels, hidden, bias=False)
        self.activation = activation()
        self.expand = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
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
