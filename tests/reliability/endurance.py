"""Trains, resumes and evaluates again and again in one process; memory, threads and open files must stay as they are.

python -m tests.reliability.endurance --minutes 60 --out endurance.json
"""

import gc
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
from rich.console import Console

from data_prep import write_beton
from fastcifar import evaluate
from fastcifar.arguments import parse_arguments
from fastcifar.command import parse_command
from fastcifar.errors import InputError, require
from fastcifar.models import ARCHITECTURES
from fastcifar.train import train
from tests.conftest import write_cifar_pickles
from tests.reliability.soak import NARROW, RECIPE

GROWTH = 0.03  # of the resident set, from the first quarter's median to the last's, that is still called flat


@dataclass(frozen=True)
class Options:
    """Go on for so long."""

    minutes: float = 60.0  # of training, resuming and evaluating
    out: Path | None = None  # JSON with the figures

    def __post_init__(self) -> None:
        require(self, self.minutes > 0, "minutes", "above 0")


def main() -> None:
    """Run, print the figures, exit 1 when something grew."""
    options = parse_arguments(Options, "python -m tests.reliability.endurance")
    folder = Path(tempfile.mkdtemp(prefix="endurance-"))
    figures = endure(folder, options.minutes * 60)
    shutil.rmtree(folder)
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(not figures["flat"])


def endure(folder: Path, seconds: float) -> dict[str, Any]:
    """Rounds of: train two of four epochs, resume to the end, evaluate with six views, refuse a second start."""
    ARCHITECTURES["narrow"] = NARROW
    sys.argv = ["write_beton.py", "--source", str(write_cifar_pickles(folder / "pickles")), "--out", str(folder / "betons")]
    write_beton.main()
    quiet, process = Console(quiet=True), psutil.Process()
    line = [*RECIPE.split(), "--data", str(folder / "betons"), "--out", str(folder / "run")]
    samples: list[tuple[int, int, int]] = []  # bytes, threads, open files, after each round
    began = time.monotonic()
    while not samples or time.monotonic() - began < seconds:
        run = train(parse_command([*line, "--stop-after", "2", "--no-plots"]), quiet)
        train(parse_command(["--resume", str(run.path)]), quiet)
        evaluate.measure(evaluate.Options(run.best, data=folder / "betons", tta="flip_translate"))
        try:
            train(parse_command(line), quiet)
        except InputError:
            shutil.rmtree(run.path)
        gc.collect()
        samples.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
    quarter = max(1, len(samples) // 4)
    first, last = (tuple(map(median, zip(*part, strict=True))) for part in (samples[:quarter], samples[-quarter:]))
    flat = last[0] <= first[0] * (1 + GROWTH) and last[1:] <= first[1:]
    names = ("resident_bytes", "threads", "open_files")
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "rounds": len(samples),
        "first_quarter": dict(zip(names, first, strict=True)),
        "last_quarter": dict(zip(names, last, strict=True)),
        "highest": dict(zip(names, map(max, zip(*samples, strict=True)), strict=True)),
        "flat": flat,
    }


if __name__ == "__main__":
    main()
