#!/usr/bin/env python3
"""How fast input pipelines deliver batches, how fast the training step takes them, how soon a run's first step ends.

python bench/input_pipelines.py --data data/beton --out bench/results/cpu/pipeline.json

Every pipeline delivers whole batches of a set of just that size. All normalise to float32, but for FFCV's own, which stops at
uint8. Mixing is left out: all would do it alike, on the batch.
"""

import itertools
import subprocess
import sys
import tempfile
from collections import deque  # with maxlen 0, the shortest way through an iterable
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torchvision.transforms import v2

from bench import baselines
from bench.baselines import WORKERS, Call, Loop, Task, own_threads
from bench.results import Timing
from bench.stats import ratio
from fastcifar.arguments import parse_arguments
from fastcifar.augmentation import Augmentation
from fastcifar.dataset import Splits, epoch_order
from fastcifar.device import choose_device, set_up_process
from fastcifar.errors import InputError, require, run_command, unknown
from fastcifar.files import write_json
from fastcifar.loader import Loader
from fastcifar.recipes import Recipe, RunOptions, reported
from fastcifar.run_folder import RunFolder, environment_facts
from fastcifar.state import build_state, build_step

CPU = torch.device("cpu")
LOADER, BATCHES, KORNIA, FFCV = "torchvision DataLoader", "torchvision v2 on batches", "kornia", "FFCV"
OTHERS = {
    "times_dataloader": LOADER,
    "times_v2": BATCHES,
    "times_kornia": KORNIA,
    "times_ffcv": FFCV,
}  # with which all are
OURS, TORCH, PLAIN = "fastcifar", "torch", "plain"  # of `baselines.LOOPS`

# What is measured: the reports' augmentations, and what FFCV's own pipeline can do.
PIPELINES: dict[str, Augmentation] = {
    "crop + flip (A, B, E)": reported("dropout_resnet24").recipe.augmentation,
    "crop + flip + cutout 8": Augmentation(cutout=8),
    "report D": reported("se_resnet18").recipe.augmentation,
    "report C": reported("robust_resnet64").recipe.augmentation,
}


@dataclass(frozen=True)
class Options:
    """Measure input pipelines, the training step and the start of a run on this machine."""

    data: Path = Path("data/beton")  # folder with the betons
    arch: str = "se_resnet18"  # architecture, trained by its own recipe
    batch_size: int = 256  # images per step
    rounds: int = 12  # timed turns of each pipeline and step
    starts: int = 5  # runs started to measure the time to the first step, 0 = none
    step: bool = True  # measure the training step
    input: bool = True  # measure the input pipelines of the recipes below
    pipelines: tuple[str, ...] = tuple(PIPELINES)  # which input pipelines, by name
    input_batch_size: int = 512  # images per batch of an input pipeline
    out: Path | None = None  # JSON to write; default: print only

    def __post_init__(self) -> None:
        require(self, self.batch_size >= 2, "batch_size", "at least 2")
        require(self, self.rounds >= 3, "rounds", "at least 3")
        require(self, self.starts >= 0, "starts", "0 or more")
        for name in self.pipelines:
            if name not in PIPELINES:
                raise unknown("pipeline", name, PIPELINES)


def measure(name: str, data: Splits, folder: Path, batch_size: int, rounds: int, console: Console) -> dict[str, Any]:
    """Time one of `PIPELINES` in every way that can do it, in turns, on the CPU; print and return the figures of each.

    One that fails is a line. Raises InputError where there are too few images.
    """
    augmentation = replace(PIPELINES[name], mix_probability=0.0)
    many, few = (40, 8) if augmentation.recolours else (80, 20)  # batches of a call: tenths of a second for fast and slow
    task = Task("se_resnet18", Recipe(batch_size=batch_size, augmentation=augmentation), data, folder, many)
    loops = pipelines_of(task, replace(task, steps=few))
    console.print(f"input pipeline: {name}; batch {batch_size}, mixing left out")
    return time_rates(loops, rounds, console, OTHERS)


