"""Training loops timed in turns in one process, so that a shared machine's drift falls on all of them alike.

    ladder         the optimization ladder: each step added to those before it, from a plain DataLoader loop on
    baselines      fastcifar's training beside other people's loops
    architectures  every architecture's training, each by its own recipe

These make the rows of a table; a call of a row trains a fixed number of batches on a set of just those images (so that no
loader works ahead during another's turn), and `time_loops` times all of them.
"""

import itertools
import os
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as transforms
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.results import Timing
from fastcifar.augmentation import Augmentation
from fastcifar.dataset import ResidentSet, Splits, load_splits
from fastcifar.device import computes_bf16, synchronise
from fastcifar.errors import InputError
from fastcifar.models.layers import Kernels
from fastcifar.recipes import Recipe, RunOptions, reported
from fastcifar.state import build_state, build_step
from fastcifar.step import TrainStep, autocast

RATE = 0.01  # learning rate of every timed step
WARMUP = 1  # untimed rounds, after the first call that compiles
WORKERS = 2  # of the loaders of ordinary scripts
SHARED = Augmentation()  # crop with padding 4 and flip: what every baseline can do

Call = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """What the loops of a comparison train: the same model on the same images by the same recipe."""

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
        """The data with just those training images. Raises InputError when there are not as many."""
        if self.images > len(self.data.train):
            raise InputError(f"{self.steps} batches of {self.recipe.batch_size} are more than {len(self.data.train):,} images")
        return replace(self.data, train=self.data.train.subset(torch.arange(self.images, device=self.device)))

    @property
    def resident(self) -> ResidentSet:
        """Those images."""
        train = self.part.train
        assert isinstance(train, ResidentSet)
        return train


# ---- One function times them all.


@dataclass(frozen=True)
class Loop:
    """A row of a comparison."""

    name: str
    title: str
    note: str
    images: int  # that a call trains on
    build: Callable[[Sequence[str]], Call]  # given the names of the rows before it that work
    absent: str = ""  # why it is not even tried


def time_loops(loops: Sequence[Loop], *, rounds: int, kind: str, say: Callable[[str], object] = print) -> list[Timing]:
    """Build every loop, call it once, then time all that work in turns; one that fails at any time is a line, not an end."""
    import torch._dynamo  # here, since importing the compiler takes a second

    errors: dict[str, str] = {}
    clocks: dict[str, Callable[[], float]] = {}
    # All of them compile the one method TrainStep.loss; past the limit, 8 by default, the next one would silently run eagerly.
    with torch._dynamo.config.patch(recompile_limit=8 * (len(loops) + 1)):
        for loop in loops:
            errors[loop.name] = loop.absent
            if not loop.absent:
                try:
                    call = loop.build(list(clocks))
                    call()  # compiles, starts workers; and shows whether it works at all
                    clocks[loop.name] = wall_clock(call)
                except Exception as error:  # whatever a compiler or a device raises, the other loops go on
                    errors[loop.name] = one_line(error)
            say(f"{kind}: {loop.title}: {errors[loop.name] or 'ready'}")
        seconds, dropped = take_turns(clocks, rounds=rounds, warmup=WARMUP)
    for loop in loops:
        if loop.name in dropped:
            errors[loop.name] = one_line(dropped[loop.name])
            say(f"{kind}: {loop.title}: {errors[loop.name]}")
    rates = {loop.name: [loop.images / one for one in seconds.get(loop.name, [])] for loop in loops}
    return [Timing(loop.name, loop.title, loop.note, rates[loop.name], errors[loop.name]) for loop in loops]


