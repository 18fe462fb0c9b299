"""Dropout by Philox on a CPU. Both loops are written so that LLVM makes vectors of them: eight products of 32-bit words at
once, sixteen elements by the bits of one word."""

# mypy: disable-error-code="no-untyped-def"

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kernels.augment.numba import philox
from kernels.map_loops import flat, narrow, widen
from kernels.philox import Purpose
from kernels.threads import KEPT, run

f32, u32, u64 = np.float32, np.uint32, np.uint64
LOW, HALF = u64(0xFFFF), u64(16)


def draw(samples: Tensor, epoch: Tensor, elements: int, probability: float, layer: int, seed: int) -> Tensor:
    """`reference.draw`."""
    mask = torch.empty(len(samples), -(-elements // 8), dtype=torch.uint8)
    purpose, threshold = Purpose.DROPOUT | layer << 8, round(probability * 65536)
    run(_draw, len(samples), seed, samples.contiguous().numpy(), epoch.view(1).numpy(), purpose, threshold, mask.numpy())
    return mask


def apply(rows: Tensor, mask: Tensor, probability: float) -> Tensor:
    """`reference.apply`, of float32 and bfloat16."""
    result = torch.empty_like(rows)
    x, y = (flat(each).reshape(rows.shape) for each in (rows, result))
    run(_apply, len(rows), x, mask.numpy(), f32(1 / (1 - probability)), y)
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
def _apply(first, last, rows, mask, scale, result):
    for n in range(first, last):
        x, y, bits = rows[n], result[n], mask[n]
        whole = len(x) // 32
        for word in range(whole):
            b0, b1, b2, b3 = bits[4 * word], bits[4 * word + 1], bits[4 * word + 2], bits[4 * word + 3]
            keep = u32(b0) | u32(b1) << u32(8) | u32(b2) << u32(16) | u32(b3) << u32(24)
            for j in range(32):
                value = widen(x[32 * word + j]) * scale
                y[32 * word + j] = narrow(value if (keep >> u32(j)) & u32(1) else f32(0), x[0])
        for i in range(32 * whole, len(x)):
            value = widen(x[i]) * scale
            y[i] = narrow(value if (bits[i >> 3] >> (i & 7)) & 1 else f32(0), x[0])
