"""What a CPU does to whole feature maps, as loops that Numba compiles: several operations' worth of passes each.

A map is a flat array of its rows [N * P, C] (P = HW positions), float32 or, since Numba has no bfloat16, the bits of one. A
loop takes some positions at once, up to LANES numbers that lie in a row, beside as many copies of what belongs to the
channels: long enough for vectors at any width. Sums are kept per image, so they do not depend on the number of threads.

All of it stands in one file because Numba's cache notices only changes in the file of the function that is called.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from kernels.threads import KEPT

Array = np.ndarray[Any, Any]
f32, i32, u32, u16 = np.float32, np.int32, np.uint32, np.uint16
LANES = 1024
STEPS = 8  # turns of a loop over an image at least, where it has so many positions: else copying to lanes costs more
SAMPLE = 16  # positions, or a quarter of all, whose mean is near enough to that of all, even if one is an outlier
# A product may be added without being rounded first; nothing else is reordered.
FUSED: dict[str, Any] = {**KEPT, "fastmath": {"contract", "nsz"}}
NONE, RELU, MISH = range(3)
NUMBER = {"none": NONE, "relu": RELU, "mish": MISH}


def flat(x: Tensor) -> Array:
    """A dense x as it lies in memory, for the loops: not a copy."""
    rows = x.detach().as_strided((x.numel(),), (1,))
    return (rows.view(torch.uint16) if x.dtype == torch.bfloat16 else rows).numpy()


def channels_last(x: Tensor) -> Tensor:
    """x itself if it is so, else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def stacked(*vectors: Tensor) -> Array:
    """Vectors [C], [1, C] or [N, C] as the loops take them: [K, 1 or N, C]."""
    alike = torch.broadcast_tensors(*(v.detach() if v.dim() > 1 else v.detach()[None] for v in vectors))
    return torch.stack(alike).numpy()


# Numbers


def widen(stored):
    """A number of a map as float32."""


def narrow(value, stored):
    """float32 as `stored` is, rounded to the nearest, ties to even."""


@overload(widen, jit_options=FUSED)  # type: ignore[arg-type]
def _widen(stored):
    if stored == types.uint16:
        return lambda stored: u32(u32(stored) << 16).view(f32)
    return lambda stored: stored


@overload(narrow, jit_options=FUSED)  # type: ignore[arg-type]
def _narrow(value, stored):
    if stored != types.uint16:
        return lambda value, stored: value

    def to_bf16(value, stored):
        bits = f32(value).view(u32)
        rounded = u32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return u16(rounded) if value == value else u16(0x7FC0)  # NaN

    return to_bf16


