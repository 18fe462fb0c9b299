"""How many images a second a device could train at most: each architecture's FLOPs and fewest bytes, at the device's rates.

python bench/roofline.py                # measure this device's two rates and print every architecture's ceiling
python bench/roofline.py --flops 790e12 --bandwidth 4.3e12    # by stated rates (an H200's)

FLOPs of a layer are PyTorch's own count of its forward pass, two a multiply-add, and as many again for each of the gradients to
its weights and to its input (which the first convolution does not need). Bytes are those of bf16 activations; weights, read
once a batch, are left out. A convolution reads its input and writes its output, and so backward, twice. What stands between the
convolutions is counted in passes over a whole feature map, for kernels that fuse everything but the convolutions (the residual
tail of PERFORMANCE.md):

    BN, act after a convolution  forward: statistics 1 read, apply 1 read 1 write; backward: reduce 2, apply 2 reads 1 write
    tail: BN, [SE], add, act     forward: statistics 1 read, 2 reads 1 write; backward: 3 reads 1 write, 2 reads 1 write, and
                                 1 read where the gradients of the block's two uses of its input are added
    BN of a shortcut             forward: statistics 1 read, apply 1 read 1 write; backward: 5, less 1 that the tail has read
    residual sum before BN, act  2: the sum written, the shortcut's gradient read
    SE without a BN before it    4: squeeze 1 read; backward: 1 read for the scale's gradient, 1 read 1 write for the branch's

Dropout, stochastic depth and squeeze-excitation behind a BN cost no pass: they ride on one that is made anyway.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.baselines import synchronise
from fastcifar.beton import SIDE
from fastcifar.device import choose_device, computes_bf16, device_name
from fastcifar.errors import require, run_command
from fastcifar.models import ARCHITECTURES, build_model
from fastcifar.models.blocks import BasicBlock, PreActivationBlock
from fastcifar.models.resnet import ResNet

ACTIVATION_BYTES = 2  # bf16
# Passes over a feature map, forward and backward, as explained above.
BN_ACT, TAIL, SHORTCUT_BN, SUM, LONE_SE, POOL = 8, 12, 7, 2, 4, 2


@dataclass(frozen=True)
class Rates:
    """What a device can do at most."""

    flops_per_second: float  # of a large matrix product in the precision of training
    bytes_per_second: float  # of a large copy, reads and writes together


@dataclass(frozen=True)
class Convolution:
    """One convolution of a trained image, forward and backward."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """What training on one image costs, forward and backward."""

    convolutions: list[Convolution]
    linear_flops: int
    pointwise_bytes: int

    @property
    def flops(self) -> int:
        """2 per multiply-add."""
        return sum(conv.flops for conv in self.convolutions) + self.linear_flops

    @property
    def bytes(self) -> int:
        """Fewest bytes of activations that must be moved."""
        return sum(conv.bytes for conv in self.convolutions) + self.pointwise_bytes

    def images_per_second(self, rates: Rates) -> float:
        """The ceiling: each convolution bound by arithmetic or bytes, whichever is longer, and the passes between, in turn."""
        seconds = self.pointwise_bytes / rates.bytes_per_second + self.linear_flops / rates.flops_per_second
        for conv in self.convolutions:
            seconds += max(conv.flops / rates.flops_per_second, conv.bytes / rates.bytes_per_second)
        return 1 / seconds


def cost_of(model: ResNet) -> Cost:
    """Trace one image through `model` and count. The model may be on the meta device; it is left as it was."""
    elements: dict[nn.Module, tuple[int, int]] = {}  # of the feature maps a layer reads and writes

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        elements[layer] = (inputs[0].numel(), output.numel())

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    hooks = [layer.register_forward_hook(record) for layer in layers.values()]
    was_training, counter = model.training, FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            model.eval()(torch.zeros(1, 3, SIDE, SIDE, device=next(model.parameters()).device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    convolutions, linear, counts = [], 0, counter.get_flop_counts()
    for name, layer in layers.items():
        forward = sum(counts[f"{type(model).__name__}.{name}"].values())
        if isinstance(layer, nn.Conv2d):
            passes = 2 if layer is model.stem[0] else 3
            convolutions.append(Convolution(passes * forward, passes * ACTIVATION_BYTES * sum(elements[layer])))
        else:
            linear += 3 * forward
    return Cost(convolutions, linear, ACTIVATION_BYTES * _pointwise_elements(model, elements))


def _pointwise_elements(model: ResNet, elements: dict[nn.Module, tuple[int, int]]) -> int:
    """Elements moved by everything but the convolutions, from the structure of the blocks."""
    trunk = elements[model.stem[0]][1]
    total = BN_ACT * trunk if _normalises(model.stem) else 0
    summed = 0  # passes of a residual sum that the next batch norm's statistics are taken from
    for block in model.modules():
        if not isinstance(block, BasicBlock | PreActivationBlock):
            continue
        inner, outer = elements[block.conv1][1], elements[block.conv2][1]
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


def cost_of_arch(arch: str, *, squeeze_excitation: bool = True) -> Cost:
    """The cost of an architecture by name, traced without computing anything."""
    with torch.device("meta"):
        return cost_of(build_model(arch, squeeze_excitation=squeeze_excitation, kernels="torch"))


def measure_rates(device: torch.device, *, seconds: float = 2.0) -> Rates:
    """Measure both rates on `device` within about `seconds`: a matrix product and a copy, each the best of many calls."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if computes_bf16(device) else torch.float32
    side = 8192 if cuda else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = _seconds(lambda: left @ right, device, seconds / 2)
    source = torch.zeros(2**30 if cuda else 2**27, dtype=torch.uint8, device=device)  # larger than any cache
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device, seconds / 2)
    return Rates(2 * side**3 / product, 2 * source.numel() / copy)


def _seconds(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """Least seconds of a call, after a warm-up, of at least five: a ceiling is what the device does undisturbed."""
    call()
    taken: list[float] = []
    ended = time.perf_counter() + budget
    while len(taken) < 5 or time.perf_counter() < ended:
        synchronise(device)
        started = time.perf_counter()
        call()
        synchronise(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


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
    options = tyro.cli(Options, prog="python bench/roofline.py")
    device = choose_device("auto")
    rates = Rates(options.flops, options.bandwidth)
    if not (options.flops and options.bandwidth):
        measured = measure_rates(device)
        rates = Rates(options.flops or measured.flops_per_second, options.bandwidth or measured.bytes_per_second)
    stated = options.flops and options.bandwidth
    where = "stated" if stated else device_name(device)
    title = f"{where}: {rates.flops_per_second / 1e12:.2f} TFLOP/s, {rates.bytes_per_second / 1e9:.1f} GB/s"
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("arch", no_wrap=True)
    for heading in ("MFLOP/img", "KB/img", "ceiling img/s", "epochs/s of 50,000"):
        table.add_column(heading, justify="right")
    for arch in ARCHITECTURES:
        cost = cost_of_arch(arch)
        ceiling = cost.images_per_second(rates)
        figures = (f"{cost.flops / 1e6:,.0f}", f"{cost.bytes / 1e3:,.0f}", f"{ceiling:,.0f}", f"{ceiling / 50_000:.3g}")
        table.add_row(arch, *figures)
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
