"""The augmentation in one CUDA launch.

One program an image, or some rows of one that is larger than CIFAR's; its output values are contiguous, so stores are wide,
and its reads fall into a few KB of the set. Bytes per CIFAR image: 3,072 read, 6,144 written in bf16: 0.46 GB an epoch of
50,000, 0.11 ms at 4.3 TB/s.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.philox import Purpose

CROP_FLIP, CUTOUT, FIRST_FLIP = (
    tl.constexpr(int(purpose)) for purpose in (Purpose.CROP_FLIP, Purpose.CUTOUT, Purpose.FIRST_FLIP)
)
WARPS = 4
VALUES = 4096  # of a program, as of a CIFAR image: 32 rows of 96 values and an idle quarter


@triton.jit
def below(word, bound):
    """kernels.philox.below: uniform in 0..bound-1."""
    return tl.umulhi(word, bound.to(tl.uint32)).to(tl.int32)


@triton.jit
def reflected(place, length: tl.constexpr):
    """-1 shows 1, `length` shows length - 2."""
    return length - 1 - tl.abs(length - 1 - tl.abs(place))


@triton.jit
def augment_kernel(
    images, labels, index, permutation, cursor, epoch, seed, mean, std, out, out_labels,
    padding: tl.constexpr, reflect: tl.constexpr, flip: tl.constexpr, cutout: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    position = tl.load(permutation + tl.load(cursor) + b)
    tl.store(out_labels + b, tl.load(labels + position))

    number = tl.load(epoch).to(tl.uint32)
    key = tl.load(seed).to(tl.uint64)
    sample = tl.load(index + position).to(tl.uint32)
    nothing = tl.zeros_like(sample)
    down_word, right_word, flip_word, _ = tl.philox(key, sample, number, nothing + CROP_FLIP, nothing)
    span = nothing + (2 * padding + 1)
    down, right = below(down_word, span) - padding, below(right_word, span) - padding
    flipped = (flip == 1) & ((flip_word >> 31) == 1)
    if flip == 2:
        own, _, _, _ = tl.philox(key, sample, nothing, nothing + FIRST_FLIP, nothing)
        flipped = (((own >> 31) + number) & 1) == 1

    # What depends on the row alone or on the column alone is computed once for all elements of a thread that share it.
    y = tl.arange(0, rows)[:, None]
    if rows < height:  # a CIFAR image is one program's: known when it is compiled, that saves 24 registers of 80
        y += tl.program_id(1) * rows
    in_row = tl.arange(0, columns)[None, :]  # the 3 width bytes of a row; the rest is idle
    x, channel = in_row // 3, in_row % 3
    row, column = y + down, tl.where(flipped, width - 1 - x, x) + right
    if reflect:
        row, column = reflected(row, height), reflected(column, width)
    row_mask, column_mask = (row >= 0) & (row < height), (column >= 0) & (column < width) & (in_row < 3 * width)
    source = images + position * (3 * height * width)
    level = tl.load(source + (row * (3 * width) + (column * 3 + channel)), mask=row_mask & column_mask, other=0).to(tl.float32)
    offset = 255.0 * tl.load(mean + channel)
    scale = tl.div_rn(1.0, 255.0 * tl.load(std + channel))  # rounded as PyTorch rounds it
    value = (level - offset) * scale
    if cutout > 0:
        row_word, column_word, _, _ = tl.philox(key, sample, number, nothing + CUTOUT, nothing)
        top = below(row_word, nothing + height) - cutout // 2
        left = below(column_word, nothing + width) - cutout // 2
        cleared = ((y >= top) & (y < top + cutout)) & ((x >= left) & (x < left + cutout))
        value = tl.where(cleared, 0.0, value)
    place, mask = out + b * (3 * height * width) + (y * (3 * width) + in_row), in_row < 3 * width
    if height % rows != 0:
        mask = mask & (y < height)
    tl.store(place, value.to(out.dtype.element_ty), mask=mask)


def launch(*tensors: Tensor, padding: int, reflect: bool, flip: int, cutout: int) -> None:
    """Fill out [B, H, W, 3] and out_labels [B], the last of the kernel's `tensors`. No host sync."""
    height, width = tensors[0].shape[1:3]
    columns = triton.next_power_of_2(3 * width)
    rows = min(max(1, VALUES // columns), triton.next_power_of_2(height))
    with torch.cuda.device_of(tensors[0]):
        augment_kernel[(len(tensors[-1]), triton.cdiv(height, rows))](
            *tensors, padding=padding, reflect=reflect, flip=flip, cutout=cutout, height=height, width=width, rows=rows,
            columns=columns, num_warps=WARPS,
            enable_fp_fusion=False,  # level - 255 mean in one rounding would not be NumPy's pixel
        )  # fmt: skip
