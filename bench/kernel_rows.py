"""The table of kernels that `bench/kernel_latency.py` times: for each its maps, inputs, forms and the bytes it cannot avoid.

Adding a kernel is adding a row. Maps are those of the architectures that use it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcifar.dataset import CIFAR10_MEAN, CIFAR10_STD
from fastcifar.models import ARCHITECTURES, Architecture
from fastcifar.models.blocks import BasicBlock
from kernels.augment import augment
from kernels.augment.operations import SIDE
from kernels.augment.reference import Flip, augment_numpy, augment_torch
from kernels.mish import mish
from kernels.mish.reference import mish as eager_mish
from kernels.residual_tail import residual_tail, residual_tail_fusable, variant
from kernels.residual_tail.reference import residual_tail as eager_residual_tail
from kernels.squeeze_excite import squeeze_excite
from kernels.squeeze_excite.reference import squeeze_excite as eager_squeeze_excite

Shape = tuple[int, int, int]  # C, H, W
Inputs = list[Tensor | None]
Form = Callable[..., Tensor | tuple[Tensor, ...]]  # the first tensor of several is the map


@dataclass(frozen=True)
class KernelRow:
    """One kernel and what it is compared with. All forms take the inputs in their order and return the same tensors."""

    name: str  # as `auto` looks it up in kernels/measured.json
    shapes: tuple[Shape, ...]
    inputs: Callable[[Shape, int, torch.dtype, torch.device, int], Inputs]  # of shape, batch, dtype, device, seed
    ours: Form
    eager: Form  # PyTorch's own operations: compiled too, as a peer; in float64, the oracle
    forward_passes: int  # reads and writes of a whole map by our kernels
    backward_passes: int  # 0: nothing has a gradient, only the forward pass is timed
    same_algebra: Form | None = None  # our formulas as operations for the compiler to fuse, where we have them
    exact: Form | None = None  # the oracle of a kernel without gradients: the very values, rounded once
    read_beside: int = 0  # bytes of a sample that are read and belong to no map


def maps(uses: Callable[[Architecture, int], bool]) -> tuple[Shape, ...]:
    """The maps [C, H, W] of every architecture's stages that `uses` (architecture, stage from 1) picks, without repetition."""
    found: dict[Shape, None] = {}
    for row in ARCHITECTURES.values():
        for stage, width in enumerate(row.widths, start=1):
            if uses(row, stage):
                side = 32 >> (stage - 1)
                found[width, side, side] = None
    return tuple(found)


