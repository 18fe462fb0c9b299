"""The augmentation on a CPU: one image after the other from set to batch, each while it lies in the first-level cache.

`recipe_batch`, compiled once and kept on disk, applies what `fastcifar.augmentation.draw` drew, every operation of every
recipe. Arithmetic is float32 in the order of the PyTorch definitions, so that both give the same pixels to the bit. All of
it stands in one file because Numba's cache notices only changes in the file of the function that is called.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import numpy as np
from numba import njit

from kernels import philox as keyed
from kernels.augment.operations import BRIGHTNESS, CONTRAST, HUE, LUMA, MOVES, NUMBER, SATURATION, SIDE
from kernels.augment.operations import TOP as BRIGHTEST
from kernels.threads import KEPT

Array = np.ndarray[Any, Any]
ROW, AREA = 3 * SIDE, SIDE * SIDE  # bytes of a row, pixels of an image
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
def move(source, down, right, flipped, reflect, moved):
    """Crop and flip: source [32, 96] uint8 -> moved [32, 96]; outside is 0 or the image reflected about its edge pixels."""
    for y in range(SIDE):
        row = y + down
        if reflect:
            row = SIDE - 1 - abs(SIDE - 1 - abs(row))
        if row < 0 or row >= SIDE:
            moved[y] = 0
            continue
        for x in range(SIDE):
            column = (SIDE - 1 - x if flipped else x) + right
            if reflect:
                column = SIDE - 1 - abs(SIDE - 1 - abs(column))
            if column < 0 or column >= SIDE:
                moved[y, 3 * x] = moved[y, 3 * x + 1] = moved[y, 3 * x + 2] = 0
            else:
                moved[y, 3 * x] = source[row, 3 * column]
                moved[y, 3 * x + 1] = source[row, 3 * column + 1]
                moved[y, 3 * x + 2] = source[row, 3 * column + 2]


@njit(**KEPT)
def normalise(moved, table, out):
    """Look up table [3, 256], the normalised value of every level: moved [32, 96] uint8 -> out [32, 96]."""
    for y in range(SIDE):
        for x in range(SIDE):
            for channel in range(3):
                out[y, 3 * x + channel] = table[channel, moved[y, 3 * x + channel]]


@njit(**KEPT)
def clear(image, box):
    """Set a box (top, bottom, left, right), clipped, of [32, 96] to 0."""
    for y in range(max(box[0], 0), min(box[1], SIDE)):
        image[y, 3 * max(box[2], 0) : 3 * min(box[3], SIDE)] = 0


@njit(**KEPT)
def fill_with_noise(image, box, seed, quantiles):
    """Set a box, clipped, of [32, 96] to the noise of its places, kernels.augment.reference.noise."""
    for y in range(max(box[0], 0), min(box[1], SIDE)):
        for x in range(3 * max(box[2], 0), 3 * min(box[3], SIDE)):
            value = y * ROW + x
            words = philox(seed, u64(value >> 3), u64(0), NOISE, u64(0))
            image[y, x] = quantiles[np.int64((words[(value & 7) >> 1] >> u64(16 * (value & 1))) & u64(0xFFFF))]


# Operations on one image: planes [3, 1024] float32 of whole levels, changed in place. Definitions: fastcifar.augmentation


@njit(**KEPT)
def whole(level):
    """Cut off at 0 and 255, round down."""
    return np.floor(min(max(level, ZERO), TOP))


@njit(**KEPT)
def grey_plane(x, grey):
    red, green, blue = x[0], x[1], x[2]
    for i in range(AREA):
        weighed = RED * red[i] + GREEN * green[i] + BLUE * blue[i]
        grey[i] = np.floor((weighed + f32(0.5)) * f32(1e-4))


@njit(**ANY_ORDER)
def mean_level(plane):
    total = ZERO
    for i in range(AREA):
        total += plane[i]
    return total / f32(AREA)


@njit(**ANY_ORDER)
def extremes(plane):
    least, most = plane[0], plane[0]
    for i in range(AREA):
        least, most = min(least, plane[i]), max(most, plane[i])
    return least, most


@njit(**KEPT)
def brightness(x, factor):
    values = x.reshape(3 * AREA)
    for i in range(3 * AREA):
        values[i] = whole(values[i] * factor)


@njit(**KEPT)
def contrast(x, factor, grey):
    grey_plane(x, grey)
    mean = mean_level(grey)
    values = x.reshape(3 * AREA)
    for i in range(3 * AREA):
        values[i] = whole(mean + (values[i] - mean) * factor)


@njit(**KEPT)
def saturation(x, factor, grey):
    grey_plane(x, grey)
    for channel in range(3):
        plane = x[channel]
        for i in range(AREA):
            plane[i] = whole(grey[i] + (plane[i] - grey[i]) * factor)


@njit(**KEPT)
def hue(x, turn):
    reds, greens, blues = x[0], x[1], x[2]
    for i in range(AREA):
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
def sharpness(x, factor, before):
    """before: [3, 1024], overwritten."""
    before[:] = x
    for channel in range(3):
        new, old = x[channel], before[channel]
        for y in range(1, SIDE - 1):
            for i in range(y * SIDE + 1, y * SIDE + SIDE - 1):
                above = old[i - SIDE - 1] + old[i - SIDE] + old[i - SIDE + 1]
                beside = old[i - 1] + f32(5) * old[i] + old[i + 1]
                under = old[i + SIDE - 1] + old[i + SIDE] + old[i + SIDE + 1]
                blurred = np.rint((above + beside + under) / f32(13))
                new[i] = whole(blurred + (old[i] - blurred) * factor)


@njit(**KEPT)
def posterize(x, bits):
    step = f32(1 << (8 - int(bits)))
    values = x.reshape(3 * AREA)
    for i in range(3 * AREA):
        values[i] = np.floor(values[i] / step) * step


@njit(**KEPT)
def solarize(x, threshold):
    limit = TOP * threshold
    values = x.reshape(3 * AREA)
    for i in range(3 * AREA):
        values[i] = TOP - values[i] if values[i] >= limit else values[i]


@njit(**KEPT)
def auto_contrast(x):
    for channel in range(3):
        plane = x[channel]
        least, most = extremes(plane)
        if least < most:
            scale = (most - least) * f32(1 / 255)
            for i in range(AREA):
                plane[i] = whole((plane[i] - least) / scale)


@njit(**KEPT)
def equalize(x):
    histogram = np.empty(256, np.int64)
    for channel in range(3):
        plane = x[channel]
        histogram[:] = 0
        for i in range(AREA):
            histogram[np.int64(plane[i])] += 1
        _, most = extremes(plane)
        step = (AREA - histogram[np.int64(most)]) // 255
        if step == 0:
            continue
        darker = 0
        for level in range(256):
            here = histogram[level]
            histogram[level] = min((darker + step // 2) // step, 255)  # the table takes the histogram's place
            darker += here
        for i in range(AREA):
            plane[i] = f32(histogram[np.int64(plane[i])])


@njit(**KEPT)
def affine(x, matrix, before):
    """Nearest pixel at matrix [2, 3] of the place; before: [3, 1024], overwritten."""
    before[:] = x
    half = f32(SIDE / 2)
    for y in range(SIDE):
        place = (f32(y) - f32((SIDE - 1) / 2)) / half
        row_x, row_y = matrix[0, 1] * place + matrix[0, 2] / half, matrix[1, 1] * place + matrix[1, 2] / half
        for column in range(SIDE):
            along = (f32(column) - f32((SIDE - 1) / 2)) / half
            at_x = np.rint((matrix[0, 0] * along + row_x + ONE) * half - f32(0.5))
            at_y = np.rint((matrix[1, 0] * along + row_y + ONE) * half - f32(0.5))
            i = y * SIDE + column
            if at_x >= ZERO and at_x < f32(SIDE) and at_y >= ZERO and at_y < f32(SIDE):
                source = np.int64(at_y) * SIDE + np.int64(at_x)
                x[0, i], x[1, i], x[2, i] = before[0, source], before[1, source], before[2, source]
            else:
                x[0, i] = x[1, i] = x[2, i] = ZERO


@njit(**KEPT)
def jitter(x, factors, order, turns_hue, grey):
    for at in range(4):
        kind = order[at]
        if kind == BRIGHTNESS:
            brightness(x, factors[BRIGHTNESS])
        elif kind == CONTRAST:
            contrast(x, factors[CONTRAST], grey)
        elif kind == SATURATION:
            saturation(x, factors[SATURATION], grey)
        elif turns_hue:
            hue(x, factors[HUE])


@njit(**KEPT)
def apply_operation(x, operation, magnitude, matrix, spare):
    """One of OPERATIONS, by its number."""
    if FIRST_MOVE <= operation <= LAST_MOVE:
        affine(x, matrix, spare)
    elif operation == BRIGHTEN:
        brightness(x, ONE + magnitude)
    elif operation == COLOR:
        saturation(x, ONE + magnitude, spare[0])
    elif operation == CONTRASTS:
        contrast(x, ONE + magnitude, spare[0])
    elif operation == SHARPEN:
        sharpness(x, ONE + magnitude, spare)
    elif operation == POSTERIZE:
        posterize(x, magnitude)
    elif operation == SOLARIZE:
        solarize(x, magnitude)
    elif operation == AUTO_CONTRAST:
        auto_contrast(x)
    elif operation == EQUALIZE:
        equalize(x)
    elif operation == INVERT:
        solarize(x, ZERO)


@njit(**KEPT)
def to_planes(image, x):
    """image [32, 96] uint8 -> x [3, 1024] float32."""
    pixels = image.reshape(AREA, 3)
    for channel in range(3):
        for i in range(AREA):
            x[channel, i] = f32(pixels[i, channel])


@njit(**KEPT)
def to_pixels(x, image):
    """x [3, 1024] of whole levels -> image [32, 96] uint8."""
    pixels = image.reshape(AREA, 3)
    for channel in range(3):
        for i in range(AREA):
            pixels[i, channel] = np.uint8(x[channel, i])


@njit(**KEPT)
def recipe_batch(
    first, last, images, positions, down, right, flipped, reflect, jitters_first, recolours, jitters, turns_hue, factors,
    order, grey, operations, magnitudes, moves, rotations, erased, erases_by, noise_seeds, quantiles, cutout, table, out,
):  # fmt: skip
    """A whole recipe. Parameters are the whole set's, looked up by position; what the recipe leaves out has length 0.

    jitters_first, jitters: colour jitter before or after the crop. erases_by: 0 mean colour, 1 black, 2 noise.
    """
    moved, x, spare = np.empty((SIDE, ROW), np.uint8), np.empty((3, AREA), np.float32), np.empty((3, AREA), np.float32)
    whole_image = np.empty((SIDE, ROW), np.uint8)
    for b in range(first, last):
        position = positions[b]
        source = images[position]
        if jitters_first:
            to_planes(source, x)
            jitter(x, factors[position], order[position], turns_hue, spare[0])
            to_pixels(x, whole_image)
            source = whole_image
        move(source, down[position], right[position], flipped[position], reflect, moved)
        if recolours:
            to_planes(moved, x)
            if jitters:
                jitter(x, factors[position], order[position], turns_hue, spare[0])
            if len(grey) > 0 and grey[position]:
                saturation(x, ZERO, spare[0])
            for k in range(operations.shape[1]):
                apply_operation(x, operations[position, k], magnitudes[position, k], moves[position, k], spare)
            if len(rotations) > 0:
                affine(x, rotations[position], spare)
            to_pixels(x, moved)
        if len(erased) > 0 and erases_by == 1:
            clear(moved, erased[position])
        normalise(moved, table, out[b])
        if len(erased) > 0 and erases_by == 0:
            clear(out[b], erased[position])
        if len(erased) > 0 and erases_by == 2:
            fill_with_noise(out[b], erased[position], u64(noise_seeds[position]), quantiles)
        if len(cutout) > 0:
            clear(out[b], cutout[position])