def time_rates(loops: list[Loop], rounds: int, console: Console, others: dict[str, str]) -> dict[str, Any]:
    """Time loops in turns; print and return the rate of each, and how many times as fast it is as `others` {key: name}."""
    timings = baselines.time_loops(loops, rounds=rounds, kind="pipeline", say=lambda line: None)
    for timing in timings:
        if timing.error:
            console.print(f"{timing.name:>26}: {timing.error}", style="yellow")
    measured = {timing.name: timing for timing in timings if not timing.error}
    results: dict[str, Any] = {}
    for name, timing in measured.items():
        results[name], told = {"images_per_second": spread(timing)}, [rate_text(timing)]
        for key, other in others.items():
            if other != name and other in measured:
                results[name][key], text = compared(timing, measured[other])
                told.append(f"{text} {other}")
        results[name]["note"] = timing.note
        console.print(f"{name:>26}: {'; '.join([*told, timing.note])}")
    return results


def pipelines_of(task: Task, slow: Task) -> list[Loop]:
    """All that can do what the task's recipe asks for; `slow`: the same for those that work image by image."""
    task.part, slow.part  # noqa: B018  # raises InputError where there are too few images
    recipe = task.recipe.augmentation
    plain = not (recipe.recolours or recipe.random_erasing)
    rows: list[tuple[str, str, Task, Callable[[Task], Call], bool]] = [
        ("fastcifar", "as training prepares its batches; JIT not counted", task, partial(_prepare, kernels="auto"), True),
        ("fastcifar.Loader", "the same in a plain loop, in float32", task, _loader, True),
        ("fastcifar in PyTorch", "the same pixels, eager", task, partial(_prepare, kernels="torch"), True),
        (
            LOADER, f"PIL transforms, {WORKERS} workers", slow,
            lambda task: partial(deque, baselines.torchvision_loader(task), maxlen=0), True,
        ),
        (BATCHES, "wrong: draws once for the whole batch", task, _torchvision_batches, True),
        (
            KORNIA, "each image its own parameters", task, _kornia,
            find_spec("kornia") is not None
            and not (recipe.policy != "none" or recipe.rotation or recipe.grayscale or recipe.random_erasing),
        ),
        (FFCV, "Numba, uint8, no normalisation; JIT not counted", task, _ffcv, plain),
    ]  # fmt: skip

    def loop(name: str, note: str, task: Task, build: Callable[[Task], Call]) -> Loop:
        return Loop(name, name, note, task.images, lambda _: build(task))

    return [loop(name, note, task, build) for name, note, task, build, able in rows if able]


def _prepare(task: Task, kernels: Literal["auto", "torch"]) -> Call:
    """What training does before the network: drawing an epoch's parameters, then `TrainStep.prepare` for every batch."""
    run = RunOptions(data=task.folder, max_parameters=0, kernels=kernels, compile=False)
    train, epochs = task.resident, itertools.count()
    data = replace(task.data, train=train)
    step = build_step(build_state(task.arch, task.recipe, run, data, task.device), task.recipe, run, data)

    def call() -> None:
        epoch = next(epochs)
        order, plan = epoch_order(train.index, 0, epoch), step.plan(epoch, task.steps, progress=0.0)
        for number, positions in enumerate(order.split(task.recipe.batch_size)):
            step.prepare(train, positions, plan, plan.mixing.blend[number], plan.mixing.box[number])

    return call


def _loader(task: Task) -> Call:
    """Five lines of somebody else's loop."""
    mean, std = task.data.statistics
    options: dict[str, Any] = {"mean": mean, "std": std, "epochs": task.recipe.epochs, "device": task.device.type}
    loader = Loader(task.resident, task.recipe.batch_size, task.recipe.augmentation, **options)
    return partial(deque, loader, maxlen=0)


def _torchvision_batches(task: Task) -> Call:
    before, after = baselines.transforms_of(task.recipe.augmentation, v2)
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(task.data.mean.tolist(), task.data.std.tolist())]
    return _on_batches(task, v2.Compose([*before, *normalise, *after]))


def _kornia(task: Task) -> Call:
    from kornia import augmentation as K  # as kornia's own documentation does

    recipe = task.recipe.augmentation
    steps = [K.RandomCrop((32, 32), padding=recipe.crop_padding), K.RandomHorizontalFlip()]
    if any(recipe.jitter):
        steps.append(K.ColorJitter(*recipe.jitter, p=1.0))
    if recipe.cutout:
        area = recipe.cutout**2 / 32**2
        steps.append(K.RandomErasing(scale=(area, area), ratio=(1.0, 1.0), p=1.0))
    chain = torch.nn.Sequential(*steps, K.Normalize(task.data.mean, task.data.std))
    return _on_batches(task, lambda batch: chain(batch.float() / 255))


