"""A model's layers with their output shapes, parameters and FLOPs, from one traced forward pass; FLOPs of a training step."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastcifar.models import build_model, count_parameters


@dataclass(frozen=True)
class LayerRow:
    """One layer of the summary, in order of execution."""

    name: str
    kind: str
    output: tuple[int, ...]  # shape for one image, without the batch
    parameters: int  # trainable
    flops: int  # per image, forward, 2 per multiply-add, of convolutions and linear layers


@torch.no_grad()
def trace_layers(model: nn.Module) -> list[LayerRow]:
    """Trace one image [1, 3, 32, 32] through a copy of `model`; return a row for each layer that has no layers inside."""
    model = deepcopy(model).to("meta").eval()  # where no kernel of ours stands for several layers
    outputs: dict[str, Tensor] = {}
    leaves = {name: m for name, m in model.named_modules() if not list(m.children()) and not isinstance(m, nn.Identity)}
    for name, layer in leaves.items():
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32, device="meta"))
    counts = counter.get_flop_counts()
    rows = []
    for name, output in outputs.items():
        layer, flops = leaves[name], sum(counts.get(f"{type(model).__name__}.{name}", {}).values())
        rows.append(LayerRow(name, type(layer).__name__, tuple(output.shape[1:]), count_parameters(layer), flops))
    return rows


def flops_per_image(model: nn.Module) -> int:
    """Forward FLOPs of convolutions and linear layers for one image, 2 per multiply-add."""
    return sum(row.flops for row in trace_layers(model))


@cache
def training_flops(arch: str, size: int = 32) -> int:
    """Forward and backward FLOPs of convolutions and linear layers for one image, 2 per multiply-add; nothing is computed.

    size: the image's side in pixels.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        images = torch.zeros(2, 3, size, size)  # two: batch norm needs more than one value
        build_model(arch, kernels="torch")(images).sum().backward()
    return counter.get_total_flops() // 2