def take_turns(
    clocks: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Call every clock once a round, after `warmup` untimed rounds, in an order drawn anew each round; return what they told.

    clocks: each does its work to the end and returns the seconds it took. One that raises has no further turns and no seconds,
    only its error, and the others go on in the order they would have had.
    """
    errors: dict[str, Exception] = {}
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    order, shuffle = sorted(clocks), random.Random(0)
    for number in range(warmup + rounds):
        shuffle.shuffle(order)
        for name in (name for name in order if name not in errors):
            try:
                taken = clocks[name]()
                if number >= warmup:
                    seconds[name].append(taken)
            except Exception as error:
                errors[name] = error
                del seconds[name]
    return seconds, errors


def wall_clock(call: Call) -> Callable[[], float]:
    """A clock for `take_turns` of a call that is finished when it returns."""

    def clock() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return clock


def one_line(error: BaseException) -> str:
    """An exception as one short line: its kind and its first words."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__


# ---- The optimization ladder.


# What makes training faster and leaves what is learned alone (but for rounding).
# {name: (title, note, why a CPU does not have it, why CUDA does not)}, "" = it has
STEPS = {
    "loader": ("eager fp32 NCHW, DataLoader", f"{WORKERS} workers", "", ""),
    "resident": ("resident data", "uint8 set on the device, whole batches augmented there", "", ""),
    "channels_last": ("channels_last", "weights and feature maps NHWC", "", ""),
    "bf16": ("bf16 autocast", "convolutions and linear layers in bfloat16 by autocast", "", ""),
    "compile": ("torch.compile", "torch.compile of augmentation, network and loss", "", ""),
    "tuned": (
        "tuned compile", "compiler thresholds that move fewer bytes", "the thresholds are made for a GPU's memory traffic", "",
    ),
    "kernels": (
        "fused kernels", "every fused kernel there is: Triton's on CUDA, Numba's augmentation on a CPU", "", "",
    ),
    "captured": ("whole step captured", "the whole step one CUDA graph", "CUDA graphs need a GPU", ""),
}  # fmt: skip


def why_not(name: str, device: torch.device) -> str:
    """Why `device` does not have an optimization step; "" when it has."""
    if name == "bf16" and not computes_bf16(device):
        return f"this {device.type} has no bf16 arithmetic: emulated, it is slower"
    return STEPS[name][3 if device.type == "cuda" else 2]


def ladder(task: Task, left_out: Collection[str] = ()) -> list[Loop]:
    """The optimization ladder, each step added to those before it that work. left_out: steps to do without."""

    def loop(name: str) -> Loop:
        reason = why_not(name, task.device)
        absent = f"not applicable: {reason}" if reason else "left out of this run" if name in left_out else ""
        return Loop(name, *STEPS[name][:2], task.images, lambda working: stepped_loop(task, [*working, name]), absent)

    return [loop(name) for name in STEPS]


def stepped_loop(task: Task, steps: Sequence[str]) -> Call:
    """Training with just these steps of the ladder: fastcifar's but for the first, which is the loop it starts from."""
    if list(steps) == ["loader"]:
        return ordinary_loop(task)
    if "tuned" in steps and "compile" not in steps:
        raise InputError("needs torch.compile, which this ladder does without")
    fused: Kernels = "triton" if task.device.type == "cuda" else "auto"
    run = RunOptions(
        data=task.folder, max_parameters=0, precision="bf16" if "bf16" in steps else "fp32", compile="compile" in steps,
        compile_mode="tuned" if "tuned" in steps else "default", kernels=fused if "kernels" in steps else "torch",
        capture="auto" if "captured" in steps else "off",
    )  # fmt: skip
    return fastcifar_loop(task, run, channels_last="channels_last" in steps)


# ---- Baselines and architectures.

# {name: (title, note, what builds it)}
LOOPS: dict[str, tuple[str, str, Callable[[Task, RunOptions], Call]]] = {
    "fastcifar": ("fastcifar", "the real training path", lambda task, run: fastcifar_loop(task, run)),
    "torch": (
        "--kernels torch", "the same without fused kernels",
        lambda task, run: fastcifar_loop(task, replace(run, kernels="torch")),
    ),
    "ordinary": (
        "ordinary loop", f"DataLoader with {WORKERS} workers, eager, fp32, NCHW", lambda task, run: ordinary_loop(task),
    ),
    "built_in": (
        "every built-in optimization",
        "DataLoader, channels_last, bf16 autocast, fused optimizer; on CUDA torch.compile and pinned memory too",
        lambda task, run: ordinary_loop(task, built_in=True),
    ),
    "ffcv": ("FFCV", "FFCV's loader and the same step; its JIT is not counted", lambda task, run: ffcv_loop(task)),
    "plain": (
        "eager fp32 NCHW", "an ordinary step whose batch is a ready tensor, nothing augmented",
        lambda task, run: plain_loop(task),
    ),
}  # fmt: skip
BASELINES = ("fastcifar", "ordinary", "built_in", "ffcv")


def baselines(task: Task, names: Iterable[str] = BASELINES, augmentation: Augmentation = SHARED) -> list[Loop]:
    """Rows of `LOOPS` on the task's model, by default fastcifar's training and three others.

    augmentation: of all of them; default: crop and flip, which all can do.
    """
    task = replace(task, recipe=replace(task.recipe, augmentation=augmentation))
    run = RunOptions(data=task.folder, max_parameters=0)

    def loop(name: str) -> Loop:
        title, note, build = LOOPS[name]
        return Loop(name, title, note, task.images, lambda _: build(task, run))

    return [loop(name) for name in names]


def architectures(
    archs: Iterable[str], folder: Path, *, images: int, batch_size: int, device: torch.device, options: RunOptions
) -> list[Loop]:
    """The real training of every architecture, each by its own recipe.

    folder: of the betons. images: about how many a call trains on; whole batches, at least one. batch_size: 0 = each recipe's
    own. options: of the runs (seed, precision, compile, kernels, what to verify).
    """
    run = replace(options, data=folder, max_parameters=0)
    data = load_all(folder, device, seed=run.seed, verify=run.verify)

    def loop(arch: str) -> Loop:
        recipe = reported(arch).recipe
        recipe = replace(recipe, batch_size=batch_size or recipe.batch_size)
        steps = max(1, min(images, len(data.train)) // recipe.batch_size)
        task = Task(arch, recipe, data, folder, steps)
        note = f"{steps} x {recipe.batch_size} images a turn, by its own recipe"
        return Loop(arch, arch, note, task.images, lambda _: fastcifar_loop(task, run))

    return [loop(arch) for arch in dict.fromkeys(archs)]


def load_all(folder: Path, device: torch.device, *, seed: int = 0, verify: bool = True) -> Splits:
    """All of both splits."""
    return load_splits(folder, device, limit_train=0, limit_test=0, val_fraction=0.0, seed=seed, verify=verify)


# ---- The loops.


class NchwStep(TrainStep):
    """The training step with batches in NCHW, for a model in NCHW."""

    def prepare(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, partners = super().prepare(*arguments, **keywords)
        return images.contiguous(), labels, partners


def fastcifar_loop(task: Task, run: RunOptions, *, channels_last: bool = True) -> Call:
    """The real training path: drawing an epoch, gathering, augmenting, training."""
    recipe, data = task.recipe, task.part
    state = build_state(task.arch, recipe, run, data, task.device)
    if not channels_last:
        state.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's stubs lack it
    step = build_step(state, recipe, run, data, TrainStep if channels_last else NchwStep)
    epochs = itertools.count()

    def call() -> None:
        epoch = next(epochs)
        step.begin(epoch, [RATE] * task.steps)
        for _ in range(task.steps):
            step()
        synchronise(task.device)

    return call


def ordinary_loop(task: Task, *, built_in: bool = False) -> Call:
    """What most scripts do: DataLoader, forward, backward, step; `built_in` turns on all that PyTorch offers for it."""
    workers = max(WORKERS, min(os.cpu_count() or 1, 16)) if built_in else WORKERS
    loader = torchvision_loader(task, workers=workers, pin_memory=built_in and task.device.type == "cuda")
    return partial(_train, task, _plain_step(task, built_in=built_in), lambda: loader)


def plain_loop(task: Task) -> Call:
    """An ordinary step that gets its batch for nothing: a ready float32 tensor, neither augmented nor mixed."""
    step = _plain_step(replace(task, recipe=replace(task.recipe, augmentation=SHARED)), built_in=False)
    images = torch.randn(task.recipe.batch_size, 3, 32, 32, device=task.device)
    labels = torch.randint(task.data.classes, (task.recipe.batch_size,), device=task.device)
    return partial(_train, task, step, lambda: [(images, labels)] * task.steps)


def ffcv_loop(task: Task) -> Call:
    """FFCV's own pipeline (crop, flip, cutout, then normalised in PyTorch, as its CIFAR example does) before the same step."""
    loader = ffcv_loader(task, device=task.device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        with own_threads() as restore:
            for images, labels in loader:
                restore()  # the loader's thread sets its own number for the whole process
                yield images, labels

    return partial(_train, task, _plain_step(task, built_in=True), batches)


def _train(task: Task, step: Callable[[Tensor, Tensor], None], batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
    for images, labels in batches():
        step(images.to(task.device, non_blocking=True), labels.to(task.device, non_blocking=True))
    synchronise(task.device)


def _plain_step(task: Task, *, built_in: bool) -> Callable[[Tensor, Tensor], None]:
    """Forward, loss, backward, update, as an ordinary script has them; with `built_in`, what PyTorch offers on this device."""
    recipe = task.recipe
    state = build_state(task.arch, recipe, RunOptions(kernels="torch", max_parameters=0), task.data, task.device)
    model, optimizer = state.model, state.optimizer
    if not built_in:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for group in optimizer.param_groups:
        group |= {"lr": RATE, "fused": True if built_in else None}
    compiled = built_in and task.device.type == "cuda"
    forward: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False) if compiled else model
    dtype = torch.bfloat16 if built_in and computes_bf16(task.device) else None
    criterion = partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
    alpha = recipe.augmentation.mixup_alpha or recipe.augmentation.cutmix_alpha
    generator = np.random.default_rng(0)

    def step(images: Tensor, labels: Tensor) -> None:
        lam = float(generator.beta(alpha, alpha)) if recipe.augmentation.mixes else 1.0
        if built_in:
            images = images.contiguous(memory_format=torch.channels_last)
        if recipe.augmentation.mixes:
            images = lam * images + (1 - lam) * images.flip(0)
        with autocast(task.device, dtype):
            logits = forward(images)
        loss = criterion(logits.float(), labels)
        if recipe.augmentation.mixes:
            loss = lam * loss + (1 - lam) * criterion(logits.float(), labels.flip(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- The loaders of other people's scripts.


class Pictures(Dataset[tuple[Tensor, int]]):
    """What an ordinary script has: PIL images and a chain of transforms."""

    def __init__(self, data: ResidentSet, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels, self.transform = data.images.cpu().numpy(), data.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[number])), self.labels[number]


def cutout(x: Tensor, side: int) -> Tensor:
    """Cutout as scripts write it, since torchvision has none: one square on a tensor [..., 32, 32]."""
    row, column = np.random.randint(32, size=2)  # noqa: NPY002  # as scripts do
    top, left = max(row - side // 2, 0), max(column - side // 2, 0)
    x[..., top : row + side // 2, left : column + side // 2] = 0
    return x


def transforms_of(recipe: Augmentation, package: Any) -> tuple[list[Any], list[Any]]:
    """The recipe as torchvision transforms, before and after normalisation; `package` is transforms or transforms.v2."""
    before = [package.RandomCrop(32, padding=recipe.crop_padding), package.RandomHorizontalFlip()]
    if any(recipe.jitter):
        before.insert(0 if recipe.jitter_before_crop else len(before), package.ColorJitter(*recipe.jitter))
    policies: dict[str, Callable[[], Any]] = {
        "rand_augment": lambda: package.RandAugment(recipe.policy_operations, recipe.policy_magnitude),
        "auto_augment": lambda: package.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
        "auto_augment_imagenet": lambda: package.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET),
        "trivial_augment": package.TrivialAugmentWide,
    }
    if recipe.policy != "none":
        before.append(policies[recipe.policy]())
    if recipe.grayscale:
        before.append(package.RandomGrayscale(recipe.grayscale))
    if recipe.rotation:
        before.append(package.RandomRotation(recipe.rotation))
    after = []
    if recipe.random_erasing:
        area = (recipe.erasing_area_min, recipe.erasing_area_max)
        value: Any = "random" if recipe.erasing_value == "noise" else 0  # mean or black: the same work
        after.append(package.RandomErasing(recipe.random_erasing, area, value=value))
    if recipe.cutout:
        after.append(partial(cutout, side=recipe.cutout))
    return before, after


def torchvision_loader(task: Task, *, workers: int = WORKERS, pin_memory: bool = False) -> DataLoader[Any]:
    """PyTorch's DataLoader with the recipe's PIL transforms, on the images of one call."""
    before, after = transforms_of(task.recipe.augmentation, transforms)
    normalise = transforms.Normalize(task.data.mean.tolist(), task.data.std.tolist())
    pictures = Pictures(task.resident, transforms.Compose([*before, transforms.ToTensor(), normalise, *after]))
    return DataLoader(
        pictures, task.recipe.batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )  # fmt: skip


def ffcv_loader(task: Task, device: torch.device | None) -> Any:
    """FFCV's Loader on the images of one call. device: where its batches go, normalised; None: uint8 as it decodes them."""
    with own_threads():
        from ffcv import transforms as T  # as FFCV's own examples do
        from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption

        augmentation, mean = task.recipe.augmentation, (255 * task.data.mean).tolist()
        image: list[Any] = [SimpleRGBImageDecoder(), T.RandomHorizontalFlip(), T.RandomTranslate(augmentation.crop_padding)]
        image += [T.Cutout(augmentation.cutout, tuple(map(int, mean)))] if augmentation.cutout else []
        image, label = [*image, T.ToTensor()], [IntDecoder(), T.ToTensor()]
        if device is not None:
            normalise = transforms.Normalize(mean, (255 * task.data.std).tolist())
            to_device = [T.ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
            image += [*to_device, T.ToTorchImage(), T.Convert(torch.float32), normalise]
            label += [*to_device, T.Squeeze()]
        return Loader(
            str(task.folder / "train.beton"), task.recipe.batch_size, WORKERS, os_cache=True, order=OrderOption.RANDOM,
            drop_last=True, indices=range(task.images), pipelines={"image": image, "label": label, "index": None},
        )  # fmt: skip


@contextmanager
def own_threads() -> Iterator[Callable[[], None]]:
    """Restore PyTorch's and Numba's numbers of threads, which FFCV sets for the whole process; what it yields does so too."""
    import numba  # here, since only FFCV's loader needs it

    threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()

    def restore() -> None:
        torch.set_num_threads(threads)
        numba.set_num_threads(numba_threads)

    try:
        yield restore
    finally:
        restore()
