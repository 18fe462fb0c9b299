"""The table of architectures: every variant is one row of `ARCHITECTURES`, and adding one is adding a row.

The rows specify the models of five student reports on CIFAR-10 (A to E, see the README) as their authors' notebooks build
them, and the field's ResNet-18. Parameter counts are exact and tested: a row that misses its count is a different model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastcifar.beton import SMALLEST
from fastcifar.errors import InputError, unknown
from fastcifar.models.blocks import BasicBlock, Block, ConvBlock, PreActivationBlock
from fastcifar.models.layers import PYTORCHS, Kernels, Norm, StochasticDepthMode, require_known
from fastcifar.models.resnet import Downsampling, Initialisation, Pooling, ResNet, Stem

BUDGET = 5_000_000  # trainable parameters a report was allowed

# Rows that were other networks in version 0.1, before their authors' notebooks were read, with their parameters then: their
# run folders and checkpoints of that version do not fit.
REVISED = {
    "light_resnet18": 2_810_154,
    "light_resnet18_v2_40": 4_389_170,
    "light_resnet18_v2_45": 4_999_535,
    "se_resnet18": 2_818_090,
    "mish_se_resnet18": 4_569_642,
}


@dataclass(frozen=True)
class Architecture:
    """One row: what distinguishes a network from its sisters."""

    report: str  # A to E, "-" for those of no report
    parameters: int  # trainable, with 10 classes
    widths: tuple[int, ...]  # channels of each stage; a stem of 3x3 has the first
    blocks: tuple[int, ...]  # blocks of each stage
    block: type[Block] = BasicBlock
    shortcut: str = "conv1x1_bn"  # where the shape changes: conv1x1_bn, conv3x3_bn or conv1x1
    activation: Callable[[], nn.Module] = nn.ReLU
    se_stages: tuple[int, ...] = ()  # stages (from 1) whose blocks have squeeze-excitation, reduction 16
    se_bias: bool = False  # biases in squeeze-excitation's two linear layers
    stem_bias: bool = False  # a bias in the first convolution, though batch norm follows
    initialisation: Initialisation = "pytorch"
    stem: Stem = "conv3x3"
    downsampling: Downsampling = "stride"
    pooling: Pooling = "mean"
    head_bias: bool = True  # a bias in the classifier
    logit_scale: float = 1.0  # factor of the classifier's output
    norm: Norm = PYTORCHS

    @property
    def stages(self) -> str:
        """For tables: `32x2 64x2`."""
        return " ".join(f"{width}x{count}" for width, count in zip(self.widths, self.blocks, strict=True))


def _light_resnet18(parameters: int, widths: tuple[int, ...]) -> Architecture:
    """Report C's LightResNet18 family: squeeze-excitation with biases on the activated input of every block."""
    return Architecture(
        "C", parameters, widths, (2, 2, 2, 2), PreActivationBlock, "conv1x1",
        se_stages=(1, 2, 3, 4), se_bias=True, initialisation="kaiming_small_head",
    )  # fmt: skip


def _speed(parameters: int, widths: tuple[int, ...], block: type[Block] = ConvBlock) -> Architecture:
    """The family of airbench94 (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024; airbench94_muon's form)."""
    return Architecture(
        "-", parameters, widths, (1, 1, 1), block, activation=nn.GELU, initialisation="dirac", stem="whitening",
        downsampling="pooled_conv", pooling="max", head_bias=False, logit_scale=1 / widths[-1],
        norm=Norm(momentum=0.4, eps=1e-12, scales=False),
    )  # fmt: skip


ARCHITECTURES: dict[str, Architecture] = {
    "dropout_resnet24": Architecture("A", 1_177_130, (32, 64, 128), (4, 4, 3)),
    # Report B's shortcuts are 3x3 convolutions.
    "resnet42": Architecture("B", 4_907_445, (32, 64, 96, 128, 185), (4, 4, 4, 4, 4), shortcut="conv3x3_bn"),
    "light_resnet18": _light_resnet18(2_811_192, (32, 64, 128, 256)),
    "light_resnet18_v2_40": _light_resnet18(4_389_826, (40, 80, 160, 320)),
    "light_resnet18_v2_45": _light_resnet18(4_998_947, (45, 90, 170, 340)),
    "robust_resnet64": Architecture(
        "C", 3_799_978, (32, 64, 128), (10, 10, 10), PreActivationBlock, "conv1x1", initialisation="kaiming_small_head"
    ),
    "se_resnet18": Architecture("D", 2_818_122, (32, 64, 128, 256), (2, 2, 2, 2), se_stages=(3, 4), stem_bias=True),
    "mish_se_resnet18": Architecture(
        "E", 4_570_934, (32, 64, 256, 256), (2, 2, 2, 2), activation=nn.Mish, se_stages=(1, 2, 3, 4), se_bias=True
    ),
    "resnet18": Architecture("-", 11_173_962, (64, 128, 256, 512), (2, 2, 2, 2), initialisation="kaiming"),
    "speed94_half": _speed(497_240, (32, 128, 128)),
    "speed94": _speed(1_971_352, (64, 256, 256)),
    "speed95": _speed(4_604_440, (128, 384, 384)),
    "speed96": _speed(4_836_760, (128, 304, 304), BasicBlock),  # the widest below 5,000,000, in steps of 16
}


