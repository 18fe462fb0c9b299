"""A batch from the resident uint8 set in one launch: gathered, cropped, flipped, cut out, normalised, labelled.

Every sample's draws come from Philox at (sample index, epoch, purpose). Triton serves CUDA, Numba the CPU, and the plain
forms of `reference.py` are what both are compared with: the same pixels, bit for bit.
"""

from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.augment.operations import SIDE
from kernels.augment.reference import Flip, augment_torch, level_table
from kernels.backends import describe, has_won, interpreting

AugmentBackend = Literal["auto", "torch", "numba", "triton"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLIPS: tuple[Flip, ...] = get_args(Flip)


def augment(
    images: Tensor,
    labels: Tensor,
    permutation: Tensor,
    cursor: int | Tensor,
    epoch: int | Tensor,
    seed: int | Tensor,
    *,
    batch_size: int,
    mean: Tensor,
    std: Tensor,
    index: Tensor | None = None,
    padding: int = 4,
    reflect: bool = False,
    flip: Flip = "random",
    cutout: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    backend: AugmentBackend = "auto",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the batch [B, 3, 32, 32] of `dtype`, channels_last, and its labels [B] int64.

    images: [N, 32, 32, 3] uint8. labels: [N] int64. permutation: [M] int64 positions, of which cursor .. cursor + B - 1 are
    taken. cursor, epoch, seed (0..2^63-1): numbers, or 0-d int64 tensors on the images' device, which a captured step needs
    and can advance. mean, std: [3] float32 in 0..1. index: [N] int64, the sample indices, by which they are keyed; default
    0..N-1. padding: 0..31 pixels. cutout: side in pixels, 0..32, 0 = off. backend: auto takes Numba on a CPU, and on CUDA
    Triton where it measured faster. out: a batch and labels of an earlier call to overwrite, which spares fresh memory.

    Raises ValueError naming what was given and what is expected; on CUDA, where reading the positions would wait for the
    device, not for positions outside the set.
    """
    if index is None:
        index = torch.arange(len(images) if images.ndim else 0, device=images.device)
    _check(images, labels, permutation, index, mean, std)
    for name, value, top in (("padding", padding, SIDE - 1), ("cutout", cutout, SIDE)):
        if not 0 <= value <= top:
            raise ValueError(f"augment: {name} must be 0..{top} pixels, got {value}")
    if flip not in FLIPS or dtype not in DTYPES:
        raise ValueError(f"augment: flip must be one of {FLIPS} and dtype one of {DTYPES}, got {flip!r} and {dtype}")
    if batch_size < 1 or (isinstance(cursor, int) and not 0 <= cursor <= len(permutation) - batch_size):
        raise ValueError(
            f"augment: cursor .. cursor + batch_size must lie in 0..{len(permutation)}, got {cursor} and {batch_size}"
        )
    cursor, epoch, seed = (
        _scalar(name, value, images.device) for name, value in (("cursor", cursor), ("epoch", epoch), ("seed", seed))
    )
    if out is None:
        batch = torch.empty(batch_size, SIDE, SIDE, 3, dtype=dtype, device=images.device).permute(0, 3, 1, 2)
        out = batch, torch.empty(batch_size, dtype=torch.int64, device=images.device)
    else:
        _check_out(*out, images, batch_size, dtype)
    _augment(
        images, labels, index, permutation, cursor, epoch, seed, mean, std, *out,
        padding, reflect, FLIPS.index(flip), cutout, _resolve(backend, images, dtype),
    )  # fmt: skip
    return out


def _scalar(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        if not isinstance(value, int) or not 0 <= value < 2**63:
            raise ValueError(f"augment: {name} must be a whole number, 0..2^63-1, got {value!r}")
        return torch.tensor(value, device=device)
    if value.ndim or value.dtype != torch.int64 or value.device != device:
        raise ValueError(f"augment: {name} must be 0-d int64 on {device}, got {describe(value)}")
    return value


def _resolve(backend: AugmentBackend, images: Tensor, dtype: torch.dtype) -> str:
    """Raises ValueError where the backend cannot run."""
    if backend not in get_args(AugmentBackend):
        raise ValueError(f"augment: backend must be one of {', '.join(get_args(AugmentBackend))}, got {backend!r}")
    if backend == "auto":
        if not images.is_cuda:
            return "numba"
        return "triton" if has_won("augment", images.new_empty(0, 3, SIDE, SIDE, dtype=dtype)) else "torch"
    if backend == "triton" and not (images.is_cuda or interpreting()):
        raise ValueError(f"augment: triton needs CUDA tensors (or TRITON_INTERPRET=1), got {describe(images)}")
    if backend == "numba" and images.is_cuda:
        raise ValueError(f"augment: numba needs CPU tensors, got {describe(images)}")
    return backend


def _check(images: Tensor, labels: Tensor, permutation: Tensor, index: Tensor, mean: Tensor, std: Tensor) -> None:
    count = len(images) if images.ndim else 0
    expected: tuple[tuple[str, Tensor, list[int], torch.dtype], ...] = (
        ("images", images, [count, SIDE, SIDE, 3], torch.uint8),
        ("labels", labels, [count], torch.int64),
        ("index", index, [count], torch.int64),
        ("permutation", permutation, [permutation.numel()], torch.int64),
        ("mean", mean, [3], torch.float32),
        ("std", std, [3], torch.float32),
    )
    for name, tensor, shape, dtype in expected:
        if list(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != images.device or not tensor.is_contiguous():
            wanted = f"contiguous {shape} {str(dtype).removeprefix('torch.')} on {images.device}"
            raise ValueError(f"augment: {name} must be {wanted}, got {describe(tensor)}, strides {list(tensor.stride())}")


def _check_out(batch: Tensor, batch_labels: Tensor, images: Tensor, batch_size: int, dtype: torch.dtype) -> None:
    shapes = list(batch.shape) == [batch_size, 3, SIDE, SIDE] and list(batch_labels.shape) == [batch_size]
    kinds = batch.dtype == dtype and batch_labels.dtype == torch.int64 and batch_labels.is_contiguous()
    places = batch.device == batch_labels.device == images.device
    if not (shapes and kinds and places and batch.is_contiguous(memory_format=torch.channels_last)):
        wanted = f"[{batch_size}, 3, {SIDE}, {SIDE}] {str(dtype).removeprefix('torch.')} channels_last on {images.device}"
        given = f"{describe(batch)} and {describe(batch_labels)}"
        raise ValueError(f"augment: out must be {wanted} and contiguous [{batch_size}] int64, got {given}")


@torch.library.custom_op("fastcifar::augment", mutates_args=("out", "out_labels"))
def _augment(
    images: Tensor, labels: Tensor, index: Tensor, permutation: Tensor, cursor: Tensor, epoch: Tensor, seed: Tensor,
    mean: Tensor, std: Tensor, out: Tensor, out_labels: Tensor, padding: int, reflect: bool, flip: int, cutout: int,
    backend: str,
) -> None:  # fmt: skip
    """Write the batch into out [B, 3, 32, 32] channels_last and out_labels [B]."""
    batch_size, pixels = len(out_labels), out.permute(0, 2, 3, 1)
    if backend == "torch":
        positions = permutation[cursor + torch.arange(batch_size, device=images.device)]
        x, own_labels = augment_torch(
            images, labels, index, positions, epoch, seed, padding=padding, reflect=reflect,
            flip=FLIPS[flip], cutout=cutout, mean=mean, std=std, dtype=out.dtype,
        )  # fmt: skip
        out.copy_(x)
        out_labels.copy_(own_labels)
    elif backend == "triton":
        from kernels.augment.triton import launch

        launch(
            images, labels, index, permutation, cursor, epoch, seed, mean, std,
            padding, reflect, flip, cutout, pixels, out_labels,
        )  # fmt: skip
    else:
        from kernels.augment import numba as compiled

        first = int(cursor)
        if not 0 <= first <= len(permutation) - batch_size:
            raise ValueError(f"augment: cursor must be 0..{len(permutation) - batch_size}, got {first}")
        positions = permutation[first : first + batch_size]
        if (outside := positions[(positions < 0) | (positions >= len(images))]).numel():
            raise ValueError(f"augment: permutation must hold positions 0..{len(images) - 1}, got {int(outside[0])}")
        table = _cached_table(tuple(mean.tolist()), tuple(std.tolist()), out.dtype)
        compiled.in_threads(
            compiled.gather_batch, batch_size, images.view(len(images), SIDE, SIDE * 3).numpy(), labels.numpy(), index.numpy(),
            positions.numpy(), compiled.u64(int(seed)), compiled.u64(int(epoch)), padding, reflect, flip, cutout,
            compiled.plain(table), compiled.plain(pixels).reshape(batch_size, SIDE, SIDE * 3), out_labels.numpy(),
        )  # fmt: skip


_augment.register_fake(lambda *_: None)


@cache
def _cached_table(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return level_table(torch.tensor(mean), torch.tensor(std), dtype)
