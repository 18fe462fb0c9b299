"""The one network behind every row of the table: stem, stages of blocks, pooled head."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from fastcifar.models.blocks import Block, BlockSpec, ConvBlock, PreActivationBlock
from fastcifar.models.layers import PYTORCHS, BatchNorm2d, Kernels, Norm, StochasticDepthMode, conv, dropout, norm_act
from kernels.augment.reference import normalise

# pytorch: every layer's default. kaiming: convolutions normal by fan-out (He et al., ICCV 2015). kaiming_small_head: these, and
# linear layers, those of squeeze-excitation too, normal with deviation 0.01 and zero bias (report C). dirac: PyTorch's, but the
# first filters of a 3x3 convolution pass its input on, and the head's weights have deviation 1 (airbench94).
Initialisation = Literal["pytorch", "kaiming", "kaiming_small_head", "dirac"]
# conv3x3: a convolution with the first stage's channels, BN and activation (before blocks that begin with these, neither).
# whitening: a 2x2 convolution without padding whose 24 filters are not trained, but their biases are, and an activation.
Stem = Literal["conv3x3", "whitening"]
# Where the map is halved. stride: in the first block of every stage but the first. pooled_conv: in front of every stage's
# blocks, by a ConvBlock that pools.
Downsampling = Literal["stride", "pooled_conv"]
Pooling = Literal["mean", "max"]  # over the last map

# How much smaller the stem makes an image: 1 leaves it; 2, its convolution steps by two pixels; 4, a 3x3 max pooling of stride
# 2 follows, as for ImageNet (He et al., CVPR 2016). It changes neither parameters nor their names.
StemStride = Literal[1, 2, 4]

WHITENED = 24  # filters of a whitening stem: two for each of the 12 values of a 2x2 patch


class ResNet(nn.Module):
    """Normalised images [N, 3, H, W] to logits [N, num_classes]. H and W: at least 8, with pooled_conv 16, times stem_stride.

    The arguments are a row's fields and a recipe's probabilities.

    stochastic_depth: probability p of dropping the last block's branch. Mode sample: block l of L drops with p l / L (Huang et
    al., ECCV 2016); mode batch: block i of n in stage s of S with p (s / S) (i / n) (report C).
    """

    def __init__(
        self,
        *,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        block: type[Block],
        shortcut: str,
        activation: Callable[[], nn.Module],
        se_stages: tuple[int, ...],
        se_bias: bool,
        stem_bias: bool,
        initialisation: Initialisation,
        num_classes: int,
        block_dropout: float,
        head_dropout: float,
        stochastic_depth: float,
        stochastic_depth_mode: StochasticDepthMode = "sample",
        kernels: Kernels = "torch",
        stem: Stem = "conv3x3",
        stem_stride: int = 1,
        downsampling: Downsampling = "stride",
        pooling: Pooling = "mean",
        head_bias: bool = True,
        logit_scale: float = 1.0,
        norm: Norm = PYTORCHS,
    ) -> None:
        super().__init__()
        self.kernels, self.pooling, self.logit_scale, self.stem_stride = kernels, pooling, logit_scale, stem_stride
        # Then the blocks begin with BN and activation, and the trunk ends with them.
        pre_activation = block is PreActivationBlock
        inputs = WHITENED if stem == "whitening" else widths[0]
        if stem == "whitening":
            self.stem = nn.Sequential(nn.Conv2d(3, inputs, 2, stride=min(stem_stride, 2)), activation())
            self.stem[0].weight.requires_grad_(False)
        else:
            self.stem = nn.Sequential(conv(3, inputs, 3, min(stem_stride, 2), bias=stem_bias))
            if not pre_activation:
                self.stem.extend([BatchNorm2d(inputs, norm), activation()])
        if stem_stride == 4:
            self.stem.append(nn.MaxPool2d(3, 2, padding=1))

        self.stages = nn.ModuleList()
        depth, total = 0, sum(blocks)
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            stage = nn.Sequential()
            spec = BlockSpec(
                inputs=inputs,
                outputs=width,
                stride=2 if number > 1 and downsampling == "stride" else 1,
                shortcut=shortcut,
                activation=activation,
                squeezes=number in se_stages,
                se_bias=se_bias,
                dropout=block_dropout,
                drop_path=0.0,
                drop_path_mode=stochastic_depth_mode,
                kernels=kernels,
                norm=norm,
            )
            if downsampling == "pooled_conv":
                stage.append(ConvBlock(replace(spec, squeezes=False, dropout=0.0, pools=True)))
                spec = replace(spec, inputs=width)
            for position in range(count):
                depth += 1
                per_batch = stochastic_depth_mode == "batch"
                share = number / len(widths) * (position + 1) / count if per_batch else depth / total
                stage.append(block(replace(spec, drop_path=stochastic_depth * share)))
                spec = replace(spec, inputs=width, stride=1)
            inputs = width
            self.stages.append(stage)

        self.tail = nn.Sequential(BatchNorm2d(inputs, norm), activation()) if pre_activation else nn.Identity()
        self.dropout = dropout(head_dropout)
        self.classifier = nn.Linear(inputs, num_classes, bias=head_bias)
        self._initialise(initialisation)

    def forward(self, images: Tensor) -> Tensor:
        if len(self.stem) > 1 and isinstance(self.stem[1], BatchNorm2d):
            x = norm_act(self.stem[0](images), self.stem[1], self.stem[2], self.kernels)
            x = self.stem[3](x) if len(self.stem) > 3 else x
        else:
            x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        if isinstance(self.tail, nn.Sequential):
            x = norm_act(x, self.tail[0], self.tail[1], self.kernels)
        pooled = x.mean(dim=(2, 3)) if self.pooling == "mean" else x.amax(dim=(2, 3))  # [N, C]
        logits = self.classifier(self.dropout(pooled))
        return logits if self.logit_scale == 1 else logits * self.logit_scale

    @torch.no_grad()
    def _initialise(self, initialisation: Initialisation) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and initialisation in ("kaiming", "kaiming_small_head"):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Conv2d) and initialisation == "dirac" and module.kernel_size == (3, 3):
                nn.init.dirac_(module.weight[: module.in_channels])
            if isinstance(module, nn.Linear) and initialisation == "kaiming_small_head":
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if initialisation == "dirac":
            self.classifier.weight.div_(self.classifier.weight.std())


class PixelClassifier(nn.Module):
    """A network with its normalisation in front: uint8 images [N, H, W, 3] to logits [N, classes].

    mean, std: [3] float32 in 0..1, R G B. They are no part of its state_dict, which is the network's own under `network.`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: ResNet, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network, self.classes = network, network.classifier.out_features
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalise(images, self.mean, self.std))
