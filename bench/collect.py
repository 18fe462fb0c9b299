"""A folder's finished parts enter (cells, ladder, peers, ablations); `results.json` and the reports made of it leave.

header.json    environment, data, settings, variants: what the parts have in common
settings.json  what defines its cells, ladder and peers: other settings are refused
cells/KEY.json, ladder.json, peers.json    each written once, when finished
ablations/NAME/{settings.json, cells/KEY.json, ablation.json}
results.json, report.md, report.html    made of all these, again and again
"""

import os
import platform
import subprocess
from dataclasses import asdict, astuple, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from rich.console import Console

from bench.roofline import Rates, cost_of_arch, measure_rates
from bench.schema import Ablation, Cell, Ladder, Peers, Results, Variant, from_json, write_results
from fastcifar import files
from fastcifar.dataset import Splits
from fastcifar.errors import InputError
from fastcifar.models import ARCHITECTURES
from fastcifar.recipes import reported
from fastcifar.run_folder import environment_facts

HEADER = "header.json"
AGAIN = "delete it, and the same command makes it again"
Part = TypeVar("Part")


def open_header(out: Path, device: torch.device, data: Splits, archs: list[str], settings: dict[str, Any]) -> Results:
    """Write or complete `header.json`; return it as results without parts. The device's two rates are measured here."""
    now = environment(device)
    header = Results(environment=now, data=describe(data), settings=settings)
    if (out / HEADER).exists():
        before = from_json(Results, files.read_json(out / HEADER, remedy=AGAIN), str(out / HEADER))
        both = {name: _joined(before.environment.get(name), now[name], " && ") for name in ("command", "commit")}
        header = replace(before, environment=before.environment | both, settings=before.settings | settings)
    rates = measure_rates(device)
    if "rates" in header.environment:  # a ceiling is the most that was ever seen: at another time the machine may be busier
        before_rates = Rates(**header.environment["rates"])
        rates = Rates(*(max(pair) for pair in zip(astuple(before_rates), astuple(rates), strict=True)))
    header.environment["rates"] = asdict(rates)
    known = {variant.arch for variant in header.variants} | set(archs)
    header = replace(header, variants=[variant_of(arch, rates) for arch in ARCHITECTURES if arch in known])
    files.write_json(out / HEADER, asdict(header))
    return header


def _joined(before: Any, now: Any, separator: str) -> Any:
    """Both values where they differ, as one string."""
    parts = str(before).split(separator) if before else []
    return separator.join([*parts, *([] if now is None or str(now) in parts else [str(now)])]) or None


def variant_of(arch: str, rates: Rates) -> Variant:
    """What an architecture costs, and its ceiling at the device's rates."""
    cost, row = cost_of_arch(arch), ARCHITECTURES[arch]
    return Variant(
        arch, row.report, row.parameters, cost.flops, cost.bytes, reported(arch).claim, cost.images_per_second(rates)
    )


def describe(data: Splits) -> dict[str, Any]:
    """Which data the figures are of."""
    manifest, (train, test) = data.manifest, data.sha256
    return {
        "name": manifest.name,
        "official": manifest.official,
        "synthetic": manifest.synthetic,
        "sha256": {"train": train, "test": test},
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit, command; clocks, load and threads as they are now."""
    facts = environment_facts(device) | {
        "device": device.type,
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,  # bytes
        "load": list(os.getloadavg()),
        "clocks": _cpu_clock(),
    }
    if device.type == "cuda":
        facts |= {"gpu_memory": torch.cuda.get_device_properties(device).total_memory, "cuda": torch.version.cuda}
        facts["clocks"] = _gpu_clocks()
    return facts


def _cpu_clock() -> str | None:
    frequency = psutil.cpu_freq()
    return f"{frequency.current:.0f} MHz" if frequency else None


def _gpu_clocks() -> str | None:
    """Graphics and memory clock, power limit and driver as nvidia-smi tells them."""
    query = "clocks.gr,clocks.mem,clocks.max.gr,power.limit,driver_version"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{query}: {told.stdout.strip()}"


def read_part(path: Path, kind: type[Part], console: Console) -> Part | None:
    """A finished part; None when it is not there, or is broken, which a line says: it is left out, or made again."""
    if not path.exists():
        return None
    try:
        return from_json(kind, files.read_json(path, remedy="left out"), str(path))
    except InputError as error:
        console.print(str(error), style="yellow")
        return None


def collect(out: Path, console: Console) -> Results:
    """Make `results.json` and the reports of all that is finished in `out`. A broken cell is left out, with a line."""
    header = from_json(Results, files.read_json(out / HEADER, remedy=AGAIN), str(out / HEADER))
    cells = [cell for path in sorted((out / "cells").glob("*.json")) if (cell := read_part(path, Cell, console)) is not None]
    order = list(ARCHITECTURES)
    cells.sort(key=lambda cell: (order.index(cell.arch) if cell.arch in order else len(order), cell.arch, cell.seed, cell.key))
    ablations = [read_part(path, Ablation, console) for path in sorted(out.glob("ablations/*/ablation.json"))]
    results = replace(
        header,
        cells=cells,
        ladder=read_part(out / "ladder.json", Ladder, console),
        peers=read_part(out / "peers.json", Peers, console),
        ablations=[ablation for ablation in ablations if ablation is not None],
    )
    write_results(out / "results.json", results)
    from bench.report import write_reports  # here, since the workers of a benchmark do not need it

    try:
        write_reports(out, results)
    except Exception as error:  # whatever a report cannot show must not end hours of measuring
        console.print(f"no report: {type(error).__name__}: {error}; results.json is complete", style="yellow")
    return results
