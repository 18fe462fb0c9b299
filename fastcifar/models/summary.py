"""A model enters; its layers with output shapes, parameters and FLOPs leave, traced by one forward pass."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerRow:
    """One layer of the summary, in order of execution."""

    name: str
    kind: str
    output: tuple[int, ...]  # shape for one image, without the batch
    parameters: int
    flops: int  # per image, forward, 2 per multiply-add, of convolutions and linear layers


@torch.no_grad()
def trace_layers(model: nn.Module) -> list[LayerRow]:
    """Run one image [1, 3, 32, 32] through `model` in eval mode; return a row for each layer that has no layers inside."""
    rows: list[LayerRow] = []

    def recorder(name: str):  # type: ignore[no-untyped-def]
        def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            parameters = sum(p.numel() for p in layer.parameters())
            rows.append(LayerRow(name, type(layer).__name__, tuple(output.shape[1:]), parameters, _flops(layer, output)))

        return record

    leaves = {name: m for name, m in model.named_modules() if not list(m.children()) and not isinstance(m, nn.Identity)}
    hooks = [layer.register_forward_hook(recorder(name)) for name, layer in leaves.items()]
    was_training = model.training
    try:
        model.eval()(torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return rows


def flops_per_image(model: nn.Module) -> int:
    """Forward FLOPs of convolutions and linear layers for one image, 2 per multiply-add."""
    return sum(row.flops for row in trace_layers(model))


def _flops(layer: nn.Module, output: Tensor) -> int:
    if isinstance(layer, nn.Conv2d):
        return 2 * output[0].numel() * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    if isinstance(layer, nn.Linear):
        return 2 * layer.in_features * layer.out_features
    return 0
