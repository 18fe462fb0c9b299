"""One training step. All that differs from step to step it reads from tables on the device, at a cursor that it advances
itself; so the same step is launched operation by operation, or recorded once and replayed as one CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastcifar.augmentation import Augmentation
from fastcifar.augmentation.resize import resize_weights
from fastcifar.batches import Batches
from fastcifar.capture import Captured, Recorder
from fastcifar.compiling import CompileMode, compiled
from fastcifar.dataset import ResidentSet, StreamedSet
from fastcifar.device import upload
from fastcifar.distributed import ALONE, World
from fastcifar.epoch_tables import EpochPlan, EpochTables, EpochTally
from fastcifar.models.layers import Kernels, share_keys
from fastcifar.optimization import (
    LossReduction,
    copies,
    mixed_cross_entropy,
    momentum_factors,
    rescaled_moments,
    set_step,
    take_back,
)
from fastcifar.phases import PLAIN, Phase, freezable
from fastcifar.rounding import RoundedWeights
from fastcifar.streaming import BatchRing

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class StepSettings:
    """The scalars of a training step."""

    batch_size: int  # images, of all ranks together
    label_smoothing: float
    clip_gradient_norm: float  # 0 = off
    seed: int
    autocast_dtype: torch.dtype | None  # None: float32 throughout
    compile: bool
    kernels: Kernels = "auto"
    compile_mode: CompileMode = "default"
    clip_gradient_value: float = 0.0  # 0 = off
    table_momentum: bool = False  # a momentum that moves is read from a table too, not set on the optimizer
    skip_nonfinite: bool = False  # leave out updates whose loss or gradients are not finite
    loss_reduction: LossReduction = "mean"  # what is differentiated; the loss counted is the mean
    frozen: tuple[str, ...] = ()  # parameters that are not trained in frozen phases
    order_seed: int | None = None  # None: seed
    augmentation_seed: int | None = None  # None: seed


class TrainStep(Batches):
    """Augment, mix, forward, loss, backward, update, average and count, for one batch. `begin` an epoch, then call.

    model: on the device, channels_last. mean, std: [3] in 0..1. average: the averaged copy of the model, or None. record: what
    records the whole step at the first call, so that later ones replay it; None: every call launches all operations. say: told
    in a line when recording fails, after which every call launches them too. world: the processes that share each batch; a step
    of more than one cannot be recorded.
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
        record: Recorder | None = None,
        say: Callable[[str], object] = print,
        world: World = ALONE,
    ) -> None:
        # A GPU's images are rounded at once: autocast would round them before the first convolution.
        dtype = (settings.autocast_dtype if mean.is_cuda else None) or torch.float32
        own = settings.order_seed, settings.augmentation_seed
        order_seed, augmentation_seed = (settings.seed if seed is None else seed for seed in own)
        super().__init__(
            data, augmentation, mean, std,
            seed=augmentation_seed, order_seed=order_seed, dtype=dtype, kernels=settings.kernels, reuses=True,
        )  # fmt: skip
        self.model, self.optimizer, self.average, self.settings, self.world = model, optimizer, average, settings, world
        self._own = settings.batch_size // world.size  # images trained on here
        self._with_successor = world.size > 1 and augmentation.mixes  # which the last of them is mixed with
        images = self._own + self._with_successor
        self._ring = BatchRing(data, images) if isinstance(data, StreamedSet) else None
        self.number = 0  # of the step that comes next: the cursor, as the host knows it
        self._captured = partial(Captured, self.run, self._changes, mean.device, record, "the step", say)
        self._steps: dict[Phase, Captured] = {}  # all of them read the same tables
        self._freezable = freezable(model, settings.frozen)
        self._epoch = torch.zeros((), dtype=torch.int64, device=mean.device)
        self._draw = Captured(self._draw_epoch, list, mean.device, record, "drawing an epoch", say)
        scale = (settings.batch_size if settings.loss_reduction == "sum" else 1) / world.size  # of the mean over its own images
        self._loss_gradient = torch.full((), scale, device=mean.device) if scale != 1 else None
        self.rounded = RoundedWeights(model, settings.autocast_dtype)
        self._counters = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
        self._keys = share_keys(model) if mean.device.type == "cpu" else None
        self._prepare, self._loss = self.prepare, self.loss
        if settings.compile:  # the loss with the network, so that the head's small operations fuse
            self._loss = compiled(self.loss, settings.compile_mode)
            if self.augments_by != "numba":
                self._prepare = compiled(self.prepare, settings.compile_mode)

    def begin(
        self,
        epoch: int,
        rates: Sequence[float],
        *,
        phase: Phase = PLAIN,
        progress: float = 0.0,
        momenta: Sequence[float] | None = None,
        mean_weights: Sequence[float] | None = None,
        tally: EpochTally | None = None,
        first: int = 0,
    ) -> EpochTally:
        """Draw epoch `epoch`, whose steps have the learning rates `rates`; return what it counts.

        progress: share of training done, 0..1. momenta: SGD's, or Adam's first beta, step by step; None: as it is.
        mean_weights: of the new weights in their mean, where that is the average. tally, first: what was counted in the steps
        before step `first`, where the epoch goes on.
        """
        steps, size, device = len(rates), self.settings.batch_size, self.mean.device
        self._enter(phase)
        self._epoch.fill_(epoch)
        self._draw()
        order, draws = self._drawn
        plan = EpochPlan(draws, self.plan_mixing(epoch, steps, progress))
        kind = torch.float32 if device.type == "cuda" else torch.float64  # what the optimizer's fused kernel reads
        factors = [(1.0, 1.0, 1.0)] * steps
        if momenta is not None and self.settings.table_momentum:
            factors, momenta = momentum_factors(self.optimizer, momenta, epoch * steps), None
        rows = zip(rates, factors, mean_weights or [1.0] * steps, strict=True)
        table = [(rate * factor, *moments, weight) for rate, (factor, *moments), weight in rows]
        values, mixing = upload(torch.tensor(table, dtype=kind), device), plan.mixing
        columns = (values[:, :1], mixing.lam[:, None], mixing.blend[:, None], mixing.box, values[:, 1:])
        fresh = EpochTables(
            cursor=torch.full((1,), first, device=device),
            order=self.world.share(order[: steps * size].view(steps, size), successor=self._with_successor),
            scalars=torch.cat(columns, 1),
            plan=plan,
            tally=tally or EpochTally.begin(steps, device),
        )
        if all(step.replay is None for step in self._steps.values()):
            self.tables = fresh
        else:
            self.tables.refill(fresh)
        if self._ring is not None:
            self._ring.begin(fresh.order, first)
        self.number, self._momenta = first, momenta
        self.model.train()
        return self.tables.tally

    def _enter(self, phase: Phase) -> None:
        if phase not in self._steps:
            self._steps[phase] = self._captured()
        self._step = self._steps[phase]
        for parameter in self._freezable:
            parameter.requires_grad_(not phase.frozen)
        size, whole = phase.of(self.data.size), self.data.size
        self.resizing = None if size == whole else resize_weights(size, self.dtype, self.mean.device, whole)

    def _draw_epoch(self) -> None:
        """Draw the order and the augmentation of the epoch that stands on the device."""
        self._drawn = self.order(self._epoch), self.draws(self._epoch)

    def __call__(self) -> None:
        """Train on the next batch."""
        with self._ring.turn(self.number) if self._ring is not None else nullcontext():
            self._step()
        self.number += 1

    def _changes(self) -> list[Tensor]:
        """All that a step changes."""
        return [self.tables.cursor, self.tables.tally.losses, *self._trained()]

    def _trained(self) -> list[Tensor]:
        """The part of it that a step left out does not change."""
        tensors = [self.tables.tally.hits]
        for model in (self.model, *([self.average.model] if self.average is not None else [])):
            tensors += [*model.parameters(), *model.buffers()]
        return tensors + [value for state in self.optimizer.state.values() for value in state.values() if value is not None]

    def run(self) -> None:
        """The step at the cursor, operation by operation."""
        self.optimizer.zero_grad(set_to_none=True)
        self.rounded.round()
        tables, data, plan = self.tables, self.data, self.tables.plan
        cursor, tally = tables.cursor, tables.tally
        positions, scalars = tables.order.index_select(0, cursor)[0], tables.scalars.index_select(0, cursor)[0]
        rate, (lam, blend), box, rest = scalars[0], scalars[1:3].float(), scalars[3:7], scalars[7:]
        samples = None if self._keys is None else data.index[positions[: self._own]]
        if isinstance(data, StreamedSet):
            assert self._ring is not None
            data, plan = self._ring.batch(cursor, positions), replace(plan, draws=plan.draws.at(positions))
            positions = torch.arange(len(positions), device=positions.device)
        prepared = self._prepare(data, positions, plan, blend, box)
        images, labels, partner_labels = (values[: self._own] for values in prepared)
        before = copies(self._trained()) if self.settings.skip_nonfinite else {}
        with self._keys.given(self.settings.seed, self._epoch, samples, cursor) if self._keys is not None else nullcontext():
            loss, hits = self._loss(images, labels, partner_labels, lam)
        loss.backward(self._loss_gradient)
        self.rounded.widen()
        loss, hits = self._add_ranks(loss.detach(), hits)
        finite = self._is_finite(loss) if self.settings.skip_nonfinite else None
        self._update(rate, *rest)
        tally.hits += hits
        if finite is not None:  # the forward pass, too, has let the values into batch norm's averages
            take_back(self._trained(), before, ~finite)
            loss = torch.where(finite, loss, torch.nan)
        tally.losses.index_copy_(0, cursor, loss[None])
        cursor += 1

    def _update(self, rate: Tensor, before: Tensor, after: Tensor, mean_weight: Tensor) -> None:
        if self._counters:
            torch._foreach_add_(self._counters, 1)
        if self.settings.clip_gradient_value:
            nn.utils.clip_grad_value_(self.model.parameters(), self.settings.clip_gradient_value)
        if self.settings.clip_gradient_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_gradient_norm)
        set_step(self.optimizer, rate, None if self._momenta is None else self._momenta[self.number])
        with rescaled_moments(self.optimizer, before, after) if self.settings.table_momentum else nullcontext():
            self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, mean_weight)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def _add_ranks(self, loss: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        """Add up all ranks' gradients; return the mean loss and the hits of the whole batch."""
        if self.world.size > 1:
            loss = loss / self.world.size
            self.world.add([*self._gradients(), loss, hits])
        return loss, hits

    def _is_finite(self, loss: Tensor) -> Tensor:
        return torch.stack([loss, *torch._foreach_norm(self._gradients())]).isfinite().all()

    def loss(self, images: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch's mean loss and its hits; of a mixed image each label counts by its weight."""
        with autocast(images.device, self.settings.autocast_dtype):
            logits = functional_call(self.model, self.rounded.by_name, images)
        predicted = logits.detach().argmax(1)
        hits = lam * (predicted == labels).sum() + (1 - lam) * (predicted == partner_labels).sum()
        return mixed_cross_entropy(logits, labels, partner_labels, lam, self.settings.label_smoothing), hits


class AveragedModel(Generic[Model]):
    """An average of a model's parameters and statistics: average = (1 - weight) * average + weight * model.

    decay: of an exponential moving average, whose weight is 1 - decay; 0: the weight is given with every update.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model: Model = deepcopy(model).requires_grad_(False)
        self.decay = decay
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []  # of tensors and their averages, found once

    @torch.no_grad()
    def update(self, model: nn.Module, weight: Tensor) -> None:
        """Move the average towards `model`, always the same one; counters that are not floating point are copied.

        weight: 0-d, on the device, 0..1; nothing waits for it. With 1 the average is the model.
        """
        if not self._pairs:
            pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
            for floating in (True, False):
                kind = [pair for pair in pairs if pair[0].is_floating_point() == floating]
                self._pairs.append(([averaged for averaged, _ in kind], [current for _, current in kind]))
        (averages, values), (counters, counts) = self._pairs
        if self.decay:
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        else:
            weight = weight.to(averages[0].dtype)
            torch._foreach_mul_(averages, 1 - weight)
            torch._foreach_add_(averages, torch._foreach_mul(values, weight))
        if counters:
            torch._foreach_copy_(counters, counts)


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Automatic mixed precision in `dtype`, or none."""
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        yield
