"""How well a network fits each training image as it is, for data maps, forgetting events and the area under the margin.

RUN/margins/epoch-NNNN.npy has a row for each training image of the run, 16 bytes: 0.8 MB an epoch for CIFAR. The cost is a
forward pass over the training set.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcifar.dataset import AnySet
from fastcifar.evaluate import evaluating
from fastcifar.files import atomic_path
from fastcifar.models.resnet import PixelClassifier
from fastcifar.step import autocast

ROW = np.dtype([("sample", "<i8"), ("loss", "<f4"), ("margin", "<f4")])  # number in the source; the label is the trained one


def record(path: Path, model: PixelClassifier, data: AnySet, batch_size: int, dtype: torch.dtype | None) -> None:
    """Write `measure` as .npy, atomically. Raises OSError."""
    with atomic_path(path) as partial, partial.open("wb") as file:
        np.save(file, measure(model, data, batch_size, dtype))


def measure(model: PixelClassifier, data: AnySet, batch_size: int, dtype: torch.dtype | None) -> np.ndarray:
    """ROWs [N] of a set, in its order, in eval mode and without augmentation.

    loss: cross-entropy of the label, without smoothing. margin: its logit less the largest other one, negative where another
    class is predicted (Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", NeurIPS 2020).
    """
    parts: list[Tensor] = []
    with evaluating(model):
        for positions in torch.arange(len(data), device=data.index.device).split(batch_size):
            batch = data.fetch(positions)
            with autocast(positions.device, dtype):
                logits = model(batch.images).float()
            own = batch.labels[:, None]
            others = logits.scatter(1, own, -torch.inf).amax(1)
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            parts.append(torch.stack([losses, logits.gather(1, own)[:, 0] - others]))
    rows = np.empty(len(data), ROW)
    rows["sample"] = data.index.cpu().numpy()
    rows["loss"], rows["margin"] = torch.cat(parts, 1).cpu().numpy()
    return rows