def architecture(name: str) -> Architecture:
    """Return a row by name. Raises InputError with the nearest name when there is none."""
    if name not in ARCHITECTURES:
        raise unknown("arch", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def build_model(
    name: str,
    num_classes: int = 10,
    *,
    block_dropout: float = 0.0,
    head_dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    stochastic_depth_mode: StochasticDepthMode = "sample",
    squeeze_excitation: bool = True,
    stem_stride: int = 1,
    kernels: Kernels = "auto",
) -> ResNet:
    """Build an architecture by name; input [N, 3, H, W], of sizes as `ResNet` says, output logits [N, num_classes].

    The probabilities, stem_stride and `kernels` change neither parameters nor `state_dict` names.

    Args:
        block_dropout: probability inside residual branches.
        head_dropout: probability before the classifier.
        stochastic_depth: probability p of dropping the last block's branch, for the others as `ResNet` says of the mode.
        squeeze_excitation: False leaves it out, for ablations.
        stem_stride: 1, 2 or 4, how much smaller the stem makes an image.
        kernels: who computes what stands between convolutions: torch, numba (auto on a CPU), triton or fusable (our algebra in
            PyTorch operations), or {kind: form}.
    """
    row = architecture(name)
    require_known(kernels)
    if stochastic_depth and row.block is ConvBlock:
        raise InputError(f"{name} has no residual branches to drop, got stochastic_depth {stochastic_depth}: set it to 0")
    return ResNet(
        widths=row.widths,
        blocks=row.blocks,
        block=row.block,
        shortcut=row.shortcut,
        activation=row.activation,
        se_stages=row.se_stages if squeeze_excitation else (),
        se_bias=row.se_bias,
        stem_bias=row.stem_bias,
        initialisation=row.initialisation,
        num_classes=num_classes,
        block_dropout=block_dropout,
        head_dropout=head_dropout,
        stochastic_depth=stochastic_depth,
        stochastic_depth_mode=stochastic_depth_mode,
        kernels=kernels,
        stem=row.stem,
        stem_stride=stem_stride,
        downsampling=row.downsampling,
        pooling=row.pooling,
        head_bias=row.head_bias,
        logit_scale=row.logit_scale,
        norm=row.norm,
    )


def suited_stride(size: tuple[int, int], wanted: int = 0) -> int:
    """The stem_stride that is wanted; 0: that with which images of `size` (height, width) become maps of 32 to 64 a side.

    Below 64 pixels it is 1.
    """
    return wanted or (4 if min(size) >= 128 else 2 if min(size) >= 64 else 1)


def require_size(name: str, size: tuple[int, int], stem_stride: int) -> None:
    """Raise InputError where images of `size` (height, width) vanish in an architecture's downsampling."""
    least = (16 if architecture(name).downsampling == "pooled_conv" else SMALLEST) * stem_stride
    if min(size) < least:
        raise InputError(
            f"{name} needs images of at least {least} pixels a side with stem_stride {stem_stride}, got {size[1]}x{size[0]}: "
            "choose another --arch, or a lower --stem-stride"
        )


def place(model: ResNet, device: torch.device) -> ResNet:
    """Move a model to its device with channels_last weights, which every convolution here is fastest with."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def require_budget(name: str, parameters: int, maximum: int) -> None:
    """Raise InputError when a model exceeds `maximum` trainable parameters; 0 lifts the limit."""
    if maximum and parameters > maximum:
        raise InputError(
            f"{name} has {parameters:,} parameters, the limit is {maximum:,}: "
            "choose a smaller arch, or lift it with --max-parameters 0"
        )
