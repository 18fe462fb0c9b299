"""An architecture, its recipe and data enter; closures leave that each train a fixed number of steps, ready to be timed.

ours      the real training path with the levers asked for; without channels_last it trains NCHW
ordinary  what most scripts do: torchvision's DataLoader, eager float32 NCHW; or with every lever that PyTorch has built in
ffcv      FFCV's own loader with the same built-in levers

Each closure has a set of just the images it trains on in a call, so that no loader works ahead during another's turn.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as transforms
from torch import Tensor
from torch.utils.data import DataLoader

from bench.input_pipelines import WORKERS, Pictures, own_threads, transforms_of
from bench.levers import TUNED, compiler_settings, run_options
from bench.timing import synchronise
from fastcifar.dataset import ResidentSet, Splits, epoch_order
from fastcifar.device import choose_precision, computes_bf16
from fastcifar.models import build_model, place
from fastcifar.recipes import Recipe, RunOptions
from fastcifar.state import TrainingState, build_state
from fastcifar.step import EpochTally, StepSettings, TrainStep, autocast

RATE = 0.01  # learning rate of every timed step
Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Task:
    """What every loop of a comparison trains: the same model on the same images by the same recipe."""

    arch: str
    recipe: Recipe  # its batch size and augmentation count, its schedule does not
    data: Splits  # on the device
    folder: Path  # of the betons it came from
    steps: int  # of a call

    @property
    def device(self) -> torch.device:
        return self.data.mean.device

    @property
    def images(self) -> int:
        """What a call trains on."""
        return self.steps * self.recipe.batch_size

    @property
    def part(self) -> Splits:
        """The data with just those training images."""
        return replace(self.data, train=self.data.train.subset(torch.arange(self.images, device=self.device)))


def build_step(state: TrainingState, recipe: Recipe, run: RunOptions, data: Splits, kind: type[TrainStep]) -> TrainStep:
    """The training step just as `python -m fastcifar.train` builds it, of class `kind`."""
    settings = StepSettings(
        label_smoothing=recipe.label_smoothing,
        clip_gradient_norm=recipe.clip_gradient_norm,
        seed=run.seed,
        autocast_dtype=choose_precision(run.precision, data.mean.device),
        compile=run.compile,
        kernels=run.kernels,
    )
    return kind(
        state.model, state.optimizer, data.train, recipe.augmentation, data.mean, data.std, settings, average=state.average
    )


class PlanarStep(TrainStep):
    """The step with batches in NCHW, for a model in NCHW."""

    def prepare(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, partners = super().prepare(*arguments, **keywords)
        return images.contiguous(), labels, partners


def ours(task: Task, levers: list[str]) -> Callable[[], None]:
    """The real training path with `levers`: drawing an epoch, gathering, augmenting, training."""
    recipe, run, data = task.recipe, run_options(levers, data=task.folder), task.part
    state = build_state(task.arch, recipe, run, data, task.device)
    planar = "channels_last" not in levers
    if planar:
        state.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's stubs lack it
    step = build_step(state, recipe, run, data, PlanarStep if planar else TrainStep)
    if "tuned" in levers:  # options of its own, or the compiler would hand out another rung's code for the same network
        step._loss = torch.compile(step.loss, dynamic=False, options=dict(TUNED))
        if step.augments_by == "torch":
            step._prepare = torch.compile(step.prepare, dynamic=False, options=dict(TUNED))
    epochs = iter(range(1_000_000))

    def run_once() -> None:
        epoch = next(epochs)
        order = epoch_order(data.train.index, 0, epoch)
        plan = step.plan(epoch, task.steps, progress=0.0)
        tally = EpochTally(torch.zeros(task.steps, device=task.device), torch.zeros((), dtype=torch.int64, device=task.device))
        with compiler_settings(levers):
            for number, positions in enumerate(order.split(recipe.batch_size)):
                step(positions, number, RATE, plan, tally)
        synchronise(task.device)

    return run_once


def ordinary(task: Task, *, built_in: bool = False) -> Callable[[], None]:
    """An ordinary loop: DataLoader, forward, backward, step; `built_in` turns on every lever PyTorch offers for it."""
    before, after = transforms_of(task.recipe.augmentation, transforms)
    normalise = transforms.Normalize(tuple(task.data.mean.tolist()), tuple(task.data.std.tolist()))
    chain = transforms.Compose([*before, transforms.ToTensor(), normalise, *after])
    train = task.part.train
    assert isinstance(train, ResidentSet)
    loader = DataLoader(
        Pictures(ResidentSet(train.images.cpu(), train.labels.cpu(), train.index.cpu()), task.images, chain),
        task.recipe.batch_size,
        shuffle=True,
        num_workers=max(WORKERS, min(os.cpu_count() or 1, 16)) if built_in else WORKERS,
        persistent_workers=True,
        pin_memory=built_in and task.device.type == "cuda",
        drop_last=True,
    )
    return partial(_train, task, _plain_step(task, built_in=built_in), lambda: iter(loader))


def ffcv(task: Task) -> Callable[[], None]:
    """FFCV's own pipeline (crop, flip, cutout, then normalised in PyTorch, as its CIFAR example does) before the same step."""
    with own_threads():
        from ffcv import transforms as T  # as FFCV's own examples do
        from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption

        augmentation, mean = task.recipe.augmentation, 255 * task.data.mean.cpu()
        grey = tuple(int(value) for value in mean)
        image: list[Any] = [SimpleRGBImageDecoder(), T.RandomHorizontalFlip(), T.RandomTranslate(augmentation.crop_padding)]
        image += [T.Cutout(augmentation.cutout, grey)] if augmentation.cutout else []
        to_device = [T.ToDevice(task.device, non_blocking=True)] if task.device.type == "cuda" else []
        normalise = transforms.Normalize(mean.tolist(), (255 * task.data.std.cpu()).tolist())
        label: list[Any] = [IntDecoder(), T.ToTensor(), *to_device, T.Squeeze()]
        image += [T.ToTensor(), *to_device, T.ToTorchImage(), T.Convert(torch.float32), normalise]
        loader = Loader(
            str(task.folder / "train.beton"),
            batch_size=task.recipe.batch_size,
            num_workers=WORKERS,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            indices=range(task.images),
            pipelines={"image": image, "label": label, "index": None},
        )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        with own_threads() as restore:
            for images, labels in loader:
                restore()  # the loader's thread sets its own number for the whole process
                yield images, labels

    return partial(_train, task, _plain_step(task, built_in=True), batches)


