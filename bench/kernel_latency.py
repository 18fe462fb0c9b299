#!/usr/bin/env python3
"""The table of kernels enters; how long each takes on this machine, beside eager and compiled PyTorch, leaves as JSON.

python bench/kernel_latency.py --out bench/results/h200/kernel_latency.json --record

A win is claimed only where the 95 % interval of the ratio excludes 1 against every peer. `--record` writes those maps to
kernels/measured.json, from which `--kernels auto` chooses. A form that fails its check (against float64; of the augmentation
against NumPy's pixels) is not timed. Without a CUDA device the Triton kernels are left out, and what runs on the CPU is
measured: the augmentation.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench.collect import environment
from bench.input_pipelines import PIPELINES
from bench.input_pipelines import measure as pipeline
from bench.kernel_rows import KERNELS, KernelRow
from bench.kernel_timing import OURS, CudaStopwatch, Measurement, measure, peers_of, shape_name
from fastcifar import augmentation
from fastcifar.augmentation import Augmentation
from fastcifar.dataset import CIFAR10_MEAN, CIFAR10_STD, ResidentSet, load_resident
from fastcifar.device import choose_device, set_up_process
from fastcifar.errors import InputError, require, run_command, unknown
from fastcifar.files import read_json, write_json
from kernels.augment import augment
from kernels.augment.reference import augment_numpy
from kernels.backends import DTYPE_NAMES, MEASURED

CPU_PIPELINES = ("crop + flip (A, B, E)", "crop + flip + cutout 8")  # what kernels.augment does
CHECKED = 512  # images compared with NumPy's before anything is timed


@dataclass(frozen=True)
class Options:
    """Time every fused kernel against eager and compiled PyTorch; on a machine without CUDA, the CPU's kernels."""

    kernels: tuple[str, ...] = tuple(KERNELS)  # which, by name
    shapes: tuple[str, ...] = ()  # which maps, as 48x32x32; default: all that the architectures have
    batch_size: int = 512  # images of a map, or of a batch on the CPU
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the maps; weights are float32
    rounds: int = 40  # timed turns of each form
    data: Path = Path("data/beton")  # folder with the betons, for the CPU's part
    record: bool = False  # write the maps where ours won to kernels/measured.json
    out: Path | None = None  # JSON to write; default: print only

    def __post_init__(self) -> None:
        require(self, self.batch_size >= 1, "batch_size", "at least 1")
        require(self, self.rounds >= 30, "rounds", "at least 30")
        for name in self.kernels:
            if name not in KERNELS:
                raise unknown("kernel", name, KERNELS)
        known = {shape_name(shape) for name in self.kernels for shape in KERNELS[name].shapes}
        for shape in self.shapes:
            if shape not in known:
                raise unknown("map", shape, known)
        if not torch.cuda.is_available():
            given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
            if idle := sorted(given & {"kernels", "shapes", "dtype", "record"}):
                raise InputError(f"{', '.join(idle)}: for the Triton kernels on a CUDA device, and there is none: leave it out")


def main() -> None:
    """Measure, print, write."""
    options = tyro.cli(Options, prog="python bench/kernel_latency.py")
    console = Console(soft_wrap=True, highlight=False)
    device = choose_device("auto")
    set_up_process(device, deterministic=False)
    facts = environment(device)
    if device.type == "cuda":
        measurements = gpu_part(options, device, console)
        results: dict[str, Any] = {"kernels": [each.to_json() for each in measurements]}
        results["clocks_after"] = environment(device)["clocks"]
        if options.record:
            record(MEASURED, facts["hardware"], measurements)
    else:
        console.print("no CUDA device: the Triton kernels are not timed, what runs on the CPU follows")
        results = {"cpu": cpu_part(options, console)}
    if options.out is not None:
        write_json(options.out, results | facts)


def gpu_part(options: Options, device: torch.device, console: Console) -> list[Measurement]:
    """Measure the chosen kernels on the chosen maps, a table after each kernel."""
    measurements = []
    for name in options.kernels:
        mine = measure_kernel(KERNELS[name], options, device)
        refused = ((each.shape, form, reason) for each in mine for form, reason in each.refused.items())
        for shape, form, reason in dict.fromkeys(refused):
            console.print(f"{name} {shape}: {form} is not timed: {reason}", style="yellow")
        console.print(latency_table(mine))
        measurements += mine
    return measurements


def measure_kernel(row: KernelRow, options: Options, device: torch.device) -> list[Measurement]:
    """One kernel on its maps."""
    settings: dict[str, Any] = {"batch": options.batch_size, "dtype": DTYPE_NAMES[options.dtype], "rounds": options.rounds}
    measurements = []
    for shape in row.shapes:
        if not options.shapes or shape_name(shape) in options.shapes:
            measurements += measure(row, shape, peers_of(row), CudaStopwatch(), device=device, **settings)
            torch.cuda.empty_cache()  # the graphs' pools
    return measurements


