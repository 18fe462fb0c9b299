"""How many images a second a device could train at most: each architecture's FLOPs and fewest bytes, at the device's rates.

python bench/roofline.py                # measure this device's two rates and print every architecture's ceiling
python bench/roofline.py --flops 790e12 --bandwidth 4.3e12    # by stated rates (an H200's)

FLOPs of a layer are PyTorch's own count of its forward pass, two a multiply-add, and as many again for each of the gradients to
its weights (where these are trained) and to its input (which the first convolution does not need). Bytes are those of bf16
activations; weights, read once a batch, are left out. A convolution reads its input and writes its output, and so backward,
twice. What stands between the convolutions is counted in passes over a whole feature map, for kernels that fuse everything but
the convolutions (the residual tail of PERFORMANCE.md):

    BN, act after a convolution  forward: statistics 1 read, apply 1 read 1 write; backward: reduce 2, apply 2 reads 1 write
    tail: BN, [SE], add, act     forward: statistics 1 read, 2 reads 1 write; backward: 3 reads 1 write, 2 reads 1 write, and
                                 1 read where the gradients of the block's two uses of its input are added
    BN of a shortcut             forward: statistics 1 read, apply 1 read 1 write; backward: 5, less 1 that the tail has read
    residual sum before BN, act  2: the sum written, the shortcut's gradient read
    SE without a BN before it    4: squeeze 1 read; backward: 1 read for the scale's gradient, 1 read 1 write for the branch's
    max pool before BN, act      of the larger map 2: read, and its gradient written; of the smaller, whose statistics are taken
                                 as it is written, 7: 1 write, apply 1 read 1 write; backward: reduce 2, apply 2 reads
    act after a fixed whitening  4: 1 read 1 write; backward: 2 reads, for the biases' gradient

Dropout, stochastic depth and squeeze-excitation behind a BN cost no pass: they ride on one that is made anyway.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from bench.baselines import wall_clock
from fastcifar.arguments import parse_arguments
from fastcifar.device import choose_device, computes_bf16, device_name, synchronise
from fastcifar.errors import require, run_command
from fastcifar.models import ARCHITECTURES, build_model
from fastcifar.models.blocks import BasicBlock, Block, ConvBlock
from fastcifar.models.resnet import ResNet
from fastcifar.models.summary import trace_layers

ACTIVATION_BYTES = 2  # bf16
# Passes over a feature map, forward and backward, as explained above.
BN_ACT, TAIL, SHORTCUT_BN, SUM, LONE_SE, POOL, ACT = 8, 12, 7, 2, 4, 2, 4
MAX_POOL, POOLED_BN_ACT = 2, 7


@dataclass(frozen=True)
class Rates:
    """What a device can do at most."""

    flops_per_second: float  # of a large matrix product in the precision of training
    bytes_per_second: float  # of a large copy, reads and writes together


@dataclass(frozen=True)
class Cost:
    """What training on one image costs, forward and backward: FLOPs, 2 per multiply-add, and fewest bytes of activations.

    Of each convolution, and then of the linear layer, which moves nothing, and of the passes between, which compute nothing.
    """

    parts: tuple[tuple[int, int], ...]

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.parts)

    @property
    def bytes(self) -> int:
        return sum(moved for _, moved in self.parts)

    def images_per_second(self, rates: Rates) -> float:
        """The ceiling: each part bound by arithmetic or bytes, whichever is longer, one after the other."""
        return 1 / sum(max(flops / rates.flops_per_second, moved / rates.bytes_per_second) for flops, moved in self.parts)


def cost_of(model: ResNet) -> Cost:
    """Trace `model` and count; it is left as it was."""
    layers, parts = dict(model.named_modules()), []
    written: dict[nn.Module, int] = {}  # elements of the feature map of each layer
    for row in trace_layers(model):
        layer, moved = layers[row.name], 0
        written[layer] = prod(row.output)
        if isinstance(layer, nn.Conv2d):
            read = written[layer] * prod(layer.stride) // layer.out_channels * layer.in_channels
            moved = ACTIVATION_BYTES * (read + written[layer])
        if row.flops:
            parts.append((row.training_flops, row.training_flops // row.flops * moved))
    return Cost((*parts, (0, ACTIVATION_BYTES * _pointwise_elements(model, written))))


def _pointwise_elements(model: ResNet, written: dict[nn.Module, int]) -> int:
    """Elements moved by everything but the convolutions, from the structure of the blocks."""
    trunk = written[model.stem[0]]
    total = trunk * (BN_ACT if _normalises(model.stem) else ACT if len(model.stem) > 1 else 0)
    summed = 0  # passes of a residual sum that the next batch norm's statistics are taken from
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        if isinstance(block, ConvBlock):
            full, trunk = written[block.conv], written.get(block.pool, written[block.conv])
            total += MAX_POOL * full + POOLED_BN_ACT * trunk if block.pool in written else BN_ACT * full
            continue
        inner, outer = written[block.conv1], written[block.conv2]
        if isinstance(block, BasicBlock):
            total += BN_ACT * inner + TAIL * outer + SHORTCUT_BN * outer * _normalises(block.shortcut)
        else:
            total += (BN_ACT + summed) * trunk + BN_ACT * inner + LONE_SE * outer * (not isinstance(block.se, nn.Identity))
            summed = SUM
        trunk = outer
    if _normalises(model.tail):
        total += (BN_ACT + summed) * trunk
    return total + POOL * trunk


def _normalises(part: nn.Module) -> bool:
    return any(isinstance(layer, nn.BatchNorm2d) for layer in part.modules())


@cache
def cost_of_arch(arch: str, *, squeeze_excitation: bool = True) -> Cost:
    """The cost of an architecture by name."""
    with torch.random.fork_rng(devices=()):
        return cost_of(build_model(arch, squeeze_excitation=squeeze_excitation))


def measure_rates(device: torch.device, *, seconds: float = 2.0) -> Rates:
    """Measure both rates on `device` within about `seconds`: a matrix product and a copy, each the best of many calls."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if computes_bf16(device) else torch.float32
    side = 8192 if cuda else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(2**30 if cuda else 2**27, dtype=torch.uint8, device=device)  # larger than any cache
    target = torch.empty_like(source)

    def fastest(call: Callable[[], object]) -> float:
        """Seconds of the fastest of at least five calls: a ceiling is what the device does undisturbed."""

        def finished() -> None:
            call()
            synchronise(device)

        clock = wall_clock(finished)
        clock()  # warms up
        ended, taken = time.perf_counter() + seconds / 2, [clock() for _ in range(5)]
        while time.perf_counter() < ended:
            taken.append(clock())
        return min(taken)

    product, copy = fastest(lambda: left @ right), fastest(lambda: target.copy_(source))
    return Rates(2 * side**3 / product, 2 * source.numel() / copy)