def _train(task: Task, step: Callable[[Tensor, Tensor], None], batches: Batches) -> None:
    """One call of a loop that is not ours."""
    for images, labels in batches():
        step(images.to(task.device, non_blocking=True), labels.to(task.device, non_blocking=True))
    synchronise(task.device)


def _plain_step(task: Task, *, built_in: bool) -> Callable[[Tensor, Tensor], None]:
    """Forward, loss, backward, update, as an ordinary script has them; with `built_in`, what PyTorch offers on this device."""
    recipe, cuda = task.recipe, task.device.type == "cuda"
    model = build_model(
        task.arch,
        task.data.classes,
        block_dropout=recipe.block_dropout,
        head_dropout=recipe.head_dropout,
        stochastic_depth=recipe.stochastic_depth,
        kernels="torch",
    )
    model = place(model, task.device) if built_in else model.to(task.device)
    forward: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False) if built_in and cuda else model
    fused = True if built_in else None
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=recipe.weight_decay, fused=fused)
    else:
        nesterov = recipe.optimizer == "nesterov"
        optimizer = torch.optim.SGD(
            model.parameters(), RATE, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=nesterov, fused=fused
        )
    dtype = torch.bfloat16 if built_in and computes_bf16(task.device) else None
    criterion = partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
    alpha = recipe.augmentation.mixup_alpha or recipe.augmentation.cutmix_alpha
    random = np.random.default_rng(0)

    def step(images: Tensor, labels: Tensor) -> None:
        share = float(random.beta(alpha, alpha)) if recipe.augmentation.mixes else 1.0
        if built_in:
            images = images.contiguous(memory_format=torch.channels_last)
        if recipe.augmentation.mixes:
            images = share * images + (1 - share) * images.flip(0)
        with autocast(task.device, dtype):
            logits = forward(images)
        loss = criterion(logits.float(), labels)
        if recipe.augmentation.mixes:
            loss = share * loss + (1 - share) * criterion(logits.float(), labels.flip(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
