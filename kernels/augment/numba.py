"""The augmentation on a CPU: one image after the other from set to batch, each while it lies in the first-level cache.

`recipe_batch`, compiled once and kept on disk, applies what `fastcifar.augmentation.draw` drew, every operation of every
recipe. Arithmetic is float32 in the order of the PyTorch definitions, so that both give the same pixels to the bit. All of
it stands in one file because Numba's cache notices only changes in the file of the function that is called.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload

from kernels import philox as keyed
from kernels.augment.operations import BRIGHTNESS, CONTRAST, HUE, LUMA, MOVES, NUMBER, SATURATION
from kernels.augment.operations import TOP as BRIGHTEST
from kernels.threads import KEPT

Array = np.ndarray[Any, Any]
f32, u64 = np.float32, np.uint64
ZERO, ONE, TOP = f32(0), f32(1), f32(BRIGHTEST)
MASK, HALF_WORD = u64(keyed.MASK), u64(32)
M0, M1, W0, W1 = u64(keyed.M0), u64(keyed.M1), u64(keyed.W0), u64(keyed.W1)
NOISE = u64(keyed.Purpose.NOISE)
RED, GREEN, BLUE = (f32(weight) for weight in LUMA)
FIRST_MOVE, LAST_MOVE = MOVES[0], MOVES[-1]
BRIGHTEN, COLOR, CONTRASTS, SHARPEN, POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE, INVERT = range(LAST_MOVE + 1, len(NUMBER))
THIRD, HUE_BACK = f32(1 / 3), f32((255 + 1 - 1e-3) / 255)
# Sums and extremes of whole numbers are exact in any order; saying so lets the compiler use vectors.
ANY_ORDER: dict[str, Any] = {**KEPT, "fastmath": {"reassoc", "nnan", "nsz"}}


# An image's size, which the loops are compiled for: with sizes that are known then they take up to 15 % less time


def size_type(rows: int, columns: int) -> Array:
    """What the loops take as `size`: an empty array whose type says it, since Numba compiles once for each type."""
    return np.empty(0, [("rows", f"S{rows}"), ("columns", f"S{columns}")])


def height(size):
    """The rows of an image of `size`, a constant of the compiled code."""


def width(size):
    """Its columns."""


@overload(height)
def _height(size):
    rows = size.dtype.typeof("rows").count
    return lambda size: rows


@overload(width)
def _width(size):
    columns = size.dtype.typeof("columns").count
    return lambda size: columns


# Gathering, moving, normalising


@njit(inline="always", **KEPT)  # in line, a loop of counters becomes vectors
def philox(seed, sample, epoch, purpose, block):
    """kernels.philox.philox for one counter."""
    k0, k1 = seed & MASK, seed >> HALF_WORD
    c0, c1, c2, c3 = sample, epoch, purpose, block
    for _ in range(10):
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (p1 >> HALF_WORD) ^ c1 ^ k0, p1 & MASK, (p0 >> HALF_WORD) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c0, c1, c2, c3


@njit(**KEPT)
def move(source, down, right, flipped, reflect, moved, size):
    """Crop and flip: source [H, 3 W] uint8 -> moved, alike; outside is 0 or the image reflected about its edge pixels."""
    rows, columns = height(size), width(size)
    for y in range(rows):
        row = y + down
        if reflect:
            row = rows - 1 - abs(rows - 1 - abs(row))
        if row < 0 or row >= rows:
            moved[y] = 0
            continue
        for x in range(columns):
            column = (columns - 1 - x if flipped else x) + right
            if reflect:
                column = columns - 1 - abs(columns - 1 - abs(column))
            if column < 0 or column >= columns:
                moved[y, 3 * x] = moved[y, 3 * x + 1] = moved[y, 3 * x + 2] = 0
            else:
                moved[y, 3 * x] = source[row, 3 * column]
                moved[y, 3 * x + 1] = source[row, 3 * column + 1]
                moved[y, 3 * x + 2] = source[row, 3 * column + 2]


@njit(**KEPT)
def normalise(moved, table, out, size):
    """Look up table [3, 256], the normalised value of every level: moved [H, 3 W] uint8 -> out [H, 3 W]."""
    for y in range(height(size)):
        for x in range(width(size)):
            for channel in range(3):
                out[y, 3 * x + channel] = table[channel, moved[y, 3 * x + channel]]


@njit(**KEPT)
def clear(image, box, size):
    """Set a box (top, bottom, left, right), clipped, of [H, 3 W] to 0."""
    for y in range(max(box[0], 0), min(box[1], height(size))):
        image[y, 3 * max(box[2], 0) : 3 * min(box[3], width(size))] = 0


@njit(**KEPT)
def fill_with_noise(image, box, seed, quantiles, size):
    """Set a box, clipped, of [H, 3 W] to the noise of its places, kernels.augment.reference.noise."""
    for y in range(max(box[0], 0), min(box[1], height(size))):
        for x in range(3 * max(box[2], 0), 3 * min(box[3], width(size))):
            value = 3 * width(size) * y + x
            words = philox(seed, u64(value >> 3), u64(0), NOISE, u64(0))
            image[y, x] = quantiles[np.int64((words[(value & 7) >> 1] >> u64(16 * (value & 1))) & u64(0xFFFF))]


# Operations on one image: planes [3, H W] float32 of whole levels, changed in place. Definitions: fastcifar.augmentation


@njit(**KEPT)
def whole(level):
    """Cut off at 0 and 255, round down."""
    return np.floor(min(max(level, ZERO), TOP))


@njit(**KEPT)
def grey_plane(x, grey, size):
    red, green, blue = x[0], x[1], x[2]
    for i in range(height(size) * width(size)):
        weighed = RED * red[i] + GREEN * green[i] + BLUE * blue[i]
        grey[i] = np.floor((weighed + f32(0.5)) * f32(1e-4))


@njit(**ANY_ORDER)
def mean_level(plane, size):
    total = ZERO
    for i in range(height(size) * width(size)):
        total += plane[i]  # of whole numbers: exact below 2^24, so up to 256 x 256 pixels
    return total * f32(1 / (height(size) * width(size)))


@njit(**ANY_ORDER)
def extremes(plane, size):
    least, most = plane[0], plane[0]
    for i in range(height(size) * width(size)):
        least, most = min(least, plane[i]), max(most, plane[i])
    return least, most


@njit(**KEPT)
def brightness(x, factor, size):
    values = x.reshape(x.size)
    for i in range(3 * height(size) * width(size)):
        values[i] = whole(values[i] * factor)


@njit(**KEPT)
def contrast(x, factor, grey, size):
    grey_plane(x, grey, size)
    mean = mean_level(grey, size)
    values = x.reshape(x.size)
    for i in range(3 * height(size) * width(size)):
        values[i] = whole(mean + (values[i] - mean) * factor)


@njit(**KEPT)
def saturation(x, factor, grey, size):
    grey_plane(x, grey, size)
    for channel in range(3):
        plane = x[channel]
        for i in range(height(size) * width(size)):
            plane[i] = whole(grey[i] + (plane[i] - grey[i]) * factor)


@njit(**KEPT)
def hue(x, turn, size):
    reds, greens, blues = x[0], x[1], x[2]
    for i in range(height(size) * width(size)):
        red, green, blue = reds[i], greens[i], blues[i]
        swapped = ONE if green < blue else ZERO
        high, low = max(green, blue), min(green, blue)
        behind = ONE if red < high else ZERO
        most, middle = max(red, high), min(red, high)
        least = min(middle, low)
        chroma = most - least
        offset = (f32(2) * swapped - THIRD) * behind - swapped
        turns = abs((middle - low) / max(f32(6) * chroma, ONE) + offset) + turn
        sixths = (turns - np.floor(turns)) * f32(6)
        c, m = chroma * HUE_BACK, least * HUE_BACK
        reds[i] = np.floor(min(max(abs(sixths - f32(3)) - ONE, ZERO), ONE) * c + m)
        greens[i] = np.floor(min(max(f32(2) - abs(sixths - f32(2)), ZERO), ONE) * c + m)
        blues[i] = np.floor(min(max(f32(2) - abs(sixths - f32(4)), ZERO), ONE) * c + m)


@njit(**KEPT)
def sharpness(x, factor, before, size):
    """before: [3, H W], overwritten."""
    columns = width(size)
    before[:] = x
    for channel in range(3):
        new, old = x[channel], before[channel]
        for y in range(1, height(size) - 1):
            for i in range(y * columns + 1, y * columns + columns - 1):
                above = old[i - columns - 1] + old[i - columns] + old[i - columns + 1]
                beside = old[i - 1] + f32(5) * old[i] + old[i + 1]
                under = old[i + columns - 1] + old[i + columns] + old[i + columns + 1]
                blurred = np.rint((above + beside + under) / f32(13))
                new[i] = whole(blurred + (old[i] - blurred) * factor)


@njit(**KEPT)
def posterize(x, bits, size):
    step = f32(1 << (8 - int(bits)))
    values = x.reshape(x.size)
    for i in range(3 * height(size) * width(size)):
        values[i] = np.floor(values[i] / step) * step


@njit(**KEPT)
def solarize(x, threshold, size):
    limit = TOP * threshold
    values = x.reshape(x.size)
    for i in range(3 * height(size) * width(size)):
        values[i] = TOP - values[i] if values[i] >= limit else values[i]


@njit(**KEPT)
def auto_contrast(x, size):
    for channel in range(3):
        plane = x[channel]
        least, most = extremes(plane, size)
        if least < most:
            scale = (most - least) * f32(1 / 255)
            for i in range(height(size) * width(size)):
                plane[i] = whole((plane[i] - least) / scale)


@njit(**KEPT)
def equalize(x, size):
    histogram = np.empty(256, np.int64)
    for channel in range(3):
        plane = x[channel]
        histogram[:] = 0
        for i in range(height(size) * width(size)):
            histogram[np.int64(plane[i])] += 1
        _, most = extremes(plane, size)
        step = (height(size) * width(size) - histogram[np.int64(most)]) // 255
        if step == 0:
            continue
        darker = 0
        for level in range(256):
            here = histogram[level]
            histogram[level] = min((darker + step // 2) // step, 255)  # the table takes the histogram's place
            darker += here
        for i in range(height(size) * width(size)):
            plane[i] = f32(histogram[np.int64(plane[i])])


@njit(**KEPT)
def affine(x, matrix, before, size):
    """Nearest pixel at matrix [2, 3] of the place; before: [3, H W], overwritten."""
    before[:] = x
    rows, columns = height(size), width(size)
    half_x, half_y = f32(columns / 2), f32(rows / 2)
    xx, xy, xt = matrix[0, 0] / half_x, matrix[0, 1] / half_x, matrix[0, 2] / half_x
    yx, yy, yt = matrix[1, 0] / half_y, matrix[1, 1] / half_y, matrix[1, 2] / half_y
    for y in range(rows):
        place = f32(y) - f32((rows - 1) / 2)
        row_x, row_y = xy * place + xt, yy * place + yt
        for column in range(columns):
            along = f32(column) - f32((columns - 1) / 2)
            at_x = np.rint((xx * along + row_x + ONE) * half_x - f32(0.5))
            at_y = np.rint((yx * along + row_y + ONE) * half_y - f32(0.5))
            i = y * columns + column
            if at_x >= ZERO and at_x < f32(columns) and at_y >= ZERO and at_y < f32(rows):
                source = np.int64(at_y) * columns + np.int64(at_x)
                x[0, i], x[1, i], x[2, i] = before[0, source], before[1, source], before[2, source]
            else:
                x[0, i] = x[1, i] = x[2, i] = ZERO


@njit(**KEPT)
def jitter(x, factors, order, turns_hue, grey, size):
    for at in range(4):
        kind = order[at]
        if kind == BRIGHTNESS:
            brightness(x, factors[BRIGHTNESS], size)
        elif kind == CONTRAST:
            contrast(x, factors[CONTRAST], grey, size)
        elif kind == SATURATION:
            saturation(x, factors[SATURATION], grey, size)
        elif turns_hue:
            hue(x, factors[HUE], size)


@njit(**KEPT)
def apply_operation(x, operation, magnitude, matrix, spare, size):
    """One of OPERATIONS, by its number."""
    if FIRST_MOVE <= operation <= LAST_MOVE:
        affine(x, matrix, spare, size)
    elif operation == BRIGHTEN:
        brightness(x, ONE + magnitude, size)
    elif operation == COLOR:
        saturation(x, ONE + magnitude, spare[0], size)
    elif operation == CONTRASTS:
        contrast(x, ONE + magnitude, spare[0], size)
    elif operation == SHARPEN:
        sharpness(x, ONE + magnitude, spare, size)
    elif operation == POSTERIZE:
        posterize(x, magnitude, size)
    elif operation == SOLARIZE:
        solarize(x, magnitude, size)
    elif operation == AUTO_CONTRAST:
        auto_contrast(x, size)
    elif operation == EQUALIZE:
        equalize(x, size)
    elif operation == INVERT:
        solarize(x, ZERO, size)


@njit(**KEPT)
def to_planes(image, x, size):
    """image [H, 3 W] uint8 -> x [3, H W] float32."""
    pixels = image.reshape(x.shape[1], 3)
    for channel in range(3):
        for i in range(height(size) * width(size)):
            x[channel, i] = f32(pixels[i, channel])


@njit(**KEPT)
def to_pixels(x, image, size):
    """x [3, H W] of whole levels -> image [H, 3 W] uint8."""
    pixels = image.reshape(x.shape[1], 3)
    for channel in range(3):
        for i in range(height(size) * width(size)):
            pixels[i, channel] = np.uint8(x[channel, i])


@njit(**KEPT)
def recipe_batch(
    first, last, images, positions, down, right, flipped, reflect, jitters_first, recolours, jitters, turns_hue, factors,
    order, grey, operations, magnitudes, moves, rotations, erased, erases_by, noise_seeds, quantiles, cutout, table, out,
    size,
):  # fmt: skip
    """A whole recipe. Parameters are the whole set's, looked up by position; what the recipe leaves out has length 0.

    jitters_first, jitters: colour jitter before or after the crop. erases_by: 0 mean colour, 1 black, 2 noise. size: of
    `size_type`.
    """
    rows, columns = height(size), width(size)
    moved, whole_image = np.empty((rows, 3 * columns), np.uint8), np.empty((rows, 3 * columns), np.uint8)
    x, spare = np.empty((3, rows * columns), np.float32), np.empty((3, rows * columns), np.float32)
    for b in range(first, last):
        position = positions[b]
        source = images[position]
        if jitters_first:
            to_planes(source, x, size)
            jitter(x, factors[position], order[position], turns_hue, spare[0], size)
            to_pixels(x, whole_image, size)
            source = whole_image
        move(source, down[position], right[position], flipped[position], reflect, moved, size)
        if recolours:
            to_planes(moved, x, size)
            if jitters:
                jitter(x, factors[position], order[position], turns_hue, spare[0], size)
            if len(grey) > 0 and grey[position]:
                saturation(x, ZERO, spare[0], size)
            for k in range(operations.shape[1]):
                apply_operation(x, operations[position, k], magnitudes[position, k], moves[position, k], spare, size)
            if len(rotations) > 0:
                affine(x, rotations[position], spare, size)
            to_pixels(x, moved, size)
        if len(erased) > 0 and erases_by == 1:
            clear(moved, erased[position], size)
        normalise(moved, table, out[b], size)
        if len(erased) > 0 and erases_by == 0:
            clear(out[b], erased[position], size)
        if len(erased) > 0 and erases_by == 2:
            fill_with_noise(out[b], erased[position], u64(noise_seeds[position]), quantiles, size)
        if len(cutout) > 0:
            clear(out[b], cutout[position], size)