@dataclass(frozen=True)
class Options:
    """Print each architecture's FLOPs, fewest bytes and ceiling on this device, or by stated rates."""

    flops: float = 0.0  # floating-point operations per second the device can do, 0 = measure
    bandwidth: float = 0.0  # bytes per second it can move, reads and writes together, 0 = measure

    def __post_init__(self) -> None:
        require(self, self.flops >= 0, "flops", "0 or more per second")
        require(self, self.bandwidth >= 0, "bandwidth", "0 or more bytes per second")


def main() -> None:
    """Measure what is not stated, print the table."""
    options = parse_arguments(Options, "python bench/roofline.py")
    device = choose_device("auto")
    rates, where = Rates(options.flops, options.bandwidth), "stated"
    if not (options.flops and options.bandwidth):
        measured, where = measure_rates(device), device_name(device)
        rates = Rates(options.flops or measured.flops_per_second, options.bandwidth or measured.bytes_per_second)
    title = f"{where}: {rates.flops_per_second / 1e12:.2f} TFLOP/s, {rates.bytes_per_second / 1e9:.1f} GB/s"
    right = (Column(each, justify="right") for each in ("MFLOP/img", "KB/img", "ceiling img/s", "epochs/s of 50,000"))
    table = Table(Column("arch", no_wrap=True), *right, title=title, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for arch in ARCHITECTURES:
        cost = cost_of_arch(arch)
        ceiling = cost.images_per_second(rates)
        figures = (f"{cost.flops / 1e6:,.0f}", f"{cost.bytes / 1e3:,.0f}", f"{ceiling:,.0f}", f"{ceiling / 50_000:.3g}")
        table.add_row(arch, *figures)
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
