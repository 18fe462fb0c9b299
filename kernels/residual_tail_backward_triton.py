# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The residual tail backward in Triton: the result's gradient enters; the gradients of maps, BN and linear layers leave.

One pass over the maps for S1, S2 and dz; small launches through sigmoid and linear layers; one pass for conv_out's gradient.
Where there is no shortcut dz is nobody's gradient: the second pass computes it again instead of reading it. The formulas are
in `residual_tail_function.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.mish_triton import activated, mish_slope
from kernels.residual_tail_tiles import IMAGES_TILE, channel_block, image_tile, power_of_two, sums_tile
from kernels.residual_tail_triton import channel, line, map_grid, place, reciprocal_deviation


@triton.jit
def sloped(gradient, z, activation: tl.constexpr):
    """g act'(z) of float32 blocks."""
    if activation == "relu":
        gradient = tl.where(z > 0.0, gradient, 0.0)
    elif activation == "mish":
        gradient = gradient * mish_slope(z)
    return gradient


@triton.jit
def sums_kernel(
    gradient, x, shortcut, weight, bias, mean, variance, scale, dz_out, s1_out, s2_out, rows, eps,
    channels: tl.constexpr, group: tl.constexpr, activation: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """S1 and S2 of every group of rows, and dz where a shortcut wants it: up to three reads, one write."""
    image = tl.program_id(0).to(tl.int64)  # where there is a scale, groups are images
    start = image * group
    count = tl.minimum(rows - start, group).to(tl.int32)
    r = tl.arange(0, block_rows)[:, None]
    c = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    slope, offset = line(weight, bias, variance, scale, image, c, eps, channels)
    mu = channel(mean, c, channels)
    s1 = tl.zeros([block_rows, block_channels], tl.float32)
    s2 = tl.zeros([block_rows, block_channels], tl.float32)
    base = start * channels + (r * channels + c[None, :])
    for step in range(0, group, block_rows):
        at = base + step * channels
        there = (step + r < count) & (c[None, :] < channels)
        dz = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
        centred = tl.load(x + at, mask=there, other=0.0).to(tl.float32) - mu[None, :]
        if activation != "none":
            z = centred * slope[None, :] + offset[None, :]
            if shortcut is not None:
                z += tl.load(shortcut + at, mask=there, other=0.0).to(tl.float32)
            dz = sloped(dz, z, activation)
        if dz_out is not None:
            tl.store(dz_out + at, dz.to(dz_out.dtype.element_ty), mask=there)
        s1 += dz
        s2 += dz * centred
    at = image * channels + c
    tl.store(s1_out + at, tl.sum(s1, 0), mask=c < channels)
    tl.store(s2_out + at, tl.sum(s2, 0), mask=c < channels)


@triton.jit
def excite_gradient_kernel(
    s1, s2, scale, hidden, weight, bias, variance, w_reduce, w_expand, d_logits, d_hidden, d_squeezed, eps,
    channels: tl.constexpr, units: tl.constexpr, activation: tl.constexpr,
    block_channels: tl.constexpr, block_units: tl.constexpr,
):  # fmt: skip
    """An image's dt, dq and dm: from its sums back through scale, sigmoid and both linear layers."""
    image = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, block_channels)
    inside = c < channels
    at = image * channels + c
    a = channel(weight, c, channels) * reciprocal_deviation(variance, c, eps, channels)
    s = tl.load(scale + at, mask=inside, other=0.0)
    ds = a * tl.load(s2 + at, mask=inside, other=0.0) + channel(bias, c, channels) * tl.load(s1 + at, mask=inside, other=0.0)
    dt = ds * s * (1.0 - s)
    tl.store(d_logits + at, dt, mask=inside)
    dm = tl.zeros([block_channels], tl.float32)
    for start in range(0, units, block_units):
        u = start + tl.arange(0, block_units)
        both = (u[:, None] < units) & inside[None, :]
        expand = tl.load(w_expand + c[None, :] * units + u[:, None], mask=both, other=0.0).to(tl.float32)
        q = tl.load(hidden + image * units + u, mask=u < units, other=0.0)
        dq = sloped(tl.sum(expand * dt[None, :], 1), q, activation)
        tl.store(d_hidden + image * units + u, dq, mask=u < units)
        reduce = tl.load(w_reduce + u[:, None] * channels + c[None, :], mask=both, other=0.0).to(tl.float32)
        dm += tl.sum(reduce * dq[:, None], 0)
    tl.store(d_squeezed + at, dm, mask=inside)


@triton.jit
def channel_gradient_kernel(
    s1, s2, variance, d_weight, d_bias, groups, eps,
    channels: tl.constexpr, block_groups: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """dgamma and dbeta without squeeze-excitation: sums over groups."""
    c = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    sum_weight = tl.zeros([block_groups, block_channels], tl.float32)
    sum_bias = tl.zeros([block_groups, block_channels], tl.float32)
    first = 0
    while first < groups:
        g = first + tl.arange(0, block_groups)[:, None]
        at = g.to(tl.int64) * channels + c[None, :]
        there = (g < groups) & (c[None, :] < channels)
        sum_bias += tl.load(s1 + at, mask=there, other=0.0)
        sum_weight += tl.load(s2 + at, mask=there, other=0.0)
        first += block_groups
    rstd = reciprocal_deviation(variance, c, eps, channels)
    tl.store(d_bias + c, tl.sum(sum_bias, 0), mask=c < channels)
    tl.store(d_weight + c, tl.sum(sum_weight, 0) * rstd, mask=c < channels)


@triton.jit
def parameter_gradient_kernel(
    s1, s2, scale, hidden, image_mean, mean, variance, weight, bias, d_logits, d_hidden, d_squeezed,
    d_weight, d_bias, d_reduce, d_expand, d_b_reduce, d_b_expand, images, eps,
    channels: tl.constexpr, units: tl.constexpr, activation: tl.constexpr,
    block_images: tl.constexpr, block_channels: tl.constexpr, block_units: tl.constexpr,
):  # fmt: skip
    """Sums over images: dgamma, dbeta; dW_reduce [units, C] = sum dq m^T, dW_expand [C, units] = sum dt act(q)^T; of biases."""
    c = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    u = tl.program_id(1) * block_units + tl.arange(0, block_units)
    mu, beta = channel(mean, c, channels), channel(bias, c, channels)
    rstd = reciprocal_deviation(variance, c, eps, channels)
    a = channel(weight, c, channels) * rstd
    sum_weight = tl.zeros([block_images, block_channels], tl.float32)
    sum_bias = tl.zeros([block_images, block_channels], tl.float32)
    reduce = tl.zeros([block_channels, block_units], tl.float32)
    expand = tl.zeros([block_channels, block_units], tl.float32)
    sum_dq = tl.zeros([block_images, block_units], tl.float32)
    sum_dt = tl.zeros([block_images, block_channels], tl.float32)
    first = 0
    while first < images:
        n = (first + tl.arange(0, block_images)).to(tl.int64)[:, None]
        of_map, of_units = n * channels + c[None, :], n * units + u[None, :]
        in_map, in_units = (n < images) & (c[None, :] < channels), (n < images) & (u[None, :] < units)
        s = tl.load(scale + of_map, mask=in_map, other=0.0)
        dm = tl.load(d_squeezed + of_map, mask=in_map, other=0.0)
        centred = tl.load(image_mean + of_map, mask=in_map, other=0.0) - mu[None, :]
        sum_bias += s * tl.load(s1 + of_map, mask=in_map, other=0.0) + dm
        sum_weight += s * tl.load(s2 + of_map, mask=in_map, other=0.0) + dm * centred
        dq = tl.load(
            d_hidden + of_units, mask=in_units, other=0.0
        )  # 0 beyond the last image, like dt: what they multiply is not
        dt = tl.load(d_logits + of_map, mask=in_map, other=0.0)
        h = activated(tl.load(hidden + of_units, mask=in_units, other=0.0), activation)
        reduce += tl.dot(tl.trans(centred * a[None, :] + beta[None, :]), dq, input_precision="ieee")
        expand += tl.dot(tl.trans(dt), h, input_precision="ieee")
        if d_b_reduce is not None:
            sum_dq += dq
        if d_b_expand is not None:
            sum_dt += dt
        first += block_images
    both = (c[:, None] < channels) & (u[None, :] < units)
    tl.store(d_reduce + u[None, :] * channels + c[:, None], reduce.to(d_reduce.dtype.element_ty), mask=both)
    tl.store(d_expand + c[:, None] * units + u[None, :], expand.to(d_expand.dtype.element_ty), mask=both)
    if d_b_reduce is not None:
        own_units = (u < units) & (tl.program_id(0) == 0)
        tl.store(d_b_reduce + u, tl.sum(sum_dq, 0).to(d_b_reduce.dtype.element_ty), mask=own_units)
    own = (c < channels) & (tl.program_id(1) == 0)
    if d_b_expand is not None:
        tl.store(d_b_expand + c, tl.sum(sum_dt, 0).to(d_b_expand.dtype.element_ty), mask=own)
    tl.store(d_bias + c, tl.sum(sum_bias, 0), mask=own)
    tl.store(d_weight + c, tl.sum(sum_weight, 0) * rstd, mask=own)


@triton.jit
def map_gradient_kernel(
    gradient, x, weight, bias, mean, variance, scale, d_squeezed, d_weight, d_bias, out, rows, positions, eps,
    per_position, per_row, channels: tl.constexpr, activation: tl.constexpr, training: tl.constexpr,
    chunks: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """dc = dz s a + a dm / P - a dbeta / M - (c - mu) a rstd dgamma / M; `activation` is "none" where dz itself is given."""
    image, start, count = place(rows, positions, scale, chunks, block_rows)
    c = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    slope, offset = line(weight, bias, variance, scale, image, c, eps, channels)
    rstd = reciprocal_deviation(variance, c, eps, channels)
    a = channel(weight, c, channels) * rstd
    constant = tl.zeros([block_channels], tl.float32)
    if scale is not None:
        constant += channel(d_squeezed + image * channels, c, channels) * a * per_position
    r = tl.arange(0, block_rows)[:, None]
    at = start * channels + (r * channels + c[None, :])
    there = (r < count) & (c[None, :] < channels)
    dz = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
    if training or activation != "none":
        centred = tl.load(x + at, mask=there, other=0.0).to(tl.float32) - channel(mean, c, channels)[None, :]
        dz = sloped(dz, centred * slope[None, :] + offset[None, :], activation)
        result = dz * slope[None, :] + constant[None, :]
        if training:
            shift = a * channel(d_bias, c, channels) * per_row
            incline = a * rstd * channel(d_weight, c, channels) * per_row
            result -= centred * incline[None, :] + shift[None, :]
    else:
        result = dz * slope[None, :] + constant[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=there)


def sums(
    gradient: Tensor, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor,
    scale: Tensor | None, dz: Tensor | None, s1: Tensor, s2: Tensor, group: int, eps: float, activation: str,
) -> None:  # fmt: skip
    """Fill s1 and s2 [groups, C] float32, and dz if wanted; every map channels_last."""
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    tile = sums_tile(channels, group)
    with torch.cuda.device_of(x):
        sums_kernel[(len(s1), triton.cdiv(channels, tile.channels))](
            gradient, x, shortcut, weight, bias, mean, variance, scale, dz, s1, s2, rows, eps,
            channels=channels, group=group, activation=activation,
            block_rows=tile.rows, block_channels=tile.channels, num_warps=tile.warps,
        )  # fmt: skip


def excite_gradient(
    s1: Tensor, s2: Tensor, scale: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, variance: Tensor,
    w_reduce: Tensor, w_expand: Tensor, d_logits: Tensor, d_hidden: Tensor, d_squeezed: Tensor, eps: float, activation: str,
) -> None:  # fmt: skip
    """Fill d_logits and d_squeezed [N, C] and d_hidden [N, units] float32."""
    channels, units = s1.shape[1], w_reduce.shape[0]
    tile = image_tile(channels, units)
    with torch.cuda.device_of(s1):
        excite_gradient_kernel[(len(s1),)](
            s1, s2, scale, hidden, weight, bias, variance, w_reduce, w_expand, d_logits, d_hidden, d_squeezed, eps,
            channels=channels, units=units, activation=activation,
            block_channels=tile.channels, block_units=tile.rows, num_warps=tile.warps,
        )  # fmt: skip


def channel_gradient(s1: Tensor, s2: Tensor, variance: Tensor, d_weight: Tensor, d_bias: Tensor, eps: float) -> None:
    """Fill d_weight and d_bias [C] float32."""
    groups, channels = s1.shape
    tile = channel_block(groups)
    with torch.cuda.device_of(s1):
        channel_gradient_kernel[(triton.cdiv(channels, tile.channels),)](
            s1, s2, variance, d_weight, d_bias, groups, eps,
            channels=channels, block_groups=tile.rows, block_channels=tile.channels, num_warps=tile.warps,
        )  # fmt: skip


def parameter_gradient(
    s1: Tensor, s2: Tensor, scale: Tensor, hidden: Tensor, image_mean: Tensor, mean: Tensor, variance: Tensor,
    weight: Tensor, bias: Tensor, d_logits: Tensor, d_hidden: Tensor, d_squeezed: Tensor,
    d_weight: Tensor, d_bias: Tensor, d_reduce: Tensor, d_expand: Tensor, d_b_reduce: Tensor | None,
    d_b_expand: Tensor | None, eps: float, activation: str,
) -> None:  # fmt: skip
    """Fill d_weight and d_bias [C] float32, d_reduce [units, C], d_expand [C, units], d_b_reduce [units], d_b_expand [C]."""
    images, channels, units, tile = len(image_mean), image_mean.shape[1], hidden.shape[1], IMAGES_TILE
    side = min(max(power_of_two(units), 16), 32)  # tl.dot wants 16 at least
    with torch.cuda.device_of(s1):
        parameter_gradient_kernel[(triton.cdiv(channels, tile.channels), triton.cdiv(units, side))](
            s1, s2, scale, hidden, image_mean, mean, variance, weight, bias, d_logits, d_hidden, d_squeezed,
            d_weight, d_bias, d_reduce, d_expand, d_b_reduce, d_b_expand, images, eps,
            channels=channels, units=units, activation=activation,
            block_images=tile.rows, block_channels=tile.channels, block_units=side, num_warps=tile.warps,
        )  # fmt: skip


def map_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, scale: Tensor | None,
    d_squeezed: Tensor | None, d_weight: Tensor, d_bias: Tensor, out: Tensor, eps: float, activation: str, training: bool,
) -> None:  # fmt: skip
    """Fill `out`, conv_out's gradient; every map channels_last."""
    n, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    tile, chunks, blocks = map_grid(n, channels, positions, scale is not None)
    with torch.cuda.device_of(x):
        map_gradient_kernel[(blocks, triton.cdiv(channels, tile.channels))](
            gradient, x, weight, bias, mean, variance, scale, d_squeezed, d_weight, d_bias, out, n * positions, positions, eps,
            1 / positions, 1 / (n * positions), channels=channels, activation=activation, training=training,
            chunks=chunks, block_rows=tile.rows, block_channels=tile.channels, num_warps=tile.warps,
        )  # fmt: skip
