# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The residual tail in Triton, by the formulas of `fusable.py`.

A map is channels_last and read as rows [N * P, C], one row a position. Statistics and sums are taken over groups of rows: a
group is an image where squeeze-excitation needs image means, else as many rows as fill the chip. Backward: one pass over the
maps for S1, S2 and dz; small launches through sigmoid and linear layers; one pass for conv_out's gradient. Where there is no
shortcut dz is nobody's gradient: the second pass computes it again instead of reading it.
"""

from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from kernels.backends import unfilled
from kernels.mish.triton import activate, times_slope
from kernels.residual_tail.fusable import ALONE, NEAR, Gradients, Neighbours, Settings, Tensors, has_own_gradient, layers
from kernels.residual_tail.tiles import (
    IMAGES_TILE,
    channel_block,
    folded,
    group_rows,
    image_tile,
    power_of_two,
    row_tile,
    statistics_tile,
    sums_tile,
    together,
)
from kernels.squeeze_excite import triton as excitation
from kernels.squeeze_excite.triton import per_channel

FUSES_NEIGHBOURS = True  # all of `fusable.Neighbours`, in each kernel as it reads or writes a map anyway


@triton.jit
def channel(pointer, c, channels: tl.constexpr):
    """A [C] vector in float32 at the channels c; 0 beyond the last."""
    return tl.load(pointer + c, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit
def lanes_of(channels: tl.constexpr, lanes: tl.constexpr, block_channels: tl.constexpr):
    """This program's lanes of a map's row, and their channels: of one position, or of several that are read as one row."""
    lane = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    c = lane
    if lanes != channels:
        c = lane % channels
    return lane, c


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
    delta = mean - origin[None, :] - offset[None, :]
    return total, origin + offset, tl.sum(m2 + count * delta * delta, 0)


@triton.jit
def added(x, addend, share, offsets, mask):
    """Values of a map, or of its sum with a share of another, rounded as it is stored, in float32."""
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if addend is not None:
        value += share * tl.load(addend + offsets, mask=mask, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def statistics_kernel(
    x, addend, factor, sum_out, group_mean, group_m2, rows, channels: tl.constexpr, group: tl.constexpr, even: tl.constexpr,
    positions: tl.constexpr, own: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of every group of rows: one read, summed relative to the mean of the first tile.

    That lies so near the group's that the square of their offset takes little away from the sum of squares. It is found
    relative to the first row: where all values are equal the mean is exactly that, and the deviation exactly 0. even: groups
    are whole tiles, so that no row has to be left out. addend: a second map; then the statistics are those of the sum, which is
    written too. factor: of the addend; own: one for each image, of which a group is a part.
    """
    start = tl.program_id(0).to(tl.int64) * group
    count = tl.minimum(rows - start, group).to(tl.int32)
    r = tl.arange(0, block_rows)[:, None]
    c = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    inside = c[None, :] < channels
    first = start * channels + c
    share = 1.0
    if factor is not None:
        share = tl.load(factor + (start // positions if own else 0)).to(tl.float32)
    origin = added(x, addend, share, first, c < channels)
    offsets = start * channels + (r * channels + c[None, :])
    value = added(x, addend, share, offsets, (even | (r < count)) & inside)
    if sum_out is not None:
        tl.store(sum_out + offsets, value.to(sum_out.dtype.element_ty), mask=(even | (r < count)) & inside)
    delta = value - origin[None, :]
    if not even:
        delta = tl.where(r < count, delta, 0.0)
    mean = origin + tl.sum(delta, 0) / tl.minimum(count, block_rows)
    delta = value - mean[None, :]
    if not even:
        delta = tl.where(r < count, delta, 0.0)
    s1, s2 = delta, delta * delta
    for step in range(block_rows, group, block_rows):
        mask = (even | (step + r < count)) & inside
        value = added(x, addend, share, offsets + step * channels, mask)
        if sum_out is not None:
            tl.store(sum_out + offsets + step * channels, value.to(sum_out.dtype.element_ty), mask=mask)
        delta = value - mean[None, :]
        if not even:
            delta = tl.where(step + r < count, delta, 0.0)
        s1 += delta
        s2 += delta * delta
    total = tl.sum(s1, 0)
    m2 = tl.sum(s2, 0) - total * total / count
    mean += total / count
    offsets = tl.program_id(0).to(tl.int64) * channels + c
    tl.store(group_mean + offsets, mean, mask=c < channels)
    tl.store(group_m2 + offsets, m2, mask=c < channels)


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
        offsets = g.to(tl.int64) * channels + c[None, :]
        mask = (g < groups) & (c[None, :] < channels)
        delta = tl.load(group_mean + offsets, mask=mask, other=0.0) - mean
        fraction = size / tl.maximum(count + size, 1.0)
        mean += delta * fraction
        m2 += tl.load(group_m2 + offsets, mask=mask, other=0.0) + delta * delta * (count * fraction)
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
        mask = (u[:, None] < units) & inside[None, :]
        reduce = tl.load(w_reduce + u[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        hidden = tl.sum(reduce * squeezed[None, :], 1)
        if b_reduce is not None:
            hidden += channel(b_reduce, u, units)
        tl.store(hidden_out + image * units + u, hidden, mask=u < units)
        expand = tl.load(w_expand + c[None, :] * units + u[:, None], mask=mask, other=0.0).to(tl.float32)
        logits += tl.sum(expand * activate(hidden, activation)[:, None], 0)
    tl.store(scale_out + image * channels + c, tl.sigmoid(logits), mask=inside)


@triton.jit
def row_range(rows, positions, scale, chunks: tl.constexpr, block_rows: tl.constexpr):
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
    """z = (c - mu) slope + intercept + r: slope = s a, intercept = s beta, at the channels c of an image."""
    slope = channel(weight, c, channels) * reciprocal_deviation(variance, c, eps, channels)
    intercept = channel(bias, c, channels)
    if scale is not None:
        s = channel(scale + image * channels, c, channels)
        slope, intercept = slope * s, intercept * s
    return slope, intercept


@triton.jit
def shortcut_at(shortcut, weight, bias, mean, variance, offsets, mask, c, eps, channels: tl.constexpr):
    """The shortcut, through its own BN where it has one; and before its scale and shift, centred."""
    centred = tl.load(shortcut + offsets, mask=mask, other=0.0).to(tl.float32)
    value = centred
    if weight is not None:
        slope, intercept = line(weight, bias, variance, None, 0, c, eps, channels)
        centred -= channel(mean, c, channels)[None, :]
        value = centred * slope[None, :] + intercept[None, :]
    return value, centred


@triton.jit
def tail_kernel(
    x, shortcut, kept, weight, bias, mean, variance, scale, r_weight, r_bias, r_mean, r_variance, out,
    rows, positions, eps, per_kept,
    channels: tl.constexpr, lanes: tl.constexpr, activation: tl.constexpr, chunks: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """act(z), and dropout where something says what is kept: two reads (one without a shortcut), one write."""
    image, start, count = row_range(rows, positions, scale, chunks, block_rows)
    lane, c = lanes_of(channels, lanes, block_channels)
    slope, intercept = line(weight, bias, variance, scale, image, c, eps, channels)
    r = tl.arange(0, block_rows)[:, None]
    offsets = start * lanes + (r * lanes + lane[None, :])
    mask = (r < count) & (lane[None, :] < lanes)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    z = (value - channel(mean, c, channels)[None, :]) * slope[None, :] + intercept[None, :]
    if shortcut is not None:
        z += shortcut_at(shortcut, r_weight, r_bias, r_mean, r_variance, offsets, mask, c, eps, channels)[0]
    result = activate(z, activation)
    if kept is not None:
        result *= tl.load(kept + offsets, mask=mask, other=0).to(tl.float32) * per_kept
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


# Backward


@triton.jit
def total_gradient(gradient, second, kept, per_kept, offsets, mask):
    """The activation's gradient in float32: of one or two uses of the result, through dropout where there is some."""
    total = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32)
    if second is not None:
        total += tl.load(second + offsets, mask=mask, other=0.0).to(tl.float32)
    if kept is not None:
        total *= tl.load(kept + offsets, mask=mask, other=0).to(tl.float32) * per_kept
    return total


@triton.jit
def sums_kernel(
    gradient, second, kept, x, shortcut, weight, bias, mean, variance, scale, r_weight, r_bias, r_mean, r_variance,
    dz_out, s1_out, s2_out, r_s2_out, rows, eps, per_kept,
    channels: tl.constexpr, lanes: tl.constexpr, group: tl.constexpr, activation: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """S1 and S2 of every group of rows, and dz where a shortcut wants it: up to four reads, one write.

    r_s2_out: S2 of the shortcut's own BN, where it has one; its S1 is the same.
    """
    image = tl.program_id(0).to(tl.int64)  # where there is a scale, groups are images
    start = image * group
    count = tl.minimum(rows - start, group).to(tl.int32)
    row = tl.arange(0, block_rows)[:, None]
    lane, c = lanes_of(channels, lanes, block_channels)
    slope, intercept = line(weight, bias, variance, scale, image, c, eps, channels)
    mu = channel(mean, c, channels)
    s1 = tl.zeros([block_rows, block_channels], tl.float32)
    s2 = tl.zeros([block_rows, block_channels], tl.float32)
    r_s2 = tl.zeros([block_rows, block_channels], tl.float32)
    base = start * lanes + (row * lanes + lane[None, :])
    for step in range(0, group, block_rows):
        offsets = base + step * lanes
        mask = (step + row < count) & (lane[None, :] < lanes)
        dz = total_gradient(gradient, second, kept, per_kept, offsets, mask)
        centred = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - mu[None, :]
        if activation != "none" or r_s2_out is not None:
            z = centred * slope[None, :] + intercept[None, :]
            if shortcut is not None:
                r, r_centred = shortcut_at(shortcut, r_weight, r_bias, r_mean, r_variance, offsets, mask, c, eps, channels)
                z += r
            dz = times_slope(dz, z, activation)
        if dz_out is not None:
            tl.store(dz_out + offsets, dz.to(dz_out.dtype.element_ty), mask=mask)
        s1 += dz
        s2 += dz * centred
        if r_s2_out is not None:
            r_s2 += dz * r_centred
    own: tl.constexpr = block_channels // (lanes // channels)
    if lanes != channels:
        c = tl.arange(0, own)
    offsets = image * channels + c
    if r_s2_out is not None:
        tl.store(r_s2_out + offsets, per_channel(r_s2, channels, lanes, block_channels, own), mask=c < channels)
    tl.store(s1_out + offsets, per_channel(s1, channels, lanes, block_channels, own), mask=c < channels)
    tl.store(s2_out + offsets, per_channel(s2, channels, lanes, block_channels, own), mask=c < channels)


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
    offsets = image * channels + c
    a = channel(weight, c, channels) * reciprocal_deviation(variance, c, eps, channels)
    s = tl.load(scale + offsets, mask=inside, other=0.0)
    sums = tl.load(s1 + offsets, mask=inside, other=0.0)
    ds = a * tl.load(s2 + offsets, mask=inside, other=0.0) + channel(bias, c, channels) * sums
    dt = ds * s * (1.0 - s)
    tl.store(d_logits + offsets, dt, mask=inside)
    dm = tl.zeros([block_channels], tl.float32)
    for start in range(0, units, block_units):
        u = start + tl.arange(0, block_units)
        mask = (u[:, None] < units) & inside[None, :]
        expand = tl.load(w_expand + c[None, :] * units + u[:, None], mask=mask, other=0.0).to(tl.float32)
        q = tl.load(hidden + image * units + u, mask=u < units, other=0.0)
        dq = times_slope(tl.sum(expand * dt[None, :], 1), q, activation)
        tl.store(d_hidden + image * units + u, dq, mask=u < units)
        reduce = tl.load(w_reduce + u[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        dm += tl.sum(reduce * dq[:, None], 0)
    tl.store(d_squeezed + offsets, dm, mask=inside)


@triton.jit
def channel_gradient_kernel(
    s1, s2, variance, d_weight, d_bias, r_s2, r_variance, r_d_weight, r_d_bias, groups, eps,
    channels: tl.constexpr, block_groups: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """dgamma and dbeta without squeeze-excitation: sums over groups; the shortcut's own BN's too, whose dbeta is the same."""
    c = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    sum_weight = tl.zeros([block_groups, block_channels], tl.float32)
    sum_bias = tl.zeros([block_groups, block_channels], tl.float32)
    r_sum_weight = tl.zeros([block_groups, block_channels], tl.float32)
    first = 0
    while first < groups:
        g = first + tl.arange(0, block_groups)[:, None]
        offsets = g.to(tl.int64) * channels + c[None, :]
        mask = (g < groups) & (c[None, :] < channels)
        sum_bias += tl.load(s1 + offsets, mask=mask, other=0.0)
        sum_weight += tl.load(s2 + offsets, mask=mask, other=0.0)
        if r_s2 is not None:
            r_sum_weight += tl.load(r_s2 + offsets, mask=mask, other=0.0)
        first += block_groups
    rstd = reciprocal_deviation(variance, c, eps, channels)
    tl.store(d_bias + c, tl.sum(sum_bias, 0), mask=c < channels)
    tl.store(d_weight + c, tl.sum(sum_weight, 0) * rstd, mask=c < channels)
    if r_s2 is not None:
        rstd = reciprocal_deviation(r_variance, c, eps, channels)
        tl.store(r_d_bias + c, tl.sum(sum_bias, 0), mask=c < channels)
        tl.store(r_d_weight + c, tl.sum(r_sum_weight, 0) * rstd, mask=c < channels)


@triton.jit
def parameter_gradient_kernel(
    s1, s2, scale, hidden, image_mean, mean, variance, weight, bias, d_logits, d_hidden, d_squeezed,
    d_weight, d_bias, d_reduce, d_expand, d_b_reduce, d_b_expand, images, eps,
    channels: tl.constexpr, units: tl.constexpr, activation: tl.constexpr, se_last: tl.constexpr,
    block_images: tl.constexpr, block_channels: tl.constexpr, block_units: tl.constexpr,
):  # fmt: skip
    """Sums over images: dgamma, dbeta; dW_reduce [units, C] = sum dq m^T, dW_expand [C, units] = sum dt act(q)^T; biases'.

    se_last: image_mean is m itself, and BN has no part in it.
    """
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
        squeezed = tl.load(image_mean + of_map, mask=in_map, other=0.0)
        to_bias = tl.load(s1 + of_map, mask=in_map, other=0.0)
        to_weight = tl.load(s2 + of_map, mask=in_map, other=0.0)
        if not se_last:
            s = tl.load(scale + of_map, mask=in_map, other=0.0)
            dm = tl.load(d_squeezed + of_map, mask=in_map, other=0.0)
            centred = squeezed - mu[None, :]
            to_bias = s * to_bias + dm
            to_weight = s * to_weight + dm * centred
            squeezed = centred * a[None, :] + beta[None, :]
        sum_bias += to_bias
        sum_weight += to_weight
        # 0 beyond the last image, like dt: what they multiply is not.
        dq = tl.load(d_hidden + of_units, mask=in_units, other=0.0)
        dt = tl.load(d_logits + of_map, mask=in_map, other=0.0)
        h = activate(tl.load(hidden + of_units, mask=in_units, other=0.0), activation)
        reduce += tl.dot(tl.trans(squeezed), dq, input_precision="ieee")
        expand += tl.dot(tl.trans(dt), h, input_precision="ieee")
        if d_b_reduce is not None:
            sum_dq += dq
        if d_b_expand is not None:
            sum_dt += dt
        first += block_images
    mask = (c[:, None] < channels) & (u[None, :] < units)
    tl.store(d_reduce + u[None, :] * channels + c[:, None], reduce.to(d_reduce.dtype.element_ty), mask=mask)
    tl.store(d_expand + c[:, None] * units + u[None, :], expand.to(d_expand.dtype.element_ty), mask=mask)
    if d_b_reduce is not None:
        own_units = (u < units) & (tl.program_id(0) == 0)
        tl.store(d_b_reduce + u, tl.sum(sum_dq, 0).to(d_b_reduce.dtype.element_ty), mask=own_units)
    own = (c < channels) & (tl.program_id(1) == 0)
    if d_b_expand is not None:
        tl.store(d_b_expand + c, tl.sum(sum_dt, 0).to(d_b_expand.dtype.element_ty), mask=own)
    tl.store(d_bias + c, tl.sum(sum_bias, 0), mask=own)
    tl.store(d_weight + c, tl.sum(sum_weight, 0) * rstd, mask=own)


@triton.jit
def through_batch_norm(dz, slope, centred, weight, variance, d_weight, d_bias, c, eps, per_row, channels: tl.constexpr):
    """dz slope - a dbeta / M - (c - mu) a rstd dgamma / M; the last two in training, which has dgamma and dbeta."""
    result = dz * slope[None, :]
    if d_weight is not None:
        rstd = reciprocal_deviation(variance, c, eps, channels)
        a = channel(weight, c, channels) * rstd * per_row
        slope_term = a * rstd * channel(d_weight, c, channels)
        result -= centred * slope_term[None, :] + (a * channel(d_bias, c, channels))[None, :]
    return result


@triton.jit
def map_gradient_kernel(
    gradient, second, kept, x, shortcut, weight, bias, mean, variance, scale, r_weight, r_bias, r_mean, r_variance,
    d_squeezed, d_weight, d_bias, r_d_weight, r_d_bias, elsewhere, out, r_out,
    rows, positions, eps, per_kept, per_position, per_row, channels: tl.constexpr, lanes: tl.constexpr,
    activation: tl.constexpr, se_last: tl.constexpr, chunks: tl.constexpr, block_rows: tl.constexpr,
    block_channels: tl.constexpr,
):  # fmt: skip
    """dc = dz s a + a dm / P - a dbeta / M - (c - mu) a rstd dgamma / M; `activation` is "none" where dz itself is given.

    elsewhere: what conv_out's other uses add to its gradient. r_out: the gradient of a shortcut that has its own BN. se_last:
    dz = (g s + dm / P) act'(z), and dc as without squeeze-excitation.
    """
    image, start, count = row_range(rows, positions, scale, chunks, block_rows)
    lane, c = lanes_of(channels, lanes, block_channels)
    slope, intercept = line(weight, bias, variance, None if se_last else scale, image, c, eps, channels)
    row = tl.arange(0, block_rows)[:, None]
    offsets = start * lanes + (row * lanes + lane[None, :])
    mask = (row < count) & (lane[None, :] < lanes)
    dz = total_gradient(gradient, second, kept, per_kept, offsets, mask)
    if scale is not None:
        of_mean = channel(d_squeezed + image * channels, c, channels) * per_position
    if se_last:
        dz = dz * channel(scale + image * channels, c, channels)[None, :] + of_mean[None, :]
    centred = dz
    if d_weight is not None or r_out is not None or activation != "none":
        centred = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - channel(mean, c, channels)[None, :]
        z = centred * slope[None, :] + intercept[None, :]
        if r_out is not None:
            r, r_centred = shortcut_at(shortcut, r_weight, r_bias, r_mean, r_variance, offsets, mask, c, eps, channels)
            z += r
        dz = times_slope(dz, z, activation)
    result = through_batch_norm(dz, slope, centred, weight, variance, d_weight, d_bias, c, eps, per_row, channels)
    if scale is not None and not se_last:
        a = channel(weight, c, channels) * reciprocal_deviation(variance, c, eps, channels)
        result += (of_mean * a)[None, :]
    if elsewhere is not None:
        result += tl.load(elsewhere + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)
    if r_out is not None:
        r_a = channel(r_weight, c, channels) * reciprocal_deviation(r_variance, c, eps, channels)
        d_r = through_batch_norm(dz, r_a, r_centred, r_weight, r_variance, r_d_weight, r_d_bias, c, eps, per_row, channels)
        tl.store(r_out + offsets, d_r.to(r_out.dtype.element_ty), mask=mask)


# Launches


@overload
def channels_last(x: Tensor) -> Tensor: ...
@overload
def channels_last(x: None) -> None: ...
@overload
def channels_last(x: Tensor | None) -> Tensor | None: ...
def channels_last(x: Tensor | None) -> Tensor | None:
    """x itself if its memory is rows [N * P, C], else a copy that is."""
    return x if x is None else x.contiguous(memory_format=torch.channels_last)


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """A boolean map as rows of 0 and 1."""
    return mask if mask is None else channels_last(mask).view(torch.uint8)


def map_grid(
    x: Tensor, per_image: bool, *, two_results: bool = False
) -> tuple[tuple[int, int], tuple[int, int], dict[str, int]]:
    """The grid of a pass over a map, its rows and an image's, and what `row_range` reads it by; with a scale, each image has
    its own tiles.
    """
    (n, channels), positions = x.shape[:2], x.shape[2] * x.shape[3]
    width = together(channels, x.element_size(), positions if per_image else n * positions)
    lanes, own, every = channels * width, positions // width, n * positions // width
    tile = sums_tile(lanes, own if per_image else every) if two_results else row_tile(lanes, own if per_image else every, 4096)
    chunks = cdiv(own, tile.rows) if per_image else 1
    blocks = n * chunks if per_image else cdiv(every, tile.rows)
    return (blocks, cdiv(lanes, tile.channels)), (every, own), {"lanes": lanes, "chunks": chunks, **tile.sizes()}


def statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, per_image: bool, addend: Tensor | None = None,
    sum_out: Tensor | None = None, factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fusable.statistics`; with an addend those of x + addend, or x + addend factor, which fills sum_out, channels_last."""
    n, channels, height, width = x.shape
    rows = n * height * width
    positions, own, group = height * width, factor is not None and len(factor) > 1, group_rows(channels, rows)
    group = positions if per_image or (own and positions % group) else group
    groups = cdiv(rows, group)
    group_mean, group_m2 = unfilled(x, groups, channels), unfilled(x, groups, channels)
    mean, variance = unfilled(x, channels), unfilled(x, channels)
    tile, merge, sizes = statistics_tile(channels, group), channel_block(groups), {"channels": channels, "group": group}
    with torch.cuda.device_of(x):
        statistics_kernel[groups, cdiv(channels, tile.channels)](
            channels_last(x),
            channels_last(addend),
            factor,
            sum_out,
            group_mean,
            group_m2,
            rows,
            **sizes,
            **tile.sizes(),
            even=rows % group == 0 and group % tile.rows == 0,
            positions=positions if own else 1,
            own=own,
        )
        batch_kernel[(cdiv(channels, merge.channels),)](
            group_mean, group_m2, mean, variance, running_mean, running_var, groups, rows, momentum,
            **sizes, **merge.sizes("groups"),
        )  # fmt: skip
    return group_mean if per_image else unfilled(x, 0), mean, variance


def apply(tensors: Tensors, settings: Settings, neighbours: Neighbours = ALONE) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`fusable.apply`, and dropout."""
    conv_out, shortcut, weight, bias, *linear, image_mean, mean, variance, scale, hidden = tensors
    n, channels = conv_out.shape[:2]
    x, r = channels_last(conv_out), channels_last(shortcut)
    if settings.se_last:
        out, _, hidden, scale = excitation.forward(x, *layers(tensors), settings.se_activation, _norm(tensors, settings))
        return out, scale, hidden
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        if tensors.w_reduce is not None:
            units = len(tensors.w_reduce)
            scale, hidden = unfilled(x, n, channels), unfilled(x, n, units)
            excite_kernel[(n,)](
                image_mean, mean, variance, weight, bias, *map(dense, linear), scale, hidden, settings.eps, channels=channels,
                units=units, activation=settings.se_activation, **image_tile(channels, units).sizes("units"),
            )  # fmt: skip
        grid, rows, sizes = map_grid(x, scale is not None)
        tail_kernel[grid](
            x, r, bytes_of(neighbours.kept), weight, bias, mean, variance, scale, *neighbours[2:NEAR], out,
            *rows, settings.eps, 1 / neighbours.keep,
            channels=channels, activation=settings.activation, **sizes,
        )  # fmt: skip
    return out, scale, hidden


def _norm(tensors: Tensors, settings: Settings) -> excitation.BatchNorm:
    """What stands in front of a squeeze-excitation that comes last."""
    vectors = (tensors.weight, tensors.bias, tensors.mean, tensors.variance)
    return excitation.BatchNorm(*vectors, settings.eps, settings.activation)


def dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def gradients(gradient: Tensor, tensors: Tensors, settings: Settings, neighbours: Neighbours = ALONE) -> Gradients:
    """`fusable.gradients`, with what the neighbours add; None for a shortcut whose gradient is `gradient`.

    Those of the shortcut's own BN's weight and bias come last, where it has one.
    """
    conv_out, shortcut, weight, bias, *_, mean, variance, scale, _ = tensors
    kept, keep, *r_norm, second, elsewhere = neighbours
    r_weight, r_bias, _, r_variance = r_norm
    x, r = channels_last(conv_out), channels_last(shortcut)
    (n, channels), positions = x.shape[:2], x.shape[2] * x.shape[3]
    group = positions if scale is not None else group_rows(channels, n * positions)
    groups = cdiv(n * positions, group)
    s1, s2 = unfilled(x, groups, channels), unfilled(x, groups, channels)
    d_shortcut = torch.empty_like(x) if has_own_gradient(tensors, settings, neighbours) else None
    dz, d_r, r_s2 = (d_shortcut, None, None) if r_weight is None else (None, d_shortcut, torch.empty_like(s2))
    source, activation = (channels_last(gradient), channels_last(second), bytes_of(kept)), settings.activation
    dm: Tensor | None = None
    d_linear: Gradients = (None,) * 4
    d_conv = torch.empty_like(x)
    d_norm, d_r_norm = ([unfilled(x, channels), unfilled(x, channels)] for _ in range(2))
    with torch.cuda.device_of(x):
        if settings.se_last:
            dm, d_linear = _last_gradients(*source[:2], x, tensors, settings, *d_norm)
        else:
            tile = folded(sums_tile(channels, group), channels, x.element_size(), group, n * positions)
            width = tile.together
            sums_kernel[groups, cdiv(channels * width, tile.channels)](
                *source, x, r, weight, bias, mean, variance, scale, *r_norm, dz, s1, s2, r_s2, n * positions // width,
                settings.eps, 1 / keep, channels=channels, lanes=channels * width, group=group // width, activation=activation,
                **tile.sizes(),
            )  # fmt: skip
            of_shortcut = (r_s2, r_variance, *d_r_norm) if r_s2 is not None else (None,) * 4
            if scale is None:
                _channel_gradients(s1, (s2, variance, *d_norm, *of_shortcut), settings)
            else:
                dm, d_linear = _excite_gradients(s1, s2, tensors, settings, *d_norm)
            if scale is not None and r_s2 is not None:
                _channel_gradients(s1, (*of_shortcut, *(None,) * 4), settings)
        if dz is not None:
            source, activation = (dz, None, None), "none"
        grid, rows, sizes = map_grid(x, scale is not None, two_results=d_r is not None)
        moved = [*d_norm, *d_r_norm] if settings.training else [None] * 4
        map_gradient_kernel[grid](
            *source, x, None if d_r is None else r, weight, bias, mean, variance, scale, *r_norm, dm, *moved,
            channels_last(elsewhere), d_conv, d_r,
            *rows, settings.eps, 1 / keep, 1 / positions, 1 / (n * positions),
            channels=channels, activation=activation, se_last=settings.se_last, **sizes,
        )  # fmt: skip
    found = [
        g.to(p.dtype) for g, p in zip((*d_norm, *d_r_norm), (weight, bias, r_weight, r_bias), strict=True) if p is not None
    ]
    return d_conv, d_shortcut, *found[:2], *d_linear, *found[2:]


def _channel_gradients(s1: Tensor, given: tuple[Tensor | None, ...], settings: Settings) -> None:
    """Fill one or two BNs' dgamma and dbeta with the sums over groups. given: S2, variance, dgamma and dbeta of each."""
    groups, channels = s1.shape
    tile = channel_block(groups)
    channel_gradient_kernel[(cdiv(channels, tile.channels),)](
        s1, *given, groups, settings.eps, channels=channels, **tile.sizes("groups")
    )


def _excite_gradients(
    s1: Tensor, s2: Tensor, tensors: Tensors, settings: Settings, d_weight: Tensor, d_bias: Tensor
) -> tuple[Tensor, Gradients]:
    """Fill d_weight and d_bias; return dm [N, C] and the gradients of w_reduce, w_expand, b_reduce and b_expand."""
    _, _, weight, bias, *linear, image_mean, _, variance, scale, hidden = tensors
    assert scale is not None
    assert hidden is not None
    (images, channels), units = scale.shape, hidden.shape[1]
    dt, dq, dm = torch.empty_like(scale), torch.empty_like(hidden), torch.empty_like(scale)
    excite_gradient_kernel[(images,)](
        s1, s2, scale, hidden, weight, bias, variance, *map(dense, linear[:2]), dt, dq, dm, settings.eps,
        channels=channels, units=units, activation=settings.se_activation, **image_tile(channels, units).sizes("units"),
    )  # fmt: skip
    return dm, _parameter_gradients(s1, s2, image_mean, dm, dt, dq, tensors, settings, d_weight, d_bias)


def _last_gradients(
    gradient: Tensor, second: Tensor | None, x: Tensor, tensors: Tensors, settings: Settings, d_weight: Tensor, d_bias: Tensor
) -> tuple[Tensor, Gradients]:
    """The same where squeeze-excitation comes last: from the result's gradient, through it and the activation."""
    assert tensors.scale is not None
    assert tensors.hidden is not None
    s1, s2, squeezed, dm, dt, dq = excitation.sums(
        gradient,
        x,
        tensors.hidden,
        tensors.scale,
        *layers(tensors)[:2],
        settings.se_activation,
        _norm(tensors, settings),
        second,
    )
    return dm, _parameter_gradients(s1, s2, squeezed, dm, dt, dq, tensors, settings, d_weight, d_bias)


def _parameter_gradients(
    s1: Tensor, s2: Tensor, image_mean: Tensor | None, dm: Tensor, dt: Tensor, dq: Tensor, tensors: Tensors, settings: Settings,
    d_weight: Tensor, d_bias: Tensor,
) -> Gradients:  # fmt: skip
    """Fill d_weight and d_bias; return the gradients of w_reduce, w_expand, b_reduce, b_expand. image_mean: m with se_last."""
    _, _, weight, bias, *linear, _, mean, variance, scale, hidden = tensors
    d_linear = tuple(None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in linear)
    (images, channels), units = dt.shape, dq.shape[1]
    side = min(max(power_of_two(units), 16), 32)  # tl.dot wants 16 at least
    parameter_gradient_kernel[cdiv(channels, IMAGES_TILE.channels), cdiv(units, side)](
        s1, s2, scale, hidden, image_mean, mean, variance, weight, bias, dt, dq, dm, d_weight, d_bias, *d_linear,
        images, settings.eps, channels=channels, units=units, activation=settings.se_activation, se_last=settings.se_last,
        block_units=side, **IMAGES_TILE.sizes("images"),
    )  # fmt: skip
    return d_linear
