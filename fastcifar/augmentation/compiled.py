"""A recipe's augmentation on a CPU by one Numba loop over the batch's images."""

from functools import cache
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from fastcifar.augmentation import Augmentation, ErasingValue
from fastcifar.augmentation.draws import Draws
from kernels.augment import numba as compiled
from kernels.augment.reference import level_table
from kernels.threads import run

ERASING_VALUES = get_args(ErasingValue)  # by their numbers in kernels.augment.numba
NOTHING: dict[str, compiled.Array] = {
    "floats": np.empty((0, 4), np.float32),
    "numbers": np.empty((0, 4), np.int64),
    "flags": np.empty(0, np.bool_),
    "operations": np.empty((0, 0), np.int64),
    "magnitudes": np.empty((0, 0), np.float32),
    "moves": np.empty((0, 0, 2, 3), np.float32),
    "rotations": np.empty((0, 2, 3), np.float32),
    "seeds": np.empty(0, np.int64),
    "quantiles": np.empty(0, np.float32),
}


def augment_compiled(
    settings: Augmentation, images: Tensor, positions: Tensor, drawn: Draws, mean: Tensor, std: Tensor, reuse: Tensor | None
) -> Tensor:
    """`augment` for CPU tensors, checked there: the same pixels, bit for bit, in float32."""
    count, (height, width) = len(positions), drawn.size
    out = torch.empty(count, height, width, 3) if reuse is None else reuse.permute(0, 2, 3, 1)
    jitters = drawn.jitter is not None
    table = _table(tuple(mean.tolist()), tuple(std.tolist()))
    run(
        compiled.recipe_batch, count, images.view(-1, height, width * 3).numpy(), positions.numpy(),
        drawn.down.numpy(), drawn.right.numpy(), drawn.flipped.numpy(), settings.crop_mode == "reflect",
        jitters and settings.jitter_before_crop, settings.recolours_the_crop, jitters and not settings.jitter_before_crop,
        settings.hue > 0, _array(drawn.jitter, "floats"), _array(drawn.jitter_order, "numbers"),
        _array(drawn.grey, "flags"), _array(drawn.operations, "operations"), _array(drawn.magnitudes, "magnitudes"),
        _array(drawn.moves, "moves"), _array(drawn.rotations, "rotations"), _array(drawn.erased, "numbers"),
        ERASING_VALUES.index(settings.erasing_value), _array(drawn.noise_seed, "seeds"), _array(drawn.quantiles, "quantiles"),
        _array(drawn.cutout, "numbers"), table.numpy(), out.view(count, height, width * 3).numpy(),
        _size_type(height, width),
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def _array(values: Tensor | None, absent: str) -> compiled.Array:
    return NOTHING[absent] if values is None else values.numpy()


_size_type = cache(compiled.size_type)


@cache
def _table(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return level_table(torch.tensor(mean), torch.tensor(std), torch.float32)
