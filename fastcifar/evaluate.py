"""A checkpoint and a beton enter; top-1, top-5, loss, per-class accuracy and the confusion matrix leave.

python -m fastcifar.evaluate --checkpoint runs/se_resnet18-seed0/best.pt --tta flip
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fastcifar.checkpoint import load_model
from fastcifar.dataset import load_resident
from fastcifar.device import choose_device, choose_precision, set_up_process
from fastcifar.errors import InputError, require, run_command
from fastcifar.inference import TTA, evaluate
from fastcifar.summary import warn_synthetic


@dataclass(frozen=True)
class Options:
    """Measure a checkpoint on a split."""

    checkpoint: Path  # last.pt or best.pt of a run folder
    data: Path = Path("data/beton")  # folder with the betons
    split: Literal["test", "train"] = "test"  # which beton to measure on
    tta: TTA = "none"  # test-time augmentation: views whose softmax outputs are averaged
    limit: int = 0  # only the first so many images, 0 = all
    batch_size: int = 500  # images per batch
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the device computes in it
    json: bool = False  # print one JSON object instead of tables

    def __post_init__(self) -> None:
        require(self, self.limit >= 0, "limit", "0 or more")
        require(self, self.batch_size >= 1, "batch_size", "at least 1")


def main() -> None:
    """Measure and print."""
    options = tyro.cli(Options, prog="python -m fastcifar.evaluate")
    result = measure(options)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console(soft_wrap=True, highlight=False, markup=False))


def measure(options: Options) -> dict[str, Any]:
    """Return the figures as plain values. Raises InputError when checkpoint and data do not fit."""
    device = choose_device(options.device)
    set_up_process(device, deterministic=True)
    model, checkpoint = load_model(options.checkpoint, device)
    data, manifest = load_resident(options.data / f"{options.split}.beton", device, limit=options.limit)
    if manifest.class_names != checkpoint.class_names:
        raise InputError(
            f"{options.checkpoint} knows other classes ({', '.join(checkpoint.class_names[:3])}, ...) than "
            f"{options.data} ({', '.join(manifest.class_names[:3])}, ...): name the data it was trained on"
        )
    mean, std = (torch.tensor(values, device=device) for values in (checkpoint.mean, checkpoint.std))
    evaluation = evaluate(
        model,
        data,
        len(checkpoint.class_names),
        mean,
        std,
        batch_size=options.batch_size,
        tta=options.tta,
        autocast_dtype=choose_precision(options.precision, device),
    )
    return {
        "checkpoint": str(options.checkpoint),
        "arch": checkpoint.arch,
        "epoch": checkpoint.epoch,
        "data": manifest.name,
        "synthetic": manifest.synthetic,
        "split": options.split,
        "tta": options.tta,
        **evaluation.to_dict(checkpoint.class_names),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures for people."""
    warn_synthetic(console, result["synthetic"], result["data"])
    measured = f"{result['data']}, {result['split']} split, TTA {result['tta']}"
    console.print(f"{result['arch']} after epoch {result['epoch']}: {measured}")
    figures = f"top-5 {result['top5']:.2%}, loss {result['loss']:.4f}, {result['images']:,} images"
    console.print(f"top-1 {result['top1']:.2%}, {figures}")
    names = list(result["per_class"])
    caption = "rows: true class; columns: predicted class; images"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption=caption)
    table.add_column("class", no_wrap=True)
    table.add_column("accuracy", justify="right")
    if len(names) <= 20:
        for name in names:
            table.add_column(name[:5], justify="right")
    for name, row in zip(names, result["confusion"], strict=True):
        accuracy = result["per_class"][name]
        cells = [str(count) if count else "·" for count in row] if len(names) <= 20 else []
        table.add_row(name, "-" if accuracy is None else f"{accuracy:.1%}", *cells)
    console.print(table)


if __name__ == "__main__":
    run_command(main)
