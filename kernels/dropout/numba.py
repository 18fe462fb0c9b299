"""Dropout by Philox on a CPU. Both loops are written so that LLVM makes vectors of them: eight products of 32-bit words at
once, eight elements by the bits of one byte. bfloat16 is its bits, in uint16."""

# mypy: disable-error-code="no-untyped-def"

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kernels.augment.numba import philox
from kernels.philox import Purpose
from kernels.threads import KEPT, run

f32, u16, u32, u64 = np.float32, np.uint16, np.uint32, np.uint64
LOW, HALF, NAN = u64(0xFFFF), u64(16), u32(0x7FC0)


def draw(samples: Tensor, epoch: Tensor, elements: int, probability: float, layer: int, seed: int) -> Tensor:
    """`reference.draw`."""
    mask = torch.empty(len(samples), -(-elements // 8), dtype=torch.uint8)
    purpose, threshold = Purpose.DROPOUT | layer << 8, round(probability * 65536)
    run(_draw, len(samples), seed, samples.contiguous().numpy(), epoch.view(1).numpy(), purpose, threshold, mask.numpy())
    return mask


def apply(rows: Tensor, mask: Tensor, probability: float) -> Tensor:
    """`reference.apply`, of float32 and bfloat16."""
    result, scale = torch.empty_like(rows), f32(1 / (1 - probability))
    if rows.dtype == torch.bfloat16:
        run(_apply_bf16, len(rows), rows.view(torch.uint16).numpy(), mask.numpy(), scale, result.view(torch.uint16).numpy())
    else:
        run(_apply_fp32, len(rows), rows.numpy(), mask.numpy(), scale, result.numpy())
    return result


@njit(**KEPT)
def _draw(first, last, seed, samples, epoch, purpose, threshold, mask):
    limit = u64(threshold)
    for n in range(first, last):
        for block in range(mask.shape[1]):
            words = philox(u64(seed), u64(samples[n]), u64(epoch[0]), u64(purpose), u64(block))
            byte = u64(0)
            for w in range(4):
                byte |= u64((words[w] & LOW) >= limit) << u64(2 * w)
                byte |= u64((words[w] >> HALF) >= limit) << u64(2 * w + 1)
            mask[n, block] = byte


@njit(**KEPT)
def _apply_fp32(first, last, rows, mask, scale, result):
    whole = rows.shape[1] // 8
    for n in range(first, last):
        x, y = rows[n], result[n]
        for block in range(whole):
            byte = mask[n, block]
            for j in range(8):
                value = x[8 * block + j] * scale
                y[8 * block + j] = value if (byte >> j) & 1 else f32(0)
        for i in range(8 * whole, len(x)):
            y[i] = x[i] * scale if (mask[n, whole] >> (i & 7)) & 1 else f32(0)


@njit(**KEPT)
def _apply_bf16(first, last, rows, mask, scale, result):
    whole = rows.shape[1] // 8
    for n in range(first, last):
        x, y = rows[n], result[n]
        for block in range(whole):
            byte = mask[n, block]
            for j in range(8):
                value = scaled(x[8 * block + j], scale)
                y[8 * block + j] = value if (byte >> j) & 1 else u16(0)
        for i in range(8 * whole, len(x)):
            y[i] = scaled(x[i], scale) if (mask[n, whole] >> (i & 7)) & 1 else u16(0)


@njit(inline="always", **KEPT)
def scaled(bits, scale):
    """A bfloat16 times a float32, rounded to the nearest bfloat16, to the even one of two."""
    product = u32(u32(bits) << u32(16)).view(np.float32) * scale
    wide = f32(product).view(np.uint32)
    rounded = u32(wide + u32(0x7FFF) + ((wide >> u32(16)) & u32(1))) >> u32(16)
    return u16(rounded) if product == product else u16(NAN)
