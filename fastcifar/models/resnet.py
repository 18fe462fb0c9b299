"""The one residual network behind every row of the table: stem, stages of residual blocks, pooled head."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from fastcifar.models.blocks import BasicBlock, BlockSpec, PreActivationBlock
from fastcifar.models.layers import BatchNorm2d, Kernels, StochasticDepthMode, conv, dropout, norm_act
from kernels.augment.reference import normalise

# pytorch: every layer's default. kaiming: convolutions normal by fan-out (He et al., ICCV 2015). kaiming_small_head: these, and
# linear layers, those of squeeze-excitation too, normal with deviation 0.01 and zero bias (report C).
Initialisation = Literal["pytorch", "kaiming", "kaiming_small_head"]


class ResNet(nn.Module):
    """Normalised images [N, 3, 32, 32] to logits [N, num_classes]; arguments are a row's fields and a recipe's probabilities.

    stochastic_depth: probability p of dropping the last block's branch. Mode sample: block l of L drops with p l / L (Huang et
    al., ECCV 2016); mode batch: block i of n in stage s of S with p (s / S) (i / n) (report C).
    """

    def __init__(
        self,
        *,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        block: type[BasicBlock] | type[PreActivationBlock],
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
    ) -> None:
        super().__init__()
        self.kernels = kernels
        # Then the blocks begin with BN and activation, and the trunk ends with them.
        pre_activation = block is PreActivationBlock
        self.stem = nn.Sequential(conv(3, widths[0], 3, bias=stem_bias))
        if not pre_activation:
            self.stem.extend([BatchNorm2d(widths[0]), activation()])

        self.stages = nn.ModuleList()
        inputs, depth, total = widths[0], 0, sum(blocks)
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            stage = nn.Sequential()
            for position in range(count):
                depth += 1
                per_batch = stochastic_depth_mode == "batch"
                share = number / len(widths) * (position + 1) / count if per_batch else depth / total
                spec = BlockSpec(
                    inputs=inputs,
                    outputs=width,
                    stride=2 if number > 1 and position == 0 else 1,
                    shortcut=shortcut,
                    activation=activation,
                    squeezes=number in se_stages,
                    se_bias=se_bias,
                    dropout=block_dropout,
                    drop_path=stochastic_depth * share,
                    drop_path_mode=stochastic_depth_mode,
                    kernels=kernels,
                )
                stage.append(block(spec))
                inputs = width
            self.stages.append(stage)

        self.tail = nn.Sequential(BatchNorm2d(inputs), activation()) if pre_activation else nn.Identity()
        self.dropout = dropout(head_dropout)
        self.classifier = nn.Linear(inputs, num_classes)
        self._initialise(initialisation)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem[0](images)
        if len(self.stem) > 1:
            x = norm_act(x, self.stem[1], self.stem[2], self.kernels)
        for stage in self.stages:
            x = stage(x)
        if isinstance(self.tail, nn.Sequential):
            x = norm_act(x, self.tail[0], self.tail[1], self.kernels)
        pooled = x.mean(dim=(2, 3))  # [N, C]
        return self.classifier(self.dropout(pooled))

    def _initialise(self, initialisation: Initialisation) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and initialisation != "pytorch":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Linear) and initialisation == "kaiming_small_head":
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class PixelClassifier(nn.Module):
    """A network with its normalisation in front: uint8 images [N, 32, 32, 3] to logits [N, classes].

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
