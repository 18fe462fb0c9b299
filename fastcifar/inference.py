"""A model and uint8 images enter, class probabilities leave, averaged over the views of test-time augmentation."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.beton import SIDE
from fastcifar.dataset import ResidentSet
from fastcifar.metrics import Evaluation, EvaluationTally
from fastcifar.step import autocast
from kernels.augment.reference import normalise

TTA = Literal["none", "flip", "flip_translate"]
SHIFT = 1  # pixels; the two translated views look up-left and down-right of the image


def views(x: Tensor, tta: TTA) -> list[Tensor]:
    """The views of normalised images [B, 3, 32, 32] whose softmax outputs are averaged.

    none: the image. flip: and its mirror image (report C). flip_translate: both of these, in place and moved one pixel
    along the diagonal either way with mirrored edges, six views (Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024).
    """
    shown = [x]
    if tta == "flip_translate":
        padded = F.pad(x, (SHIFT,) * 4, "reflect")
        shown += [padded[:, :, start : start + SIDE, start : start + SIDE] for start in (0, 2 * SHIFT)]
    if tta != "none":
        shown += [view.flip(3) for view in shown]
    return shown


@torch.inference_mode()
def class_probabilities(
    model: nn.Module,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    batch_size: int,
    tta: TTA,
    autocast_dtype: torch.dtype | None,
) -> Iterator[Tensor]:
    """Yield float32 probabilities [B, C] for uint8 images [N, 32, 32, 3], batch by batch, in eval mode."""
    was_training = model.training
    model.eval()
    try:
        for batch in images.split(batch_size):
            shown = views(normalise(batch, mean, std), tta)
            with autocast(images.device, autocast_dtype):
                outputs = [model(view.contiguous(memory_format=torch.channels_last)) for view in shown]
            yield torch.stack([output.float().softmax(1) for output in outputs]).mean(0)
    finally:
        model.train(was_training)


def evaluate(
    model: nn.Module,
    data: ResidentSet,
    classes: int,
    mean: Tensor,
    std: Tensor,
    *,
    batch_size: int = 500,
    tta: TTA = "none",
    autocast_dtype: torch.dtype | None = None,
) -> Evaluation:
    """Measure `model` on a labelled set; waits for the device once, at the end."""
    tally = EvaluationTally(classes, data.images.device)
    batches = class_probabilities(model, data.images, mean, std, batch_size=batch_size, tta=tta, autocast_dtype=autocast_dtype)
    for probabilities, labels in zip(batches, data.labels.split(batch_size), strict=True):
        tally.add(probabilities, labels)
    return tally.read()
