#!/usr/bin/env python3
"""Exports the checkpoints of run folders in fp32, bf16 and int8, and prints what became of accuracy, size and speed.

python bench/exports.py runs/* --out docs/exports.md --threads 1

Each file is run on the test set and timed in turns with the original, as `fastcifar.export` does; none of them is kept.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from fastcifar import files
from fastcifar.ahead import DATA
from fastcifar.arguments import parse_arguments
from fastcifar.checkpoint import load
from fastcifar.dataset import load_resident
from fastcifar.device import device_name, set_up_process
from fastcifar.errors import InputError, require, run_command
from fastcifar.evaluate import require_same_kind
from fastcifar.export import CPU, LATENCY, Format, Options, Tried, quiet, tried, write
from fastcifar.versions import installed

EXPORTS: dict[str, dict[str, Any]] = {
    "ONNX fp32": {"to": "onnx"},
    "pt2 fp32": {"to": "pt2"},
    "pt2 bf16": {"to": "pt2", "bf16": True},
    "ONNX int8": {"to": "onnx", "int8": True},
}


@dataclass(frozen=True)
class Command:
    """Export run folders' best checkpoints in every precision and print a table in Markdown."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders
    data: Path = DATA  # folder with the betons
    out: Path | None = None  # Markdown file to write the table to as well
    limit_test: int = 0  # only the first so many test images, 0 = all
    threads: int = 0  # of the CPU; 0: PyTorch's number

    def __post_init__(self) -> None:
        require(self, self.threads >= 0, "threads", "0 or more")
        missing = [str(run) for run in self.runs if not (run / "best.pt").is_file()]
        if missing:
            raise InputError(f"{missing[0]} has no best.pt: name run folders of `python -m fastcifar.train`")


def main() -> None:
    """Export, print, and write the table."""
    command = parse_arguments(Command, "python bench/exports.py")
    set_up_process(CPU, deterministic=True)
    if command.threads:
        torch.set_num_threads(command.threads)
    heads = ["variant", "epochs", "as", "top-1", "logits differ by", "MB", *(f"speed, batch {count}" for count in LATENCY)]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---" + "|---:" * (len(heads) - 3) + "|"]
    print(*lines, sep="\n")
    for run in command.runs:
        for line in rows(command, run / "best.pt"):
            lines.append(line)
            print(line, flush=True)
    versions = ", ".join(f"{name} {version}" for name, version in installed("torch", "onnxruntime").items())
    lines.append(f"\n{device_name(CPU)}; {versions}")
    if command.out:
        files.write_bytes(command.out, "\n".join([*lines, ""]).encode())


def rows(command: Command, checkpoint: Path) -> Iterator[str]:
    """The table's rows of one run: the checkpoint itself, then its exports, all timed in turns."""
    original, (test, manifest) = load(checkpoint), load_resident(command.data / "test.beton", CPU, limit=command.limit_test)
    require_same_kind(checkpoint, original, command.data, test, manifest.class_names)
    with tempfile.TemporaryDirectory() as folder, quiet():
        made: dict[str, tuple[Path, Format]] = {}
        for name, how in EXPORTS.items():
            options = Options(checkpoint, data=command.data, **how)
            made[name] = Path(folder) / name, options.to
            write(made[name][0], options, test)
        first, *others = tried(original, "PyTorch fp32", made, test)
        yield table_row([original.arch, str(original.epoch)], first, first)
        yield from (table_row(["", ""], row, first) for row in others)


def table_row(about: list[str], row: Tried, first: Tried) -> str:
    """One row of Markdown. A difference is also given as a share of the original's largest logit, a speed as that over its."""
    difference = f"{row.difference:.2g} ({row.difference / first.largest:.1%})" if row is not first else "-"
    speeds = [f"{first.milliseconds[count] / row.milliseconds[count]:.2f}x" for count in LATENCY]
    return f"| {' | '.join([*about, row.name, f'{row.accuracy:.2%}', difference, f'{row.megabytes:.1f}', *speeds])} |"


if __name__ == "__main__":
    run_command(main)
