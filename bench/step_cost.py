#!/usr/bin/env python3
"""What a training step costs before any GPU is asked: launches, bytes, host time, counted on a device that is not there.

python -m bench.step_cost --archs se_resnet18 --forms eager compiled triton --batch-size 512 --out step-cost.json
python -m bench.step_cost --archs se_resnet18 --forms eager captured --epoch

The project's own step by each architecture's recipe on black images. `bench.counting_device` says what is
counted and how. Share of the roofline: time of the step at the stated rates if every kernel moved its fewest bytes, over the
same with the bytes counted here; convolutions, each bound by arithmetic or bytes, are the same in both (bench/roofline.py).
Launches count for nothing in it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Column, Table

from bench.counting_device import environment
from bench.roofline import Rates, cost_of_arch
from fastcifar.arguments import parse_arguments
from fastcifar.errors import InputError, require, run_command, unknown
from fastcifar.files import write_json
from fastcifar.models import ARCHITECTURES, architecture
from fastcifar.plan import PLANS

# {name: the options of training that make it}: the plans without capture, and the default with it
FORMS: dict[str, dict[str, Any]] = {name: vars(replace(plan, capture="off")) for name, plan in PLANS["cuda"].items()}
FORMS["captured"] = vars(PLANS["cuda"]["compiled"])
TIMEOUT = 1800  # seconds for the forms of one architecture


@dataclass(frozen=True)
class Options:
    """Count what a training step launches, moves and waits for, on a device that is not there."""

    archs: tuple[str, ...] = tuple(ARCHITECTURES)  # which, by name
    forms: tuple[str, ...] = tuple(FORMS)  # the names of `--plan` for CUDA, uncaptured; captured: compiled, captured
    batch_size: int = 512  # images a step; --epoch: each recipe's own
    epoch: bool = False  # count a steady epoch of the training command instead, evaluation and checkpoint included
    host_time: bool = False  # compile every kernel too, and time what the host spends on a step: to compare forms in one run by
    top: int = 10  # kernels listed of each form, largest first, 0..10
    flops: float = 790e12  # floating-point operations per second of the roofline; default: an H200's
    bandwidth: float = 4.3e12  # bytes per second of the roofline, reads and writes together; default: an H200's
    out: Path | None = None  # JSON to write

    def __post_init__(self) -> None:
        for arch in self.archs:
            architecture(arch)
        for form in self.forms:
            if form not in FORMS:
                raise unknown("form", form, FORMS)
        require(self, self.batch_size >= 2, "batch_size", "at least 2")
        require(self, 0 <= self.top <= 10, "top", "0..10")
        require(self, self.flops > 0, "flops", "above 0 per second")
        require(self, self.bandwidth > 0, "bandwidth", "above 0 bytes per second")


def count_steps(
    arch: str, forms: tuple[str, ...], batch_size: int, *, host_time: bool = False, rates: Rates | None = None
) -> dict[str, dict[str, Any]]:
    """{form: counts of one step}, or {"error": why there are none}. Raises InputError where there is no counting device.

    rates: of the roofline; default: an H200's.
    """
    rates = rates or Rates(Options.flops, Options.bandwidth)
    counted = _count(arch, forms, batch_size=batch_size, host_time=host_time, epoch=False)
    for counts in counted.values():
        if "error" not in counts:
            counts["roofline_share"] = roofline_share(arch, counts["pointwise_bytes"] / batch_size, rates)
    return counted


def count_epochs(arch: str, forms: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The same of a steady epoch of training."""
    return _count(arch, forms, epoch=True)