def random_map(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """A channels_last leaf [N, C, H, W] of normal draws."""
    x = torch.randn(batch, *shape, generator=generator, device=device).to(dtype, memory_format=torch.channels_last)
    return x.requires_grad_()


def mish_inputs(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    return [random_map(shape, batch, dtype, device, torch.Generator(device).manual_seed(seed))]


def squeeze_excite_inputs(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """x and both weights, float32 as in training; 16 channels a unit."""
    generator = torch.Generator(device).manual_seed(seed)
    x = random_map(shape, batch, dtype, device, generator)
    channels, units = shape[0], max(shape[0] // 16, 1)
    weights = (torch.randn(size, generator=generator, device=device) for size in ((units, channels), (channels, units)))
    return [x, *((weight / weight.shape[1] ** 0.5).requires_grad_() for weight in weights)]


def tail_row(activation: Literal["relu", "mish"], *, shortcut: bool, se: bool) -> KernelRow:
    """The residual tail of one kind, in training, on the maps of the architectures whose blocks have such a tail."""

    def uses(arch: Architecture, stage: int) -> bool:
        own = arch.activation is {"relu": nn.ReLU, "mish": nn.Mish}[activation]
        return own and (not shortcut or (arch.block is BasicBlock and (stage in arch.se_stages) is se))

    def inputs(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """conv_out, shortcut, BN's weight, bias, running mean and variance, both weights of the squeeze-excitation."""
        generator = torch.Generator(device).manual_seed(seed)
        conv_out, *linear = squeeze_excite_inputs(shape, batch, dtype, device, seed)
        weight, bias = (torch.randn(shape[0], generator=generator, device=device).requires_grad_() for _ in range(2))
        statistics = torch.zeros(shape[0], device=device), torch.ones(shape[0], device=device)
        added = random_map(shape, batch, dtype, device, generator) if shortcut else None
        return [conv_out, added, weight, bias, *statistics, *(linear if se else (None, None))]

    def form(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor | None) -> Tensor:
            return function(
                *tensors[:6], training=True, momentum=0.1, eps=1e-5,
                se=tensors[6:] if se else None, se_activation=activation, activation=activation,
            )  # fmt: skip

        return call

    return KernelRow(
        variant(shortcut or None, se or None, activation), maps(uses), inputs,
        form(partial(residual_tail, backend="triton")), form(eager_residual_tail),
        # Statistics 1 read; result 1 read, 1 write. Backward: 2 reads, then 2 reads, 1 write. With a shortcut: one more read
        # forward, one more read and one more write backward.
        forward_passes=4 if shortcut else 3, backward_passes=7 if shortcut else 5, same_algebra=form(residual_tail_fusable),
    )  # fmt: skip


AUGMENTATION: dict[str, Any] = {"padding": 4, "reflect": False, "cutout": 8}
FLIP: Flip = "random"
IMAGES = 50_000  # of the resident set, as CIFAR-10's


@cache
def resident_set(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 32, 32, 3], labels, sample numbers, permutation: random. One for all calls, as training has one."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(256, (count, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator, device=device)
    labels = torch.randint(10, (count,), generator=generator, device=device)
    return images, labels, torch.arange(count, device=device), torch.randperm(count, generator=generator, device=device)


def augment_inputs(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """The resident set, cursor, epoch and seed, mean and std, and an empty [B, 0] that says how many of which dtype to make."""
    count = max(IMAGES, batch)
    scalars = (torch.tensor(value, device=device) for value in (seed * batch % (count - batch + 1), 1, 0))
    constants = (torch.tensor(values, device=device) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return [*resident_set(count, device), *scalars, *constants, torch.empty(batch, 0, dtype=dtype, device=device)]


def augment_fused(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    images, labels, index, permutation, cursor, epoch, seed, mean, std, like = tensors
    return augment(
        images, labels, permutation, cursor, epoch, seed, batch_size=len(like), mean=mean, std=std, index=index, flip=FLIP,
        dtype=like.dtype, backend="triton", **AUGMENTATION,
    )  # fmt: skip


def augment_eager(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    images, labels, index, permutation, cursor, epoch, seed, mean, std, like = tensors
    positions = permutation[cursor + torch.arange(len(like), device=images.device)]
    return augment_torch(
        images, labels, index, positions, epoch, seed, mean=mean, std=std, flip=FLIP, dtype=like.dtype, **AUGMENTATION
    )


def augment_exact(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """NumPy's pixels, on the inputs' device."""
    images, labels, index, permutation, cursor, epoch, seed, mean, std = (t.cpu().numpy() for t in tensors[:-1])
    positions, like = permutation[cursor : cursor + len(tensors[-1])], tensors[-1]
    x, own_labels = augment_numpy(
        images, labels, index, positions, int(epoch), int(seed), mean=mean, std=std, flip=FLIP, **AUGMENTATION
    )
    return torch.from_numpy(x).to(like), torch.from_numpy(own_labels).to(like.device)


KERNELS: dict[str, KernelRow] = {
    row.name: row
    for row in (
        KernelRow(
            "mish", maps(lambda arch, _: arch.activation is nn.Mish), mish_inputs,
            partial(mish, backend="triton"), eager_mish, forward_passes=2, backward_passes=3,
        ),
        KernelRow(  # forward: the squeeze reads, the scaling reads and writes; backward: g and x, then g and dx
            "squeeze_excite", maps(lambda arch, stage: stage in arch.se_stages), squeeze_excite_inputs,
            partial(squeeze_excite, backend="triton"), eager_squeeze_excite, forward_passes=3, backward_passes=4,
        ),
        tail_row("relu", shortcut=False, se=False),
        tail_row("mish", shortcut=False, se=False),
        tail_row("relu", shortcut=True, se=False),
        tail_row("relu", shortcut=True, se=True),
        tail_row("mish", shortcut=True, se=True),
        KernelRow(  # the batch is written once; 3,072 bytes of an image are read
            "augment", ((3, SIDE, SIDE),), augment_inputs, augment_fused, augment_eager,
            forward_passes=1, backward_passes=0, exact=augment_exact, read_beside=3 * SIDE * SIDE,
        ),
    )
}  # fmt: skip
