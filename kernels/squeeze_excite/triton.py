# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Squeeze-excitation in Triton: one launch forward, one backward. The formulas are in `__init__.py`.

One program takes one sample: it reads the sample's map for the squeeze, goes through both linears and the sigmoid in
registers, and reads the map again, now mostly from the L2 cache, to scale it. So no launch handles N x C numbers alone.

A channels_last map is walked in rows of `lanes` elements: the fewest positions, times C, that make a multiple of 16 bytes, so
that accesses are 16 bytes wide at any C (45 in bf16: 8 positions). A contiguous map is walked with strides, one position
a row; neither is converted.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.mish.triton import activate, times_slope
from kernels.squeeze_excite.reference import Results, layout_of, unfilled_gradients, unfilled_results

TILE = 4096  # elements a program holds at once: 16 a thread, which are two 16-byte accesses of bf16
REDUCED = 4  # units of the bottleneck in one turn of the loop over them
ACCESS = 16  # bytes of the widest


@triton.jit
def tile(
    start, channels: tl.constexpr, positions: tl.constexpr, lanes: tl.constexpr, contiguous: tl.constexpr,
    block_rows: tl.constexpr, block_lanes: tl.constexpr,
):  # fmt: skip
    """Offsets into a sample's map [block_rows, block_lanes] from row `start` on, and their mask."""
    row = start + tl.arange(0, block_rows)[:, None]
    lane = tl.arange(0, block_lanes)[None, :]
    if contiguous:
        return lane * positions + row, (row < positions) & (lane < channels)
    offsets = row * lanes + lane
    return offsets, (offsets < positions * channels) & (lane < lanes)


