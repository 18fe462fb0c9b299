# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The residual tail forward in Triton: channels_last maps enter; statistics, scales and the result leave.

The formulas are in `residual_tail_function.py`. A map is read as rows [N * P, C], one row a position. Statistics are taken
over groups of rows: a group is an image where squeeze-excitation needs image means, else as many rows as fill the chip.
Apart from `residual_tail_ops.py` so that nothing imports Triton before a kernel runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.mish_triton import activated
from kernels.residual_tail_tiles import Tile, channel_block, image_tile, row_tile


@triton.jit
def channel(pointer, c, channels: tl.constexpr):
    """A [C] vector in float32 at the channels c; 0 beyond the last."""
    return tl.load(pointer + c, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit
def reciprocal_deviation(variance, c, eps, channels: tl.constexpr):
    """rstd; variances beyond the last channel read as 0."""
    return tl.rsqrt(channel(variance, c, channels) + eps)


@triton.jit
def merged(count, mean, m2, block: tl.constexpr):
    """Merge `block` partial statistics per channel (Chan et al.): counts [block, 1], means and squared deviations [block, C].

    Means are taken relative to the first: where all are equal the result is exactly that, and the deviation exactly 0.
    """
    origin = tl.sum(tl.where(tl.arange(0, block)[:, None] == 0, mean, 0.0), 0)
    total = tl.sum(count, 0)
    offset = tl.sum(count * (mean - origin[None, :]), 0) / total
    apart = mean - origin[None, :] - offset[None, :]
    return total, origin + offset, tl.sum(m2 + count * apart * apart, 0)


@triton.jit
def statistics_kernel(
    x, group_mean, group_m2, rows, channels: tl.constexpr, group: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of every group of rows: one read. Each lane runs Welford's update on its own rows."""
    start = tl.program_id(0).to(tl.int64) * group
    count = tl.minimum(rows - start, group).to(tl.int32)
    r = tl.arange(0, block_rows)[:, None]
    c = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    x += start * channels + (r * channels + c[None, :])
    mean = tl.zeros([block_rows, block_channels], tl.float32)
    m2 = tl.zeros([block_rows, block_channels], tl.float32)
    for step in range(0, group, block_rows):
        there = step + r < count
        value = tl.load(x + step * channels, mask=there & (c[None, :] < channels), other=0.0).to(tl.float32)
        apart = value - mean
        share = 1.0 / (step // block_rows + 1)
        mean += tl.where(there, apart * share, 0.0)
        m2 += tl.where(there, apart * (value - mean), 0.0)
    seen = tl.maximum((count - r + block_rows - 1) // block_rows, 0).to(tl.float32)  # rows of each lane
    _, mean, m2 = merged(seen, mean, m2, block_rows)
    at = tl.program_id(0).to(tl.int64) * channels + c
    tl.store(group_mean + at, mean, mask=c < channels)
    if group_m2 is not None:
        tl.store(group_m2 + at, m2, mask=c < channels)


@triton.jit
def batch_kernel(
    group_mean, group_m2, mean_out, variance_out, running_mean, running_var, groups, rows, momentum,
    channels: tl.constexpr, group: tl.constexpr, block_groups: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Merge the groups into mu and var, and move the running statistics: var by M / (M - 1)."""
    c = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    lane = tl.arange(0, block_groups)[:, None]
    count = tl.zeros([block_groups, 1], tl.float32)
    mean = tl.zeros([block_groups, block_channels], tl.float32)
    m2 = tl.zeros([block_groups, block_channels], tl.float32)
    first = 0
    while first < groups:  # not `for`: Triton's interpreter takes no run-time bounds there with NumPy 2.4
        g = first + lane
        size = tl.maximum(tl.minimum(rows - g.to(tl.int64) * group, group), 0).to(tl.float32)
        at = g.to(tl.int64) * channels + c[None, :]
        there = (g < groups) & (c[None, :] < channels)
        apart = tl.load(group_mean + at, mask=there, other=0.0) - mean
        share = size / tl.maximum(count + size, 1.0)
        mean += apart * share
        m2 += tl.load(group_m2 + at, mask=there, other=0.0) + apart * apart * (count * share)
        count += size
        first += block_groups
    total, mean, m2 = merged(count, mean, m2, block_groups)
    inside = c < channels
    tl.store(mean_out + c, mean, mask=inside)
    tl.store(variance_out + c, m2 / total, mask=inside)
    old_mean, old_var = channel(running_mean, c, channels), channel(running_var, c, channels)
    new_mean = (1.0 - momentum) * old_mean + momentum * mean
    new_var = (1.0 - momentum) * old_var + momentum * (m2 / (total - 1.0))
    tl.store(running_mean + c, new_mean.to(running_mean.dtype.element_ty), mask=inside)
    tl.store(running_var + c, new_var.to(running_var.dtype.element_ty), mask=inside)


@triton.jit
def excite_kernel(
    image_mean, mean, variance, weight, bias, w_reduce, w_expand, b_reduce, b_expand, scale_out, hidden_out, eps,
    channels: tl.constexpr, units: tl.constexpr, activation: tl.constexpr,
    block_channels: tl.constexpr, block_units: tl.constexpr,
):  # fmt: skip
    """An image's squeeze, both linear layers and the sigmoid, all channels in one program: s [N, C] and q [N, units]."""
    image = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, block_channels)
    inside = c < channels
    a = channel(weight, c, channels) * reciprocal_deviation(variance, c, eps, channels)
    centred = tl.load(image_mean + image * channels + c, mask=inside, other=0.0) - channel(mean, c, channels)
    squeezed = tl.where(inside, centred * a + channel(bias, c, channels), 0.0)
    logits = tl.zeros([block_channels], tl.float32)
    if b_expand is not None:
        logits += channel(b_expand, c, channels)
    for start in range(0, units, block_units):
        u = start + tl.arange(0, block_units)
        both = (u[:, None] < units) & inside[None, :]
        reduce = tl.load(w_reduce + u[:, None] * channels + c[None, :], mask=both, other=0.0).to(tl.float32)
        hidden = tl.sum(reduce * squeezed[None, :], 1)
        if b_reduce is not None:
            hidden += channel(b_reduce, u, units)
        tl.store(hidden_out + image * units + u, hidden, mask=u < units)
        expand = tl.load(w_expand + c[None, :] * units + u[:, None], mask=both, other=0.0).to(tl.float32)
        logits += tl.sum(expand * activated(hidden, activation)[:, None], 0)
    tl.store(scale_out + image * channels + c, tl.sigmoid(logits), mask=inside)


@triton.jit
def place(rows, positions, scale, chunks: tl.constexpr, block_rows: tl.constexpr):
    """The image this program works on, its first row and how many: any rows where no image has its own scale."""
    block = tl.program_id(0).to(tl.int64)
    if scale is None:
        image, start, left = block, block * block_rows, rows - block * block_rows
    else:
        image = block // chunks
        left = positions - (block % chunks) * block_rows
        start = (image + 1) * positions - left
    return image, start, tl.minimum(left, block_rows).to(tl.int32)


@triton.jit
def line(weight, bias, variance, scale, image, c, eps, channels: tl.constexpr):
    """z = (c - mu) slope + offset + r: slope = s a, offset = s beta, at the channels c of an image."""
    slope = channel(weight, c, channels) * reciprocal_deviation(variance, c, eps, channels)
    offset = channel(bias, c, channels)
    if scale is not None:
        s = channel(scale + image * channels, c, channels)
        slope, offset = slope * s, offset * s
    return slope, offset


@triton.jit
def tail_kernel(
    x, shortcut, weight, bias, mean, variance, scale, out, rows, positions, eps,
    channels: tl.constexpr, activation: tl.constexpr, chunks: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """act(z): two reads (one without a shortcut), one write."""
    image, start, count = place(rows, positions, scale, chunks, block_rows)
    c = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    slope, offset = line(weight, bias, variance, scale, image, c, eps, channels)
    r = tl.arange(0, block_rows)[:, None]
    at = start * channels + (r * channels + c[None, :])
    there = (r < count) & (c[None, :] < channels)
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    z = (value - channel(mean, c, channels)[None, :]) * slope[None, :] + offset[None, :]
    if shortcut is not None:
        z += tl.load(shortcut + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, activated(z, activation).to(out.dtype.element_ty), mask=there)


def statistics(x: Tensor, group_mean: Tensor, group_m2: Tensor | None, group: int) -> None:
    """Fill [groups, C] float32 with each group's mean and, if wanted, sum of squared deviations."""
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    tile = row_tile(channels, group)
    grid = (triton.cdiv(rows, group), triton.cdiv(channels, tile.channels))
    with torch.cuda.device_of(x):
        statistics_kernel[grid](
            x, group_mean, group_m2, rows, channels=channels, group=group,
            block_rows=tile.rows, block_channels=tile.channels, num_warps=tile.warps,
        )  # fmt: skip


def batch(
    group_mean: Tensor, group_m2: Tensor, mean: Tensor, variance: Tensor, running_mean: Tensor, running_var: Tensor,
    rows: int, group: int, momentum: float,
) -> None:  # fmt: skip
    """Fill mean and variance [C] and move the running statistics."""
    groups, channels = group_mean.shape
    tile = channel_block(groups)
    with torch.cuda.device_of(mean):
        batch_kernel[(triton.cdiv(channels, tile.channels),)](
            group_mean, group_m2, mean, variance, running_mean, running_var, groups, rows, momentum,
            channels=channels, group=group, block_groups=tile.rows, block_channels=tile.channels, num_warps=tile.warps,
        )  # fmt: skip


def excite(
    image_mean: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, w_reduce: Tensor, w_expand: Tensor,
    b_reduce: Tensor | None, b_expand: Tensor | None, scale: Tensor, hidden: Tensor, eps: float, activation: str,
) -> None:  # fmt: skip
    """Fill scale [N, C] and hidden [N, units]."""
    channels, units = image_mean.shape[1], w_reduce.shape[0]
    tile = image_tile(channels, units)
    with torch.cuda.device_of(scale):
        excite_kernel[(len(image_mean),)](
            image_mean, mean, variance, weight, bias, w_reduce.contiguous(), w_expand.contiguous(), b_reduce, b_expand,
            scale, hidden, eps,
            channels=channels, units=units, activation=activation,
            block_channels=tile.channels, block_units=tile.rows, num_warps=tile.warps,
        )  # fmt: skip


def tail(
    x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, scale: Tensor | None,
    out: Tensor, eps: float, activation: str,
) -> None:  # fmt: skip
    """Fill `out`; every map channels_last."""
    n, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    tile, chunks, blocks = map_grid(n, channels, positions, scale is not None)
    with torch.cuda.device_of(x):
        tail_kernel[(blocks, triton.cdiv(channels, tile.channels))](
            x, shortcut, weight, bias, mean, variance, scale, out, n * positions, positions, eps,
            channels=channels, activation=activation, chunks=chunks,
            block_rows=tile.rows, block_channels=tile.channels, num_warps=tile.warps,
        )  # fmt: skip


def map_grid(n: int, channels: int, positions: int, per_image: bool) -> tuple[Tile, int, int]:
    """The tile of a pass over a map, tiles for each image's rows, tiles in all: `place` reads them."""
    tile = row_tile(channels, positions if per_image else n * positions, largest=4096)
    chunks = triton.cdiv(positions, tile.rows) if per_image else 1
    return tile, chunks, n * chunks if per_image else triton.cdiv(n * positions, tile.rows)
