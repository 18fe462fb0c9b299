#!/usr/bin/env python3
"""Exports the checkpoints of run folders in fp32, bf16 and int8, and prints what became of accuracy, size and latency.

python bench/exports.py runs/* --out docs/exports.md --threads 1

Each file is run on the whole test set and timed in turns with the original by `fastcifar.export`; none of them is kept.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from fastcifar import files
from fastcifar.ahead import DATA
from fastcifar.arguments import parse_arguments
from fastcifar.errors import InputError, require, run_command
from fastcifar.export import LATENCY, Options, export
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
    if command.threads:
        torch.set_num_threads(command.threads)
    heads = ["variant", "epochs", "as", "top-1", "logits differ by", "MB", *(f"ms, batch {count}" for count in LATENCY)]
    lines = [f"| {' | '.join(heads)} |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]
    print(*lines, sep="\n")
    for run in command.runs:
        for row in rows(command, run / "best.pt"):
            lines.append(row)
            print(row, flush=True)
    lines.append("\n" + ", ".join(f"{name} {version}" for name, version in installed("torch", "onnxruntime").items()))
    if command.out:
        files.write_bytes(command.out, "\n".join([*lines, ""]).encode())


def rows(command: Command, checkpoint: Path) -> list[str]:
    """The table's rows of one run: the checkpoint itself, then each export."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, how in EXPORTS.items():
            out = Path(folder) / name
            result = export(Options(checkpoint, out=out, data=command.data, limit_test=command.limit_test, **how))
            original, exported = result["rows"]
            about = (result["arch"], str(result["epoch"]))
            if not lines:
                lines.append(table_row(*about, "PyTorch fp32", original, original["largest"]))
            lines.append(table_row("", "", name, exported, original["largest"]))
    return lines


def table_row(arch: str, epochs: str, name: str, tried: dict[str, Any], largest: float) -> str:
    """One row of Markdown; a difference is also given as a share of the original's largest logit."""
    difference = f"{tried['difference']:.2g} ({tried['difference'] / largest:.1%})" if tried["difference"] else "-"
    figures = [f"{tried['accuracy']:.2%}", difference, f"{tried['megabytes']:.1f}"]
    figures += [f"{value:.1f}" for value in tried["milliseconds"].values()]
    return f"| {' | '.join([arch, epochs, name, *figures])} |"


if __name__ == "__main__":
    run_command(main)
