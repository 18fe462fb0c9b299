# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Squeeze-excitation in Triton: one launch forward, one backward. The formulas are in `__init__.py`.

One program takes one sample: it reads the sample's map for the squeeze, goes through both linears and the sigmoid in
registers, and reads the map again, now mostly from the L2 cache, to scale it. So no launch handles N x C numbers alone.

A channels_last map is walked in rows of `lanes` elements: the fewest positions, times C, that make a multiple of 16 bytes, so
that accesses are 16 bytes wide at any C (45 in bf16: 8 positions). A contiguous map is walked with strides, one position
a row; neither is converted.

The same kernels serve a squeeze-excitation behind BN and activation (`residual_tail` with se_last): they compute what they
squeeze from BN's input, and instead of its gradient give the sums that BN's wants.
"""

from math import gcd
from typing import NamedTuple

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
def batch_norm(weight, bias, mean, variance, eps, channels: tl.constexpr, block_lanes: tl.constexpr):
    """mu, a and beta of every lane: BN gives a (x - mu) + beta."""
    c = tl.arange(0, block_lanes) % channels
    slope = tl.load(weight + c).to(tl.float32) * tl.rsqrt(tl.load(variance + c).to(tl.float32) + eps)
    return tl.load(mean + c).to(tl.float32)[None, :], slope[None, :], tl.load(bias + c).to(tl.float32)[None, :]


@triton.jit
def forward_kernel(
    x, weight, bias, mean, variance, w_reduce, w_expand, b_reduce, b_expand, y, squeezed, hidden, scale, eps,
    reduced: tl.constexpr, activation: tl.constexpr, in_front: tl.constexpr,
    channels: tl.constexpr, positions: tl.constexpr, lanes: tl.constexpr, contiguous: tl.constexpr,
    block_rows: tl.constexpr, block_lanes: tl.constexpr, block_channels: tl.constexpr, block_reduced: tl.constexpr,
):  # fmt: skip
    """in_front: the activation behind the BN, where x goes through one first; squeezed is not kept then."""
    n = tl.program_id(0).to(tl.int64)
    x += n * positions * channels
    y += n * positions * channels
    c = tl.arange(0, block_channels)
    rows: tl.constexpr = tl.cdiv(positions * channels, lanes)

    if weight is not None:
        mu, slope, beta = batch_norm(weight, bias, mean, variance, eps, channels, block_lanes)
    total = tl.zeros([block_rows, block_lanes], tl.float32)
    for start in range(0, rows, block_rows):
        offsets, mask = tile(start, channels, positions, lanes, contiguous, block_rows, block_lanes)
        value = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if weight is not None:
            value = tl.where(mask, activate((value - mu) * slope + beta, in_front), 0.0)
        total += value
    squeeze = per_channel(total, channels, lanes, block_lanes, block_channels) / positions
    if squeezed is not None:
        tl.store(squeezed + n * channels + c, squeeze, mask=c < channels)

    logit = tl.zeros([block_channels], tl.float32)
    if b_expand is not None:
        logit += tl.load(b_expand + c, mask=c < channels, other=0.0).to(tl.float32)
    for first in range(0, reduced, block_reduced):
        r = first + tl.arange(0, block_reduced)
        mask = (r[:, None] < reduced) & (c[None, :] < channels)
        inward = tl.load(w_reduce + r[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        outward = tl.load(w_expand + c[None, :] * reduced + r[:, None], mask=mask, other=0.0).to(tl.float32)
        unit = tl.sum(inward * squeeze[None, :], 1)
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
        if weight is not None:
            value = activate((value - mu) * slope + beta, in_front)
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
    gradient, second, x, weight, bias, mean, variance, hidden, scale, w_reduce, w_expand,
    x_gradient, logit_gradient, hidden_gradient, unit_activated, squeezed, d_squeezed, s1_out, s2_out, eps,
    reduced: tl.constexpr, activation: tl.constexpr, in_front: tl.constexpr,
    channels: tl.constexpr, positions: tl.constexpr, lanes: tl.constexpr, contiguous: tl.constexpr,
    block_rows: tl.constexpr, block_lanes: tl.constexpr, block_channels: tl.constexpr, block_reduced: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and what the linear layers' are made of.

    Behind a BN, instead of the first what those of BN are made of: S1 = sum dz and S2 = sum dz (x - mu) of each image, where dz
    is the gradient of BN's result.
    """
    n = tl.program_id(0).to(tl.int64)
    gradient += n * positions * channels
    if second is not None:
        second += n * positions * channels
    x += n * positions * channels
    if x_gradient is not None:
        x_gradient += n * positions * channels
    c = tl.arange(0, block_channels)
    rows: tl.constexpr = tl.cdiv(positions * channels, lanes)

    if weight is not None:
        mu, slope, beta = batch_norm(weight, bias, mean, variance, eps, channels, block_lanes)
    total = tl.zeros([block_rows, block_lanes], tl.float32)
    s1 = tl.zeros([block_rows, block_lanes], tl.float32)
    s2 = tl.zeros([block_rows, block_lanes], tl.float32)
    for start in range(0, rows, block_rows):
        offsets, mask = tile(start, channels, positions, lanes, contiguous, block_rows, block_lanes)
        g = total_gradient(gradient, second, offsets, mask, "evict_last")
        if weight is None:
            value = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        else:
            value = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            value = tl.where(mask, activate((value - mu) * slope + beta, in_front), 0.0)
            s1 += value
        total += g * value
    if squeezed is not None:
        mean_value = per_channel(s1, channels, lanes, block_lanes, block_channels) / positions
        tl.store(squeezed + n * channels + c, mean_value, mask=c < channels)
        s1 = tl.zeros([block_rows, block_lanes], tl.float32)
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
        if unit_activated is not None:
            tl.store(unit_activated + n * reduced + r, activate(unit, activation), mask=r < reduced)
        tl.store(hidden_gradient + n * reduced + r, d_unit, mask=r < reduced)
        d_mean += tl.sum(inward * d_unit[:, None], 0)
    if d_squeezed is not None:
        tl.store(d_squeezed + n * channels + c, d_mean, mask=c < channels)

    s = per_lane(s, channels, lanes, block_lanes)
    shift = per_lane(d_mean / positions, channels, lanes, block_lanes)
    for start in range(0, rows, block_rows):
        offsets, mask = tile(start, channels, positions, lanes, contiguous, block_rows, block_lanes)
        d_value = total_gradient(gradient, second, offsets, mask, "evict_first") * s + shift
        if weight is None:
            tl.store(x_gradient + offsets, d_value.to(x_gradient.dtype.element_ty), mask=mask)
        else:
            centred = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32) - mu
            dz = tl.where(mask, times_slope(d_value, centred * slope + beta, in_front), 0.0)
            s1 += dz
            s2 += dz * centred
    if s1_out is not None:
        total_s1 = per_channel(s1, channels, lanes, block_lanes, block_channels)
        total_s2 = per_channel(s2, channels, lanes, block_lanes, block_channels)
        tl.store(s1_out + n * channels + c, total_s1, mask=c < channels)
        tl.store(s2_out + n * channels + c, total_s2, mask=c < channels)


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


