"""Positions in the resident set enter; one optimizer step later the model has moved. Losses and hits stay on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastcifar.augmentation import Augmentation, augment, draw
from fastcifar.augmentation.draws import Draws
from fastcifar.augmentation.mixing import MixPlan, mix, partner
from fastcifar.dataset import ResidentSet
from fastcifar.losses import mixed_cross_entropy

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class StepSettings:
    """The scalars of a training step."""

    label_smoothing: float
    clip_gradient_norm: float  # 0 = off
    seed: int
    autocast_dtype: torch.dtype | None  # None: float32 throughout
    compile: bool


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch drew beforehand: every sample's augmentation, every batch's mixing."""

    draws: Draws
    mixing: MixPlan


@dataclass
class EpochTally:
    """What an epoch counts without asking the device: read it once, after the last step."""

    losses: Tensor  # [steps] float32
    hits: Tensor  # 0-d int64: images whose heavier label was predicted


class TrainStep:
    """Augment, mix, forward, loss, backward, update, for one batch.

    model: on the device, channels_last. mean, std: [3] in 0..1. average: the EMA's copy of the model, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: ResidentSet,
        augmentation: Augmentation,
        mean: Tensor,
        std: Tensor,
        settings: StepSettings,
        average: "AveragedModel[Any] | None" = None,
    ) -> None:
        self.model, self.optimizer, self.data, self.average = model, optimizer, data, average
        self.augmentation, self.settings = augmentation, settings
        self.mean, self.std = mean, std
        self._prepare, self._loss = self.prepare, self.loss
        if settings.compile:  # the loss with the network, so that the head's small operations fuse
            self._prepare, self._loss = (
                torch.compile(self.prepare, dynamic=False),
                torch.compile(self.loss, dynamic=False),
            )

    def plan(self, epoch: int, steps: int, progress: float) -> EpochPlan:
        """Draw an epoch's augmentation and mixing; `progress` is the share of training done, 0..1."""
        seed, device = self.settings.seed, self.mean.device
        mixing = self.augmentation.plan_mixing(seed=seed, epoch=epoch, steps=steps, progress=progress, device=device)
        return EpochPlan(draw(self.augmentation, self.data.index, seed, epoch), mixing)

    def __call__(self, positions: Tensor, step: int, rate: float, plan: EpochPlan, tally: EpochTally) -> None:
        """Train on the samples at `positions` [B].

        step: number of the batch in its epoch. rate: the learning rate. `tally` takes the loss and the hits.
        """
        mixing = plan.mixing
        images, labels, partner_labels = self._prepare(positions, plan.draws, mixing.blend[step], mixing.box[step])
        share = mixing.share[step]
        loss, logits = self._loss(images, labels, partner_labels, share)
        loss.backward()
        if self.settings.clip_gradient_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        with torch.no_grad():
            tally.losses[step] = loss
            tally.hits += (logits.argmax(1) == torch.where(share < 0.5, partner_labels, labels)).sum()

    def prepare(self, positions: Tensor, draws: Draws, blend: Tensor, box: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return images [B, 3, 32, 32] channels_last, labels [B] and the mixing partners' labels [B]."""
        data = self.data
        images = augment(self.augmentation, data.images, positions, draws, self.mean, self.std)
        labels = data.labels[positions]
        if self.augmentation.mixes:
            images = mix(images, blend, box)
        return images, labels, partner(labels)

    def loss(self, images: Tensor, labels: Tensor, partner_labels: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch's mean loss and its logits [B, C]."""
        with autocast(images.device, self.settings.autocast_dtype):
            logits = self.model(images)
        return mixed_cross_entropy(logits, labels, partner_labels, share, self.settings.label_smoothing), logits


class AveragedModel(Generic[Model]):
    """An exponential moving average of a model's parameters and statistics: average = decay * average + (1 - decay) * model."""

    def __init__(self, model: Model, decay: float) -> None:
        self.model: Model = deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`; counters that are not floating point are copied."""
        averaged, current = list(self.model.state_dict().values()), list(model.state_dict().values())
        pairs = list(zip(averaged, current, strict=True))
        floating = [(a, c) for a, c in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [c for _, c in floating], 1 - self.decay)
        for a, c in pairs:
            if not a.is_floating_point():
                a.copy_(c)


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Automatic mixed precision in `dtype`, or none."""
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        yield
