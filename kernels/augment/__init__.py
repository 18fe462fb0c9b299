"""A batch from the resident uint8 set: gathered, cropped, flipped, cut out, normalised, labelled.

    x[b, c, i, j] = 0 where (i, j) lies in cutout's box, else (p[i + down, j' + right, c] - 255 mean_c) / (255 std_c)

p is image permutation[cursor + b], black or reflected outside; j' = W - 1 - j where it is flipped, else j. Crop, flip and box
come from Philox at (sample index, epoch, purpose).

`fastcifar.augmentation.augment` is the public function, with the checks: it draws and applies every recipe. Behind it are this
operator, one launch on CUDA (`triton.py`), and one loop over the batch's images on a CPU (`numba.py`). `reference.py` has the
definitions: all show the same pixels, bit for bit.
"""

from typing import get_args

import torch
from torch import Tensor

from kernels.augment.reference import Flip, augment_torch
from kernels.operators import register_fake

FLIPS: tuple[Flip, ...] = get_args(Flip)


def augment_fused(
    images: Tensor, labels: Tensor, index: Tensor, permutation: Tensor, cursor: Tensor, epoch: Tensor, seed: Tensor,
    mean: Tensor, std: Tensor, *, batch_size: int, padding: int, reflect: bool, flip: Flip, cutout: int, dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the batch [B, 3, H, W] of `dtype`, channels_last, and its labels [B], by the Triton kernel. Nothing is checked.

    images: [N, H, W, 3] uint8. labels, index: [N] int64. permutation: [M] int64 positions, of which cursor .. cursor + B - 1
    are taken. cursor, epoch, seed: 0-d int64, which a captured step can advance. padding: below H and W, pixels.
    cutout: side in pixels, 0 = off. out: a batch to overwrite.
    """
    if out is None:
        out = torch.empty(batch_size, *images.shape[1:], dtype=dtype, device=images.device).permute(0, 3, 1, 2)
    out_labels = torch.empty(batch_size, dtype=torch.int64, device=images.device)
    sizes = padding, reflect, FLIPS.index(flip), cutout
    _augment(images, labels, index, permutation, cursor, epoch, seed, mean, std, out, out_labels, *sizes, "triton")
    return out, out_labels


@torch.library.custom_op("fastcifar::augment", mutates_args=("out", "out_labels"))
def _augment(
    images: Tensor, labels: Tensor, index: Tensor, permutation: Tensor, cursor: Tensor, epoch: Tensor, seed: Tensor,
    mean: Tensor, std: Tensor, out: Tensor, out_labels: Tensor, padding: int, reflect: bool, flip: int, cutout: int,
    backend: str,
) -> None:  # fmt: skip
    """Write the batch into out [B, 3, H, W] channels_last and out_labels [B]. backend: triton or torch."""
    if backend == "triton":
        from kernels.augment.triton import launch

        tensors = (images, labels, index, permutation, cursor, epoch, seed, mean, std, out.permute(0, 2, 3, 1), out_labels)
        launch(*tensors, padding=padding, reflect=reflect, flip=flip, cutout=cutout)
    else:
        positions = permutation[cursor + torch.arange(len(out_labels), device=images.device)]
        x, own_labels = augment_torch(
            images, labels, index, positions, epoch, seed, padding=padding, reflect=reflect, flip=FLIPS[flip],
            cutout=cutout, mean=mean, std=std, dtype=out.dtype,
        )  # fmt: skip
        out.copy_(x)
        out_labels.copy_(own_labels)


register_fake(_augment)(lambda *_: None)