class BatchNorm(NamedTuple):
    """What x goes through before it is squeezed."""

    weight: Tensor | None = None  # [C], like the next three
    bias: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    eps: float = 0.0
    activation: str = "none"  # behind it


NONE = BatchNorm()


def forward(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, b_reduce: Tensor | None, b_expand: Tensor | None, activation: str,
    norm: BatchNorm = NONE,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """`reference.forward`; behind a BN without squeezed."""
    y, squeezed, *rest = unfilled_results(x, w_reduce)
    parameters = (None if w is None else w.contiguous() for w in (w_reduce, w_expand, b_reduce, b_expand))
    rows, kept = x.contiguous(memory_format=layout_of(x)), squeezed if norm.weight is None else None
    with torch.cuda.device_of(x):
        forward_kernel[(len(x),)](
            rows, *norm[:4], *parameters, y, kept, *rest, norm.eps, activation=activation, in_front=norm.activation,
            **blocks(x, len(w_reduce)),
        )  # fmt: skip
    return y, kept, rest[0], rest[1]


def backward(
    gradient: Tensor, x: Tensor, hidden: Tensor, scale: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: str,
    second: Tensor | None = None,
) -> Results:  # fmt: skip
    """`reference.backward`."""
    results = unfilled_gradients(x, hidden, scale)
    _launch_backward(gradient, second, x, NONE, (hidden, scale, w_reduce, w_expand), (*results, *(None,) * 4), activation)
    return results


def sums(
    gradient: Tensor, x: Tensor, hidden: Tensor, scale: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: str,
    norm: BatchNorm, second: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Behind a BN: S1 and S2; squeezed and its gradient dm; dt and dq of the linear layers. dq is [N, R], the others [N, C]."""
    s1, s2, squeezed, d_squeezed, dt, dq = (torch.empty_like(t) for t in (*(scale,) * 5, hidden))
    results = (None, dt, dq, None, squeezed, d_squeezed, s1, s2)
    _launch_backward(gradient, second, x, norm, (hidden, scale, w_reduce, w_expand), results, activation)
    return s1, s2, squeezed, d_squeezed, dt, dq


def _launch_backward(
    gradient: Tensor, second: Tensor | None, x: Tensor, norm: BatchNorm, rest: tuple[Tensor, ...],
    results: tuple[Tensor | None, ...], activation: str,
) -> None:  # fmt: skip
    maps = (t if t is None else t.contiguous(memory_format=layout_of(x)) for t in (gradient, second, x))
    given = (t.contiguous() for t in rest)
    with torch.cuda.device_of(x):
        backward_kernel[(len(x),)](
            *maps, *norm[:4], *given, *results, norm.eps, activation=activation, in_front=norm.activation,
            **blocks(x, rest[0].shape[1]),
        )  # fmt: skip