@triton.jit
def per_channel(values, channels: tl.constexpr, lanes: tl.constexpr, block_lanes: tl.constexpr, block_channels: tl.constexpr):
    """Sum [block_rows, block_lanes] over rows and over the lanes of each channel; 0 beyond the last channel."""
    values = tl.sum(values, 0)
    c = tl.arange(0, block_channels)
    total = values
    if lanes != channels:
        total = tl.zeros([block_channels], tl.float32)
        for position in tl.static_range(lanes // channels):
            total += tl.gather(values, tl.minimum(position * channels + c, block_lanes - 1), 0)
    return tl.where(c < channels, total, 0.0)


@triton.jit
def per_lane(values, channels: tl.constexpr, lanes: tl.constexpr, block_lanes: tl.constexpr):
    """Give every lane its channel's value: [block_channels] -> [1, block_lanes]."""
    if lanes != channels:
        values = tl.gather(values, tl.arange(0, block_lanes) % channels, 0)
    return values[None, :]


@triton.jit
def forward_kernel(
    x, w_reduce, w_expand, b_reduce, b_expand, y, squeezed, hidden, scale, reduced: tl.constexpr, activation: tl.constexpr,
    channels: tl.constexpr, positions: tl.constexpr, lanes: tl.constexpr, contiguous: tl.constexpr,
    block_rows: tl.constexpr, block_lanes: tl.constexpr, block_channels: tl.constexpr, block_reduced: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    x += n * positions * channels
    y += n * positions * channels
    c = tl.arange(0, block_channels)
    rows: tl.constexpr = tl.cdiv(positions * channels, lanes)

    total = tl.zeros([block_rows, block_lanes], tl.float32)
    for start in range(0, rows, block_rows):
        offsets, mask = tile(start, channels, positions, lanes, contiguous, block_rows, block_lanes)
        total += tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    mean = per_channel(total, channels, lanes, block_lanes, block_channels) / positions
    tl.store(squeezed + n * channels + c, mean, mask=c < channels)

    logit = tl.zeros([block_channels], tl.float32)
    if b_expand is not None:
        logit += tl.load(b_expand + c, mask=c < channels, other=0.0).to(tl.float32)
    for first in range(0, reduced, block_reduced):
        r = first + tl.arange(0, block_reduced)
        mask = (r[:, None] < reduced) & (c[None, :] < channels)
        inward = tl.load(w_reduce + r[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        outward = tl.load(w_expand + c[None, :] * reduced + r[:, None], mask=mask, other=0.0).to(tl.float32)
        unit = tl.sum(inward * mean[None, :], 1)
        if b_reduce is not None:
            unit += tl.load(b_reduce + r, mask=r < reduced, other=0.0).to(tl.float32)
        tl.store(hidden + n * reduced + r, unit, mask=r < reduced)
        logit += tl.sum(outward * activate(unit, activation)[:, None], 0)
    s = tl.sigmoid(logit)
    tl.store(scale + n * channels + c, s, mask=c < channels)

    s = per_lane(s, channels, lanes, block_lanes)
    for start in range(0, rows, block_rows):
        offsets, mask = tile(start, channels, positions, lanes, contiguous, block_rows, block_lanes)
        value = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(y + offsets, (value * s).to(y.dtype.element_ty), mask=mask)


@triton.jit
def total_gradient(gradient, second, offsets, mask, policy: tl.constexpr):
    """Of one or two uses of y, in float32."""
    total = tl.load(gradient + offsets, mask=mask, other=0.0, eviction_policy=policy).to(tl.float32)
    if second is not None:
        total += tl.load(second + offsets, mask=mask, other=0.0, eviction_policy=policy).to(tl.float32)
    return total


@triton.jit
def backward_kernel(
    gradient, second, x, hidden, scale, w_reduce, w_expand, x_gradient, logit_gradient, hidden_gradient, unit_activated,
    reduced: tl.constexpr, activation: tl.constexpr,
    channels: tl.constexpr, positions: tl.constexpr, lanes: tl.constexpr, contiguous: tl.constexpr,
    block_rows: tl.constexpr, block_lanes: tl.constexpr, block_channels: tl.constexpr, block_reduced: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    gradient += n * positions * channels
    if second is not None:
        second += n * positions * channels
    x += n * positions * channels
    x_gradient += n * positions * channels
    c = tl.arange(0, block_channels)
    rows: tl.constexpr = tl.cdiv(positions * channels, lanes)

    total = tl.zeros([block_rows, block_lanes], tl.float32)
    for start in range(0, rows, block_rows):
        offsets, mask = tile(start, channels, positions, lanes, contiguous, block_rows, block_lanes)
        g = total_gradient(gradient, second, offsets, mask, "evict_last")
        total += g * tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    s = tl.load(scale + n * channels + c, mask=c < channels, other=0.0)
    d_logit = per_channel(total, channels, lanes, block_lanes, block_channels) * s * (1.0 - s)
    tl.store(logit_gradient + n * channels + c, d_logit, mask=c < channels)

    d_mean = tl.zeros([block_channels], tl.float32)
    for first in range(0, reduced, block_reduced):
        r = first + tl.arange(0, block_reduced)
        mask = (r[:, None] < reduced) & (c[None, :] < channels)
        inward = tl.load(w_reduce + r[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        outward = tl.load(w_expand + c[None, :] * reduced + r[:, None], mask=mask, other=0.0).to(tl.float32)
        unit = tl.load(hidden + n * reduced + r, mask=r < reduced, other=0.0)
        d_unit = times_slope(tl.sum(outward * d_logit[None, :], 1), unit, activation)
        tl.store(unit_activated + n * reduced + r, activate(unit, activation), mask=r < reduced)
        tl.store(hidden_gradient + n * reduced + r, d_unit, mask=r < reduced)
        d_mean += tl.sum(inward * d_unit[:, None], 0)

    s = per_lane(s, channels, lanes, block_lanes)
    shift = per_lane(d_mean / positions, channels, lanes, block_lanes)
    for start in range(0, rows, block_rows):
        offsets, mask = tile(start, channels, positions, lanes, contiguous, block_rows, block_lanes)
        g = total_gradient(gradient, second, offsets, mask, "evict_first")
        tl.store(x_gradient + offsets, (g * s + shift).to(x_gradient.dtype.element_ty), mask=mask)


def blocks(x: Tensor, reduced: int) -> dict[str, int]:
    """The compile-time sizes of both kernels (and the warps of a program) for a map of x's shape, dtype and layout."""
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    contiguous, wide = layout_of(x) == torch.contiguous_format, ACCESS // x.element_size()
    lanes = channels if contiguous else channels * min(wide // gcd(wide, channels), positions)
    block_lanes = triton.next_power_of_2(lanes)
    block_rows = min(triton.next_power_of_2(-(-positions * channels // lanes)), max(TILE // block_lanes, 1))
    return {
        "channels": channels, "positions": positions, "reduced": reduced, "lanes": lanes, "contiguous": contiguous,
        "block_rows": block_rows, "block_lanes": block_lanes, "block_channels": triton.next_power_of_2(channels),
        "block_reduced": min(REDUCED, triton.next_power_of_2(reduced)),
        "num_warps": min(max(block_rows * block_lanes // 512, 1), 8),
    }  # fmt: skip


def forward(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, b_reduce: Tensor | None, b_expand: Tensor | None, activation: str
) -> Results:
    """`reference.forward`."""
    results = unfilled_results(x, w_reduce)
    parameters = (None if w is None else w.contiguous() for w in (w_reduce, w_expand, b_reduce, b_expand))
    rows = x.contiguous(memory_format=layout_of(x))
    with torch.cuda.device_of(x):
        forward_kernel[(len(x),)](rows, *parameters, *results, activation=activation, **blocks(x, len(w_reduce)))
    return results


def backward(
    gradient: Tensor, x: Tensor, hidden: Tensor, scale: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: str,
    second: Tensor | None = None,
) -> Results:  # fmt: skip
    """`reference.backward`."""
    results = unfilled_gradients(x, hidden, scale)
    maps = (t if t is None else t.contiguous(memory_format=layout_of(x)) for t in (gradient, second, x))
    rest = (t.contiguous() for t in (hidden, scale, w_reduce, w_expand))
    with torch.cuda.device_of(x):
        backward_kernel[(len(x),)](*maps, *rest, *results, activation=activation, **blocks(x, hidden.shape[1]))
    return results