def latency_table(measurements: list[Measurement]) -> Table:
    """A line for each map, direction and cache state; microseconds of one call, median and 10th to 90th percentile."""
    caption = "one call, median of rounds (10-90 %); ratio: best peer's time over ours, 95 % interval; green: beats every peer"
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption=caption)
    for heading in ("kernel", "map", "direction", "cache"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ours us", "best peer", "its us", "ratio", "of copy", "launches", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in measurements:
        peer, speedup, share = each.best_peer, each.speedup, each.share_of_copy
        table.add_row(
            each.kernel,
            each.shape,
            each.direction,
            each.cache,
            _microseconds(each.seconds.get(OURS)),
            peer or "-",
            _microseconds(each.seconds.get(peer or "")),
            str(speedup or "-"),
            "-" if share is None else f"{share:.0%}",
            _beside(each.launches.get(OURS), each.launches.get(peer or "")),
            _beside(*(_megabytes(each.peak_memory.get(name)) for name in (OURS, peer or ""))),
            style="green" if each.won else None,
        )
    return table


def _microseconds(seconds: list[float] | None) -> str:
    if seconds is None:
        return "-"
    low, high = np.percentile(seconds, [10, 90])
    return f"{median(seconds) * 1e6:.1f} ({low * 1e6:.1f}-{high * 1e6:.1f})"


def _megabytes(size: int | None) -> int | None:
    return None if size is None else round(size / 1e6)


def _beside(ours: int | None, peer: int | None) -> str:
    return " / ".join("-" if value is None else str(value) for value in (ours, peer))


def record(path: Path, device_name: str, measurements: Iterable[Measurement]) -> None:
    """Write dtype and map where ours won, cold, in each direction, into measured.json; what was not measured now stays."""
    known: dict[str, dict[str, list[str]]] = read_json(path, remedy="delete it") if path.exists() else {}
    wins = known.setdefault(device_name, {})
    short = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPE_NAMES.items()}
    cold = ((each.kernel, f"{short[each.dtype]} {each.shape}", each.won) for each in measurements if each.cache == "cold")
    for (kernel, entry), each in groupby(sorted(cold), key=lambda one: one[:2]):
        kept = set(wins.get(kernel, ())) - {entry}
        wins[kernel] = sorted(kept | {entry} if all(won for _, _, won in each) else kept)
    write_json(path, known)


def cpu_part(options: Options, console: Console) -> dict[str, Any]:
    """The augmentation on the CPU: our loops beside PyTorch's, torchvision's and FFCV's. Raises InputError if they differ."""
    data, _ = load_resident(options.data / "train.beton", torch.device("cpu"), limit=CHECKED)
    for name in CPU_PIPELINES:
        check_pixels(PIPELINES[name], data)
    return {name: pipeline(name, options.data, options.batch_size, options.rounds, console) for name in CPU_PIPELINES}


def check_pixels(recipe: Augmentation, data: ResidentSet) -> None:
    """Raise InputError unless both forms that are timed show the pixels expected, into new memory and into used."""
    positions, mean, std = torch.arange(len(data.images)), torch.tensor(CIFAR10_MEAN), torch.tensor(CIFAR10_STD)
    settings: dict[str, Any] = {
        "padding": recipe.crop_padding, "flip": recipe.flip, "reflect": recipe.crop_mode == "reflect", "cutout": recipe.cutout,
    }  # fmt: skip
    images, labels, index = data.images.numpy(), data.labels.numpy(), data.index.numpy()
    batch, loop = None, None
    for epoch in range(2):  # the second overwrites the first
        expected, its_labels = augment_numpy(
            images, labels, index, positions.numpy(), epoch, 0, mean=mean.numpy(), std=std.numpy(), **settings
        )
        batch = augment(
            data.images, data.labels, positions, 0, epoch, 0, batch_size=len(positions), index=data.index, mean=mean, std=std,
            out=batch, **settings,
        )  # fmt: skip
        drawn = augmentation.draw(recipe, data.index, 0, epoch)
        plain = augmentation.augment(recipe, data.images, positions, drawn, mean, std, "torch")
        loop = augmentation.augment(recipe, data.images, positions, drawn, mean, std, "numba", loop)
        if not (torch.equal(batch[0], torch.from_numpy(expected).bfloat16()) and np.array_equal(batch[1].numpy(), its_labels)):
            raise InputError("kernels.augment does not show NumPy's pixels on this machine: not timed; please report it")
        if not torch.equal(loop, plain):
            raise InputError("Numba's loop does not show PyTorch's pixels on this machine: not timed; please report it")


if __name__ == "__main__":
    run_command(main)
