#!/usr/bin/env python3
"""Betons enter; images per second of input pipelines and of the training step against their peers, and seconds to the
first step, leave as JSON.

python bench/pipeline.py --data data/beton --out bench/results/cpu/pipeline.json
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from torch import nn

from bench.input_pipelines import PIPELINES, measure
from bench.loops import build_step
from bench.timing import interleaved, synchronise
from fastcifar.dataset import epoch_order, load_splits
from fastcifar.device import choose_device, set_up_process
from fastcifar.errors import require, run_command, unknown
from fastcifar.files import write_json
from fastcifar.models import build_model
from fastcifar.recipes import RunOptions, reported
from fastcifar.run_folder import environment_facts
from fastcifar.state import build_state
from fastcifar.step import EpochTally, TrainStep

OURS, TORCH, PLAIN = "fastcifar", "--kernels torch", "eager fp32 NCHW"


@dataclass(frozen=True)
class Options:
    """Measure input pipelines, the training step and the start of a run on this machine."""

    data: Path = Path("data/beton")  # folder with the betons
    arch: str = "se_resnet18"  # architecture, trained by its own recipe
    batch_size: int = 256  # images per step
    rounds: int = 12  # timed turns of each peer
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


def main() -> None:
    """Measure, print, write."""
    options = tyro.cli(Options, prog="python bench/pipeline.py")
    console = Console(soft_wrap=True, highlight=False)
    device = choose_device("auto")
    set_up_process(device, deterministic=True)
    results: dict[str, Any] = {}
    if options.input:
        results["input"] = {
            name: measure(name, options.data, options.input_batch_size, options.rounds, console) for name in options.pipelines
        }
    if options.step:
        results["step"] = training_step(options, device)
        for line in step_lines(results["step"]):
            console.print(line)
    if options.starts:
        results["first_step"] = time_to_first_step(options)
        seconds = results["first_step"]["seconds"]
        spread = f"({min(seconds):.2f}-{max(seconds):.2f}, {len(seconds)} starts)"
        console.print(f"{'first step after':>16}: {median(seconds):.2f} s {spread}")
    if options.out is not None:
        write_json(options.out, results | environment_facts(device))


def step_lines(step: dict[str, Any]) -> list[str]:
    """The training step's figures for people."""
    lines = []
    for name, rate in step["images_per_second"].items():
        spread = f"(10-90 %: {rate['p10']:,.0f}-{rate['p90']:,.0f}, {rate['rounds']} rounds)"
        lines.append(f"{name:>16}: {rate['median']:6,.0f} img/s {spread}")
    for name, key in (("speed-up", "speedup"), ("auto over torch", "speedup_of_auto_over_torch")):
        ratio = step[key]
        lines.append(f"{name:>16}: {ratio['median']:.2f}x, 95 % interval {ratio['low']:.2f}-{ratio['high']:.2f}")
    return lines


def training_step(options: Options, device: torch.device) -> dict[str, Any]:
    """Time our whole step (augmentation, forward, backward, update) against the same model in eager float32 NCHW.

    The plain peer gets its batch for nothing: a ready float32 tensor, no augmentation, so that only the step is compared.
    """
    peers: dict[str, Callable[[], object]] = {
        OURS: our_step(options, device, "auto"),
        TORCH: our_step(options, device, "torch"),
        PLAIN: plain_step(options, device),
    }
    timings = interleaved(peers, rounds=options.rounds, warmup=2)
    speedup = timings.speedup(OURS, PLAIN)
    return {
        "arch": options.arch,
        "batch_size": options.batch_size,
        "images_per_second": {name: timings.rate(name, options.batch_size) for name in peers},
        "speedup": vars(speedup),
        "speedup_of_auto_over_torch": vars(timings.speedup(OURS, TORCH)),
        "seconds": timings.seconds,
    }


def our_step(options: Options, device: torch.device, kernels: Literal["auto", "torch"]) -> Callable[[], None]:
    """A closure that runs one step of the real training path."""
    recipe, run = reported(options.arch).recipe, RunOptions(data=options.data, max_parameters=0, kernels=kernels)
    data = load_splits(options.data, device, limit_train=0, limit_test=0, val_fraction=0.0, seed=0, verify=True)
    state = build_state(options.arch, recipe, run, data, device)
    step = build_step(state, recipe, run, data, TrainStep)
    positions = epoch_order(data.train.index, 0, 0)[: options.batch_size]
    plan = step.plan(0, 1, progress=0.0)
    tally = EpochTally(torch.zeros(1, device=device), torch.zeros((), dtype=torch.int64, device=device))

    def run_once() -> None:
        step(positions, 0, 0.01, plan, tally)
        synchronise(device)

    return run_once


def plain_step(options: Options, device: torch.device) -> Callable[[], None]:
    """A closure that runs one step as an ordinary PyTorch script does: eager, float32, NCHW, foreach SGD."""
    recipe = reported(options.arch).recipe
    head, block = recipe.head_dropout, recipe.block_dropout
    model: nn.Module = build_model(options.arch, head_dropout=head, block_dropout=block, kernels="torch").to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(options.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (options.batch_size,), device=device)

    def run_once() -> None:
        loss = F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise(device)

    return run_once


def time_to_first_step(options: Options) -> dict[str, Any]:
    """Start the training command several times; return the seconds from the process's beginning to its first step's end."""
    seconds = []
    for _ in range(options.starts):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [
                sys.executable, "-m", "fastcifar.train", "--arch", options.arch, "--data", str(options.data), "--out", str(out),
                "--epochs", "1", "--batch-size", "128", "--limit-train", "128", "--limit-test", "2", "--no-plots",
            ]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
            record = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
            seconds.append(record["first_step_seconds"])
        time.sleep(0.5)
    return {"arch": options.arch, "seconds": seconds, "median": median(seconds)}


if __name__ == "__main__":
    run_command(main)