# exp(r) = 1 + r + r^2 P(r) for |r| <= ln 2 / 2 (Cephes, expf); LOG2E, and ln 2 in two parts, the first exact in few bits
P0, P1, P2, P3, P4, P5 = (
    f32(p) for p in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
LOG2E, LN2_HIGH, LN2_LOW = f32(1.44269504088896341), f32(0.693359375), f32(-2.12194440e-4)
TO_WHOLE = f32(1.5 * 2**23)  # added, it rounds to whole numbers, which then stand in the lowest bits
LARGEST, SMALLEST = f32(20), f32(-87)


@njit(**FUSED)
def exp(x):
    """e^min(x, 20) within 2 units in the last place; 0 below -87."""
    limited = LARGEST if x > LARGEST else SMALLEST if x < SMALLEST else x
    shifted = limited * LOG2E + TO_WHOLE
    k = shifted - TO_WHOLE
    r = limited - k * LN2_HIGH - k * LN2_LOW
    p = ((((P0 * r + P1) * r + P2) * r + P3) * r + P4) * r + P5
    bits = i32(f32(p * (r * r) + r + f32(1)).view(i32) + (f32(shifted).view(i32) << 23))
    return bits.view(f32) if x > SMALLEST else f32(0)


@njit(**FUSED)
def mish_value(x):
    """x n / (n + 2) with n = e^x (e^x + 2), which is x tanh(ln(1 + e^x))."""
    e = exp(x)
    n = e * (e + f32(2))
    return x * (n / (n + f32(2)))


@njit(**FUSED)
def mish_slope(x):
    """The formula of kernels.activations.slope."""
    e = exp(x)
    n = e * (e + f32(2))
    w = f32(1) / (n + f32(2))
    return f32(1) if x > LARGEST else n * w + x * (f32(4) * e * (e + f32(1)) * w * w)


@njit(**FUSED)
def activate(z, activation):
    """act(z); NaN stays NaN."""
    if activation == RELU:
        return f32(0) if z < f32(0) else z
    return mish_value(z) if activation == MISH else z


@njit(**FUSED)
def times_slope(gradient, z, activation):
    """gradient * act'(z)."""
    if activation == RELU:
        return gradient if z > f32(0) else f32(0)
    return gradient * mish_slope(z) if activation == MISH else gradient


# Mish of numbers first..last-1


@njit(**FUSED)
def mish_values(first, last, x, out):
    x, out = x[first:last], out[first:last]
    for i in range(len(x)):
        out[i] = narrow(mish_value(widen(x[i])), out[i])


@njit(**FUSED)
def mish_gradients(first, last, gradient, x, out):
    gradient, x, out = gradient[first:last], x[first:last], out[first:last]
    for i in range(len(x)):
        out[i] = narrow(widen(gradient[i]) * mish_slope(widen(x[i])), out[i])


# From channels to lanes and back


@njit(**FUSED)
def at_once(positions, channels):
    """Positions that a turn of a loop takes."""
    return max(min(LANES // channels, positions // STEPS), 1)


@njit(**FUSED)
def repeat(values, copies, lanes):
    width = len(values)
    for copy in range(copies):
        row = lanes[copy * width : (copy + 1) * width]
        for c in range(width):
            row[c] = values[c]


@njit(**FUSED)
def add_copies(lanes, copies, sums):
    """By halves, always in the same order; overwrites the lanes."""
    width = len(sums)
    while copies > 1:
        kept = (copies + 1) // 2
        into, added = lanes[: (copies - kept) * width], lanes[kept * width : copies * width]
        for i in range(len(into)):
            into[i] += added[i]
        copies = kept
    for c in range(width):
        sums[c] = lanes[c]


# Passes over images first..last-1 of maps [N * P * C]. vectors [3 or 5, 1 or N, C]: mean, slope, intercept, constant and
# decline, the same for all images or for each its own.


@njit(**FUSED)
def add_powers(x, lanes):
    centre, differences, squares = lanes[0], lanes[1], lanes[2]
    for i in range(len(x)):
        difference = widen(x[i]) - centre[i]
        differences[i] += difference
        squares[i] += difference * difference


@njit(**FUSED)
def image_statistics(first, last, x, means, m2s, positions):
    """Mean of each image and channel [N, C], and the sum of squared differences from it.

    Summed are differences from the mean of the image's first positions, so that a mean far from 0 costs no bits.
    """
    channels = means.shape[1]
    copies, lanes = at_once(positions, channels), np.empty((3, LANES), f32)
    for image in range(first, last):
        for c0 in range(0, channels, LANES):
            c1 = min(c0 + LANES, channels)
            mean, m2, left = means[image, c0:c1], m2s[image, c0:c1], np.empty(c1 - c0, f32)
            for c in range(c1 - c0):
                mean[c] = widen(x[image * positions * channels + c0 + c])
            for seen in (min(max(positions // 4, 1), SAMPLE), positions):
                repeat(mean, copies, lanes[0])
                lanes[1:] = 0
                for p in range(0, seen, copies):
                    row = (image * positions + p) * channels + c0
                    add_powers(x[row : row + (c1 - c0) * min(copies, seen - p)], lanes)
                add_copies(lanes[1], copies, left)
                add_copies(lanes[2], copies, m2)
                for c in range(c1 - c0):
                    mean[c] += left[c] / f32(seen)
            for c in range(c1 - c0):
                m2[c] -= left[c] * left[c] / f32(positions)


@njit(**FUSED)
def merge(means, m2s, positions, mean, variance):
    """Mean and biased variance [C] of all images from `image_statistics`, in float64 (Chan, Golub & LeVeque 1979)."""
    images, channels = means.shape
    total, squares = np.zeros(channels), np.zeros(channels)
    for image in range(images):
        for c in range(channels):
            total[c] += means[image, c]
    for c in range(channels):
        total[c] /= images
    for image in range(images):
        for c in range(channels):
            difference = means[image, c] - total[c]
            squares[c] += difference * difference + np.float64(m2s[image, c]) / positions
    for c in range(channels):
        mean[c], variance[c] = total[c], squares[c] / images


# The loops over numbers are compiled for each activation, whose number is a constant within.


@njit(**FUSED)
def result_numbers(x, r, vectors, activation, out):
    mean, slope, intercept = vectors[0], vectors[1], vectors[2]
    for i in range(len(x)):
        z = (widen(x[i]) - mean[i]) * slope[i] + intercept[i]
        if r is not None:
            z += widen(r[i])
        out[i] = narrow(activate(z, activation), out[i])


@njit(**FUSED)
def result_row(x, r, vectors, activation, out):
    if activation == RELU:
        result_numbers(x, r, vectors, RELU, out)
    elif activation == MISH:
        result_numbers(x, r, vectors, MISH, out)
    else:
        result_numbers(x, r, vectors, NONE, out)


@njit(**FUSED)
def result(first, last, x, r, vectors, activation, out, positions):
    """out = act(z) with z = (x - mean) slope + intercept + r; r may be None."""
    _, own, channels = vectors.shape
    copies, lanes = at_once(positions, channels), np.empty((3, LANES), f32)
    for image in range(first, last):
        for c0 in range(0, channels, LANES):
            c1 = min(c0 + LANES, channels)
            for k in range(3):
                repeat(vectors[k, image % own, c0:c1], copies, lanes[k])
            for p in range(0, positions, copies):
                row = (image * positions + p) * channels + c0
                end = row + (c1 - c0) * min(copies, positions - p)
                result_row(x[row:end], None if r is None else r[row:end], lanes, activation, out[row:end])


@njit(**FUSED)
def sums_numbers(g, x, r, vectors, activation, dz, s1, s2):
    mean, slope, intercept = vectors[0], vectors[1], vectors[2]
    for i in range(len(x)):
        centred = widen(x[i]) - mean[i]
        z = centred * slope[i] + intercept[i]
        if r is not None:
            z += widen(r[i])
        d = times_slope(widen(g[i]), z, activation)
        s1[i] += d
        s2[i] += d * centred
        if dz is not None:
            dz[i] = narrow(d, dz[i])


@njit(**FUSED)
def sums_row(g, x, r, vectors, activation, dz, s1, s2):
    if activation == RELU:
        sums_numbers(g, x, r, vectors, RELU, dz, s1, s2)
    elif activation == MISH:
        sums_numbers(g, x, r, vectors, MISH, dz, s1, s2)
    else:
        sums_numbers(g, x, r, vectors, NONE, dz, s1, s2)


@njit(**FUSED)
def sums(first, last, g, x, r, vectors, activation, dz, s1, s2, positions):
    """dz = g act'(z), stored unless None; s1 = sum dz and s2 = sum dz (x - mean) of each image and channel [N, C]."""
    _, own, channels = vectors.shape
    copies, lanes = at_once(positions, channels), np.empty((5, LANES), f32)
    for image in range(first, last):
        for c0 in range(0, channels, LANES):
            c1 = min(c0 + LANES, channels)
            for k in range(3):
                repeat(vectors[k, image % own, c0:c1], copies, lanes[k])
            lanes[3:] = 0
            for p in range(0, positions, copies):
                row = (image * positions + p) * channels + c0
                end = row + (c1 - c0) * min(copies, positions - p)
                added, kept = None if r is None else r[row:end], None if dz is None else dz[row:end]
                sums_row(g[row:end], x[row:end], added, lanes, activation, kept, lanes[3], lanes[4])
            add_copies(lanes[3], copies, s1[image, c0:c1])
            add_copies(lanes[4], copies, s2[image, c0:c1])


@njit(**FUSED)
def gradient_row(g, x, vectors, rectified, out):
    mean, slope, intercept, constant, decline = vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]
    for i in range(len(x)):
        centred = widen(x[i]) - mean[i]
        z = centred * slope[i] + intercept[i]
        d = f32(0) if rectified and not z > f32(0) else widen(g[i])
        out[i] = narrow(d * slope[i] + (constant[i] - centred * decline[i]), out[i])


@njit(**FUSED)
def map_gradient(first, last, g, x, vectors, rectified, out, positions):
    """out = dz slope + constant - (x - mean) decline, where dz is g, or `rectified` with ReLU's slope at z without r.

    out is not g: were it, the compiler could not take vectors.
    """
    _, own, channels = vectors.shape
    copies, lanes = at_once(positions, channels), np.empty((5, LANES), f32)
    for image in range(first, last):
        for c0 in range(0, channels, LANES):
            c1 = min(c0 + LANES, channels)
            for k in range(5):
                repeat(vectors[k, image % own, c0:c1], copies, lanes[k])
            for p in range(0, positions, copies):
                row = (image * positions + p) * channels + c0
                end = row + (c1 - c0) * min(copies, positions - p)
                gradient_row(g[row:end], x[row:end], lanes, rectified, out[row:end])
