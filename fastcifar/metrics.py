"""Logits and labels enter, counts stay on the device; once read, they are the figures every report shows."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a labelled set."""

    images: int
    loss: float  # mean cross-entropy, no smoothing
    top1: float  # 0..1
    top5: float  # 0..1
    confusion: list[list[int]]  # [true class][predicted class], images

    @property
    def per_class(self) -> list[float | None]:
        """Accuracy of each class, 0..1; None where the set has no image of it."""
        return [row[c] / sum(row) if sum(row) else None for c, row in enumerate(self.confusion)]

    def to_dict(self, class_names: list[str]) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "images": self.images,
            "loss": self.loss,
            "top1": self.top1,
            "top5": self.top5,
            "per_class": dict(zip(class_names, self.per_class, strict=True)),
            "confusion": self.confusion,
        }


class EvaluationTally:
    """Counts over batches, on the device."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self.confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.top5 = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch: probabilities [B, C] float32, labels [B] int64."""
        log_likelihood = probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()
        self.loss += F.nll_loss(log_likelihood, labels, reduction="sum")
        best = probabilities.topk(min(5, self.classes), dim=1).indices
        self.top5 += (best == labels[:, None]).sum()
        cells = labels * self.classes + best[:, 0]
        self.confusion.scatter_add_(0, cells, torch.ones_like(cells))  # bincount would make a GPU tell the host its range

    def read(self) -> Evaluation:
        """Wait for the device and return the figures."""
        confusion = self.confusion.reshape(self.classes, self.classes).cpu()
        images = int(confusion.sum())
        return Evaluation(
            images=images,
            loss=float(self.loss) / images,
            top1=int(confusion.diagonal().sum()) / images,
            top5=int(self.top5) / images,
            confusion=confusion.tolist(),
        )
