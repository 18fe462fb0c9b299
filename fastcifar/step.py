"""One training step on the samples at given positions of the set; its loss and hits stay on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastcifar.augmentation import Augmentation, augment, draw, numba_serves, triton_serves
from fastcifar.augmentation.draws import Draws
from fastcifar.augmentation.mixing import MixPlan, mix, partner
from fastcifar.compiling import CompileMode, compiled
from fastcifar.dataset import ResidentSet, StreamedSet
from fastcifar.models.layers import Kernels
from fastcifar.optimization import mixed_cross_entropy, set_step
from kernels.augment.operations import SIDE
from kernels.backends import has_won

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class StepSettings:
    """The scalars of a training step."""

    label_smoothing: float
    clip_gradient_norm: float  # 0 = off
    seed: int
    autocast_dtype: torch.dtype | None  # None: float32 throughout
    compile: bool
    kernels: Kernels = "auto"
    compile_mode: CompileMode = "default"
    clip_gradient_value: float = 0.0  # 0 = off
    skip_nonfinite: bool = False  # leave out updates whose loss or gradients are not finite; asks the device in every step


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch drew beforehand: every sample's augmentation, every batch's mixing."""

    draws: Draws
    mixing: MixPlan


@dataclass
class EpochTally:
    """What an epoch counts without asking the device: read it once, after the last step."""

    losses: Tensor  # [steps] float32
    hits: Tensor  # 0-d float64: images whose label was predicted; of a mixed image each label counts by its weight
    skipped: int = 0  # steps whose loss or gradients were not finite and whose update was left out


class TrainStep:
    """Augment, mix, forward, loss, backward, update, for one batch.

    model: on the device, channels_last. mean, std: [3] in 0..1. average: the EMA's copy of the model, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: ResidentSet | StreamedSet,
        augmentation: Augmentation,
        mean: Tensor,
        std: Tensor,
        settings: StepSettings,
        average: "AveragedModel[Any] | None" = None,
    ) -> None:
        self.model, self.optimizer, self.data, self.average = model, optimizer, data, average
        self.augmentation, self.settings = augmentation, settings
        self.mean, self.std = mean, std
        self._last_images: Tensor | None = None
        # Where nothing mixes them, images can be rounded at once: autocast would round them before the first convolution.
        dtype = torch.float32 if augmentation.mixes else settings.autocast_dtype or torch.float32
        self.augments_by = choose_augmentation(augmentation, settings.kernels, mean.device, dtype)
        self._image_dtype = dtype if self.augments_by == "triton" else torch.float32
        self._prepare, self._loss = self.prepare, self.loss
        if settings.compile:  # the loss with the network, so that the head's small operations fuse
            self._loss = compiled(self.loss, settings.compile_mode)
            if self.augments_by == "torch":
                self._prepare = compiled(self.prepare, settings.compile_mode)

    def plan(self, epoch: int, steps: int, progress: float) -> EpochPlan:
        """Draw an epoch's augmentation and mixing; `progress` is the share of training done, 0..1."""
        seed, device = self.settings.seed, self.mean.device
        mixing = self.augmentation.plan_mixing(seed=seed, epoch=epoch, steps=steps, progress=progress, device=device)
        draws = draw(self.augmentation, self.data.index, seed, epoch)
        if self.augments_by == "numba":
            _ = draws.moves, draws.rotations  # computed here, not in the first step
        return EpochPlan(draws, mixing)

    def __call__(
        self, positions: Tensor, step: int, rate: float, plan: EpochPlan, tally: EpochTally, momentum: float | None = None
    ) -> None:
        """Train on the samples at `positions` [B].

        step: number of the batch in its epoch. rate: the learning rate. momentum: SGD's, or Adam's first beta; None: as it is.
        `tally` takes the loss and the hits.
        """
        mixing, data = plan.mixing, self.data
        if isinstance(data, StreamedSet):
            data, plan = data.fetch(positions), replace(plan, draws=plan.draws.at(positions))
            positions = torch.arange(len(positions), device=positions.device)
        images, labels, partner_labels = self._prepare(data, positions, plan, mixing.blend[step], mixing.box[step])
        lam = mixing.lam[step]
        statistics = [buffer.clone() for buffer in self.model.buffers()] if self.settings.skip_nonfinite else []
        loss, logits = self._loss(images, labels, partner_labels, lam)
        loss.backward()
        if self.settings.skip_nonfinite and not self._is_finite(loss):
            for buffer, before in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(before)  # the forward pass has let the values into batch norm's averages
            self.optimizer.zero_grad(set_to_none=True)
            tally.losses[step] = torch.nan
            tally.skipped += 1
            return
        if self.settings.clip_gradient_value:
            nn.utils.clip_grad_value_(self.model.parameters(), self.settings.clip_gradient_value)
        if self.settings.clip_gradient_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_gradient_norm)
        set_step(self.optimizer, rate, momentum)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        with torch.no_grad():
            tally.losses[step] = loss
            predicted = logits.argmax(1)
            tally.hits += lam * (predicted == labels).sum() + (1 - lam) * (predicted == partner_labels).sum()

    def _is_finite(self, loss: Tensor) -> bool:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return bool(torch.stack([loss.detach(), *torch._foreach_norm(gradients)]).isfinite().all())  # host sync

    def prepare(
        self, data: ResidentSet, positions: Tensor, plan: EpochPlan, blend: Tensor, box: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return images [B, 3, 32, 32] channels_last, labels [B] and the mixing partners' labels [B]."""
        images, labels = augment(
            self.augmentation, data, positions, plan.draws, self.mean, self.std,
            backend=self.augments_by, dtype=self._image_dtype, reuse=self._last_images,
        )  # fmt: skip
        if self.augments_by == "numba":
            self._last_images = images  # nothing needs it after this step: its memory serves the next
        if self.augmentation.mixes:
            images = mix(images, blend, box)
        return images, labels, partner(labels)

    def loss(self, images: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch's mean loss and its logits [B, C]."""
        with autocast(images.device, self.settings.autocast_dtype):
            logits = self.model(images)
        return mixed_cross_entropy(logits, labels, partner_labels, lam, self.settings.label_smoothing), logits


def choose_augmentation(
    augmentation: Augmentation, kernels: Kernels, device: torch.device, dtype: torch.dtype
) -> Literal["torch", "numba", "triton"]:
    """What applies a recipe's augmentation. Numba on a CPU unless PyTorch is asked for; Triton where asked for and able."""
    chosen = kernels in ("auto", "fusable")  # fusable is said of the network
    if chosen and numba_serves(augmentation, device):
        return "numba"
    able = device.type == "cuda" and triton_serves(augmentation)
    if able and (kernels == "triton" or (chosen and measured_faster(device, dtype))):
        return "triton"
    return "torch"


def measured_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused augmentation won on this device where it was measured."""
    return has_won("augment", torch.empty(0, 3, SIDE, SIDE, dtype=dtype, device=device))


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