def _on_batches(task: Task, chain: Callable[[torch.Tensor], object]) -> Call:
    """A call of a chain that takes uint8 batches [B, 3, 32, 32]."""
    planes = task.resident.images.permute(0, 3, 1, 2).contiguous()

    def call() -> None:
        for positions in torch.randperm(task.images).split(task.recipe.batch_size):
            chain(planes[positions])

    return call


def _ffcv(task: Task) -> Call:
    loader = baselines.ffcv_loader(task, device=None)

    def call() -> None:
        with own_threads():
            deque(loader, maxlen=0)

    return call


def spread(timing: Timing) -> dict[str, Any]:
    """Images per second: median, and the 10th and 90th percentile over rounds."""
    low, middle, high = (float(value) for value in np.percentile(timing.images_per_second, [10, 50, 90]))
    return {"median": middle, "p10": low, "p90": high, "rounds": len(timing.images_per_second)}


def compared(faster: Timing, slower: Timing) -> tuple[dict[str, float], str]:
    """How many times as fast: the rounds' median ratio, and their geometric mean with its 95 % interval; and this as text."""
    pairs = list(zip(faster.images_per_second, slower.images_per_second, strict=True))
    whole = ratio(*zip(*pairs, strict=True))
    return {"median": median(a / b for a, b in pairs)} | vars(whole), str(whole)


def rate_text(timing: Timing) -> str:
    """The rate for people."""
    rate = spread(timing)
    return f"{rate['median']:9,.0f} img/s (10-90 %: {rate['p10']:,.0f}-{rate['p90']:,.0f}, {rate['rounds']} rounds)"


def training_step(options: Options, device: torch.device, console: Console) -> dict[str, Any]:
    """Time our step against the same model in eager float32 NCHW, which gets its batch for nothing."""
    recipe = replace(reported(options.arch).recipe, batch_size=options.batch_size)
    task = Task(options.arch, recipe, baselines.load_all(options.data, device), options.data, steps=1)
    loops = baselines.baselines(task, (OURS, TORCH, PLAIN), recipe.augmentation)
    timings = baselines.time_loops(loops, rounds=options.rounds, kind="step", say=lambda line: None)
    for timing in timings:
        if timing.error:
            raise InputError(f"{timing.title}: {timing.error}")
    ours, torchs, plain = timings
    (speedup, text), (over_torch, over_torch_text) = compared(ours, plain), compared(ours, torchs)
    told = {timing.title: rate_text(timing) for timing in timings}
    for name, words in (told | {"speed-up": text, "auto over torch": over_torch_text}).items():
        console.print(f"{name:>16}: {words}")
    return {
        "arch": options.arch,
        "batch_size": options.batch_size,
        "images_per_second": {timing.title: spread(timing) for timing in timings},
        "speedup": speedup,
        "speedup_of_auto_over_torch": over_torch,
        "seconds": {timing.title: [task.images / rate for rate in timing.images_per_second] for timing in timings},
    }


def time_to_first_step(options: Options, console: Console) -> dict[str, Any]:
    """Start the training command several times: seconds from the process's beginning to its first step's end."""
    seconds = []
    for _ in range(options.starts):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, "-m", "fastcifar.train", "--arch", options.arch, "--data", str(options.data.resolve()),
                "--out", folder, "--epochs", "1", "--batch-size", "128", "--limit-train", "128", "--limit-test", "2",
                "--no-plots", "--plan", "default", "--held-out", "0",  # all 128 in the batch, by whatever recipe
            ]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
            seconds.append(RunFolder(Path(folder)).read_metrics()[0]["first_step_seconds"])
    spans = f"{median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f}, {len(seconds)} starts)"
    console.print(f"{'first step after':>16}: {spans}")
    return {"arch": options.arch, "seconds": seconds, "median": median(seconds)}


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments(Options, f"python bench/{Path(sys.argv[0]).name}")
    console = Console(soft_wrap=True, highlight=False)
    device = choose_device("auto")
    set_up_process(device, deterministic=True)
    results: dict[str, Any] = {}
    if options.input:
        data, rounds, batch_size = baselines.load_all(options.data, CPU), options.rounds, options.input_batch_size
        results["input"] = {name: measure(name, data, options.data, batch_size, rounds, console) for name in options.pipelines}
    if options.step:
        results["step"] = training_step(options, device, console)
    if options.starts:
        results["first_step"] = time_to_first_step(options, console)
    if options.out is not None:
        write_json(options.out, results | environment_facts(device))


if __name__ == "__main__":
    run_command(main)
