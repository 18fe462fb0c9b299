"""What a training step reads and counts in, on the device: filled for an epoch, looked up at a cursor."""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fastcifar.augmentation.draws import Draws
from fastcifar.augmentation.mixing import MixPlan


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch drew beforehand: every sample's augmentation, every batch's mixing."""

    draws: Draws
    mixing: MixPlan


@dataclass
class EpochTally:
    """What an epoch counts without asking the device: read it once, after the last step."""

    losses: Tensor  # [steps] float32; with skip_nonfinite NaN where the update was left out
    hits: Tensor  # 0-d float64: images whose label was predicted; of a mixed image each label counts by its weight

    def read(self, *more: Tensor) -> tuple[list[float], float, list[float]]:
        """Wait for the device once; return the losses, the hits, and the values of 0-d tensors."""
        parts = (self.losses.double(), self.hits[None], *(value.double()[None] for value in more))
        values, steps = torch.cat(parts).tolist(), len(self.losses)  # host sync
        return values[:steps], values[steps], values[steps + 1 :]

    @classmethod
    def begin(cls, steps: int, device: torch.device) -> "EpochTally":
        """Nothing counted yet."""
        return cls(torch.zeros(steps, device=device), torch.zeros((), dtype=torch.float64, device=device))


@dataclass
class EpochTables:
    """What differs between an epoch's steps, on the device."""

    cursor: Tensor  # [1] int64: number of the step that comes next
    order: Tensor  # [steps, B] int64: positions of its samples
    # [steps, 10] float32, on a CPU float64: learning rate, lam, blend, box, two factors of the moments, weight in the mean
    scalars: Tensor
    plan: EpochPlan
    tally: EpochTally

    def refill(self, fresh: "EpochTables") -> None:
        """Take the values of `fresh` into these tensors, which a graph reads."""
        _refill(self, fresh)


def _refill(old: Any, fresh: Any) -> None:
    for name in (entry.name for entry in fields(old)):
        value = getattr(fresh, name)
        if isinstance(value, Tensor):
            if value.data_ptr() != getattr(old, name).data_ptr():
                getattr(old, name).copy_(value)
        elif is_dataclass(value):
            _refill(getattr(old, name), value)