def _count(arch: str, forms: tuple[str, ...], **wanted: Any) -> dict[str, dict[str, Any]]:
    wanted |= {"arch": arch, "forms": {form: FORMS[form] for form in forms}}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts.json"
        try:
            done = subprocess.run(
                [sys.executable, "-m", "bench.counting_device", str(out)],
                cwd=Path(__file__).parents[1], env=os.environ | environment(), input=json.dumps(wanted),
                capture_output=True, text=True, check=False, timeout=TIMEOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise InputError(f"{arch} was not counted within {TIMEOUT} seconds: give fewer --forms") from None
        if not out.exists():
            raise InputError(f"{arch} was not counted: {(done.stderr.strip().splitlines() or ['it ended without a word'])[-1]}")
        counted = json.loads(out.read_text(encoding="utf-8"))
    return {form: counted[form] for form in forms}


def roofline_share(arch: str, pointwise_bytes: float, rates: Rates) -> float:
    """0..1, 1 for the fewest bytes. pointwise_bytes: that an image's step moves between the convolutions."""
    cost = cost_of_arch(arch)
    ideal = 1 / cost.images_per_second(rates)
    fewest = cost.parts[-1][1]  # of what stands between the convolutions
    return ideal / (ideal + (pointwise_bytes - fewest) / rates.bytes_per_second)


STEP = ("launches", "host ms*", "KB/img", "roofline", "breaks", "copies", "casts", "syncs", "pageable")
EPOCH = ("steps", "graphs", "launches", "syncs", "pageable", "MB to the host")


def step_cells(counts: dict[str, Any], batch_size: int) -> list[str]:
    """What stands under the heads `STEP`."""
    host = "-" if counts["host_ms"] is None else f"{counts['host_ms']:.1f}"
    moved = f"{counts['pointwise_bytes'] / batch_size / 1e3:,.0f}"
    waits = (str(counts[name]) for name in ("graph_breaks", "layout_copies", "casts", "syncs", "pageable_copies"))
    return [str(counts["launches"]), host, moved, f"{counts['roofline_share']:.0%}", *waits]


def epoch_cells(counts: dict[str, Any]) -> list[str]:
    """What stands under the heads `EPOCH`."""
    numbers = [f"{counts[name]:,}" for name in ("steps", "graphs", "launches", "syncs", "pageable_copies")]
    return [*numbers, f"{counts['bytes_to_host'] / 1e6:.1f}"]


def table_of(
    title: str, heads: tuple[str, ...], counted: dict[str, dict[str, Any]], cells: Callable[[dict[str, Any]], list[str]]
) -> Table:
    """A row a form."""
    columns = (Column(head, justify="right") for head in heads)
    table = Table(Column("form", no_wrap=True), *columns, title=title, box=None, padding=(0, 2, 0, 0))
    for form, counts in counted.items():
        table.add_row(form, *([counts["error"]] if "error" in counts else cells(counts)))
    return table


def main() -> None:
    """Count, print a table an architecture and each form's largest kernels."""
    options = parse_arguments(Options, "python -m bench.step_cost")
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 120)
    rates, batch_size = Rates(options.flops, options.bandwidth), options.batch_size
    rows: list[dict[str, Any]] = []
    for arch in options.archs:
        if options.epoch:
            counted = count_epochs(arch, options.forms)
            console.print(table_of(f"{arch}, one epoch", EPOCH, counted, epoch_cells))
        else:
            counted = count_steps(arch, options.forms, batch_size, host_time=options.host_time, rates=rates)
            title = f"{arch}, batch {batch_size}, one step"
            console.print(table_of(title, STEP, counted, partial(step_cells, batch_size=batch_size)))
        for form, counts in counted.items():
            rows.append({"arch": arch, "form": form} | ({} if options.epoch else {"batch_size": batch_size}) | counts)
            largest = [f"{e['kernel']} {e['bytes'] / batch_size / 1e3:,.0f}" for e in counts.get("largest", [])]
            if largest[: options.top]:
                console.print(f"  {form}, KB/img: {'; '.join(largest[: options.top])}", markup=False)
        if options.out is not None:  # after each: the next may take minutes
            versions = {"torch": str(torch.__version__), "triton": triton.__version__}
            facts = {"command": ["python", "-m", "bench.step_cost", *sys.argv[1:]], "versions": versions}
            rates_json = {"flops_per_second": rates.flops_per_second, "bytes_per_second": rates.bytes_per_second}
            write_json(options.out, facts | {"rates": rates_json, "rows": rows})
    if options.host_time:
        console.print("* the fastest of 20 steps on this machine's CPU: compare forms within a run, not with a GPU's host")


if __name__ == "__main__":
    run_command(main)
