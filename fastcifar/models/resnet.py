"""Normalised images [N, 3, 32, 32] enter, logits [N, classes] leave: stem, stages of residual blocks, pooled head."""

from collections.abc import Callable

from torch import Tensor, nn

from fastcifar.models.blocks import BasicBlock, BlockSpec, PreActivationBlock
from fastcifar.models.layers import Kernels, conv, dropout, norm_act


class ResNet(nn.Module):
    """The one network behind every row of the table; the arguments are the row's fields and a recipe's probabilities."""

    def __init__(
        self,
        *,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        block: type[BasicBlock] | type[PreActivationBlock],
        shortcut: str,
        activation: Callable[[], nn.Module],
        se_stages: tuple[int, ...],
        se_reduction: int,
        num_classes: int,
        block_dropout: float,
        head_dropout: float,
        stochastic_depth: float,
        kernels: Kernels = "torch",
    ) -> None:
        super().__init__()
        self.kernels = kernels
        # Then the blocks begin with BN and activation, and the trunk ends with them.
        pre_activation = block is PreActivationBlock
        self.stem = nn.Sequential(conv(3, widths[0], 3))
        if not pre_activation:
            self.stem.extend([nn.BatchNorm2d(widths[0]), activation()])

        self.stages = nn.ModuleList()
        inputs, depth, total = widths[0], 0, sum(blocks)
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            stage = nn.Sequential()
            for position in range(count):
                depth += 1
                spec = BlockSpec(
                    inputs=inputs,
                    outputs=width,
                    stride=2 if number > 1 and position == 0 else 1,
                    shortcut=shortcut,
                    activation=activation,
                    se_reduction=se_reduction if number in se_stages else 0,
                    dropout=block_dropout,
                    drop_path=stochastic_depth * depth / total,
                    kernels=kernels,
                )
                stage.append(block(spec))
                inputs = width
            self.stages.append(stage)

        self.tail = nn.Sequential(nn.BatchNorm2d(inputs), activation()) if pre_activation else nn.Identity()
        self.dropout = dropout(head_dropout)
        self.classifier = nn.Linear(inputs, num_classes)
        self._initialise()

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

    def _initialise(self) -> None:
        """He initialisation by fan-out for convolutions (He et al., ICCV 2015), PyTorch's own for the rest; not stated."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
