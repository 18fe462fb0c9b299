"""Blocks: residual ones, y = shortcut(x) + branch(x), and a plain one; the map is half as large where the stride is 2."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fastcifar.models.layers import (
    PYTORCHS,
    BatchNorm2d,
    Kernels,
    Norm,
    SqueezeExcitation,
    StochasticDepth,
    StochasticDepthMode,
    conv,
    dropout,
    idle,
    norm_act,
)


@dataclass(frozen=True)
class BlockSpec:
    """All that distinguishes one block of a network from another."""

    inputs: int  # channels
    outputs: int
    stride: int
    shortcut: str  # conv1x1_bn, conv3x3_bn or conv1x1; used where the shape changes
    activation: Callable[[], nn.Module]
    squeezes: bool  # whether it has squeeze-excitation
    se_bias: bool
    dropout: float
    drop_path: float  # stochastic depth: probability of dropping this block's branch
    drop_path_mode: StochasticDepthMode = "sample"
    kernels: Kernels = "torch"  # who computes BN, squeeze-excitation, sum and activation
    norm: Norm = PYTORCHS
    pools: bool = False  # ConvBlock: whether max pooling halves the map

    @property
    def changes_shape(self) -> bool:
        return self.stride != 1 or self.inputs != self.outputs


class BasicBlock(nn.Module):
    """Conv, BN, act, dropout, conv, BN, dropout, [squeeze-excitation], add, act (He et al., CVPR 2016; dropout: report A)."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.conv1 = conv(spec.inputs, spec.outputs, 3, spec.stride)
        self.bn1 = BatchNorm2d(spec.outputs, spec.norm)
        self.act1 = spec.activation()
        self.dropout1 = dropout(spec.dropout)
        self.conv2 = conv(spec.outputs, spec.outputs, 3)
        self.bn2 = BatchNorm2d(spec.outputs, spec.norm)
        self.dropout2 = dropout(spec.dropout)
        self.se = _squeeze_excitation(spec, spec.outputs)
        self.drop_path = _drop_path(spec)
        self.shortcut = _shortcut(spec)
        self.act2 = spec.activation()
        self.kernels = spec.kernels

    def forward(self, x: Tensor) -> Tensor:
        branch = self.dropout1(norm_act(self.conv1(x), self.bn1, self.act1, self.kernels))
        branch = self.conv2(branch)
        if idle(self.dropout2, self.drop_path):  # nothing random stands between BN and the sum
            project, bn = self.shortcut if isinstance(self.shortcut, nn.Sequential) else (self.shortcut, None)
            return norm_act(branch, self.bn2, self.act2, self.kernels, se=self.se, shortcut=project(x), shortcut_bn=bn)
        branch = self.se(self.dropout2(self.bn2(branch)))
        return self.act2(self.shortcut(x) + self.drop_path(branch))


class PreActivationBlock(nn.Module):
    """BN, act, [squeeze-excitation], conv, BN, act, dropout, conv, [stochastic depth], add (He et al., ECCV 2016; report C).

    Where the shape changes, the shortcut's convolution takes what the first convolution takes; elsewhere the input passes
    untouched.
    """

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(spec.inputs, spec.norm)
        self.act1 = spec.activation()
        self.se = _squeeze_excitation(spec, spec.inputs)
        self.conv1 = conv(spec.inputs, spec.outputs, 3, spec.stride)
        self.bn2 = BatchNorm2d(spec.outputs, spec.norm)
        self.act2 = spec.activation()
        self.dropout = dropout(spec.dropout)
        self.conv2 = conv(spec.outputs, spec.outputs, 3)
        self.drop_path = _drop_path(spec)
        self.shortcut = _shortcut(spec)
        self.projects = spec.changes_shape
        self.kernels = spec.kernels

    def forward(self, x: Tensor) -> Tensor:
        activated = norm_act(x, self.bn1, self.act1, self.kernels, se=self.se, se_last=True)
        branch = norm_act(self.conv1(activated), self.bn2, self.act2, self.kernels)
        branch = self.conv2(self.dropout(branch))
        return self.shortcut(activated if self.projects else x) + self.drop_path(branch)


class ConvBlock(nn.Module):
    """Conv, [2x2 max pooling], BN, [squeeze-excitation], act, dropout, and no shortcut.

    Pooling drops the last row and column of a map whose side is odd (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
    2024).
    """

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.conv = conv(spec.inputs, spec.outputs, 3, spec.stride)
        self.pool = nn.MaxPool2d(2) if spec.pools else nn.Identity()
        self.bn = BatchNorm2d(spec.outputs, spec.norm)
        self.se = _squeeze_excitation(spec, spec.outputs)
        self.act = spec.activation()
        self.dropout = dropout(spec.dropout)
        self.kernels = spec.kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(norm_act(self.pool(self.conv(x)), self.bn, self.act, self.kernels, se=self.se))


Block = BasicBlock | PreActivationBlock | ConvBlock


def _squeeze_excitation(spec: BlockSpec, channels: int) -> nn.Module:
    if not spec.squeezes:
        return nn.Identity()
    return SqueezeExcitation(channels, spec.activation, bias=spec.se_bias, kernels=spec.kernels)


def _drop_path(spec: BlockSpec) -> nn.Module:
    return StochasticDepth(spec.drop_path, spec.drop_path_mode) if spec.drop_path else nn.Identity()


def _shortcut(spec: BlockSpec) -> nn.Module:
    if not spec.changes_shape:
        return nn.Identity()
    projection = conv(spec.inputs, spec.outputs, 3 if spec.shortcut == "conv3x3_bn" else 1, spec.stride)
    return projection if spec.shortcut == "conv1x1" else nn.Sequential(projection, BatchNorm2d(spec.outputs, spec.norm))
