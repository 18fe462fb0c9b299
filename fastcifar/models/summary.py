"""A model's layers with their output shapes, parameters and FLOPs, from one forward pass."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.models import build_model, count_parameters
from fastcifar.models.resnet import ResNet
from kernels.augment.operations import CIFAR, Size


@dataclass(frozen=True)
class LayerRow:
    """One layer of the summary, in order of execution."""

    name: str
    kind: str
    output: tuple[int, ...]  # shape for one image, without the batch
    parameters: int  # trainable
    flops: int  # per image, forward, 2 per multiply-add, of convolutions and linear layers
    training_flops: int  # these, and as many for each gradient that training needs: to the weights, and to the layer's input


@torch.no_grad()
def trace_layers(model: ResNet, size: Size = CIFAR) -> list[LayerRow]:
    """Trace images of `size` (height, width) through a copy of `model`; return a row for each layer that has no layers inside.

    A batch of no images, which computes nothing: PyTorch's meta device would import for a second first.
    """
    model = deepcopy(model).eval()
    rows: list[LayerRow] = []

    def note(name: str, layer: nn.Module, _: Any, output: Tensor) -> None:
        flops = passes = 0
        if isinstance(layer, nn.Conv2d | nn.Linear):
            flops = 2 * prod(output.shape[1:]) * layer.weight[0].numel()
            passes = 1 + layer.weight.requires_grad + (layer is not model.stem[0])
        shape = tuple(output.shape[1:])
        rows.append(LayerRow(name, type(layer).__name__, shape, count_parameters(layer), flops, passes * flops))

    for name, layer in model.named_modules():
        if "kernels" in vars(layer):
            vars(layer)["kernels"] = "torch"  # no kernel of ours stands for several layers
        if not list(layer.children()) and not isinstance(layer, nn.Identity):
            layer.register_forward_hook(partial(note, name))
    model(torch.zeros(0, 3, *size, device=model.classifier.weight.device))
    return rows


def flops_per_image(model: ResNet) -> int:
    """Forward FLOPs of convolutions and linear layers for one image, 2 per multiply-add."""
    return sum(row.flops for row in trace_layers(model))


@cache
def training_flops(arch: str, size: Size = CIFAR, stem_stride: int = 1) -> int:
    """Forward and backward FLOPs of convolutions and linear layers for one image [3, *size], 2 per multiply-add."""
    with torch.random.fork_rng(devices=()):
        return sum(row.training_flops for row in trace_layers(build_model(arch, stem_stride=stem_stride), size))
