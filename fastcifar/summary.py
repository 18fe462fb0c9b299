"""What people read at a run's start and end, and `summary.json`."""

from statistics import median
from typing import Any

import torch
from rich.console import Console

from fastcifar.command import Command
from fastcifar.dataset import Splits
from fastcifar.models import count_parameters
from fastcifar.progress import clock
from fastcifar.recipes import reported
from fastcifar.run_folder import Metrics, RunFolder
from fastcifar.state import TrainingState

CHOSEN_ON = {"test": "the test set (most reports' habit; optimistic)", "held-out": "images held out from training"}


def announce(
    console: Console, command: Command, data: Splits, state: TrainingState, folder: RunFolder, dtype: torch.dtype | None
) -> None:
    """Say what is about to happen."""
    recipe, row = command.settings, reported(command.recipe_name)
    warn_synthetic(console, data.manifest.synthetic, data.manifest.name)
    claim = f", which claims {row.claim}" if row.claim else ""
    console.print(f"{state.arch}, {count_parameters(state.model):,} parameters; {row.source}{claim}")
    sizes = f"{len(data.train):,} training and {len(data.test):,} test images"
    console.print(f"{data.manifest.name}: {sizes}; best.pt is chosen on {CHOSEN_ON[data.select_name]}")
    how = [data.mean.device.type, "fp32" if dtype is None else "bf16 autocast", "channels_last"]
    how += ["compiled"] if command.run.compile else []
    epochs = f"{recipe.epochs} epochs" if not command.run.stop_after else f"{command.run.stop_after} of {recipe.epochs} epochs"
    console.print(f"{', '.join(how)}; {epochs} of batch {recipe.batch_size}; into {folder.path}")
    if state.epoch:
        console.print(f"going on after epoch {state.epoch}")


def summarise(
    command: Command, data: Splits, state: TrainingState, rows: list[Metrics], dtype: torch.dtype | None
) -> dict[str, Any]:
    """Measure the final weights on the test set, plainly and with the mirror image, and gather the figures of the run."""
    recipe, row = command.settings, reported(command.recipe_name)
    final = state.measure(data, data.test, command.run.eval_batch_size, dtype)
    mirrored = state.measure(data, data.test, command.run.eval_batch_size, dtype, tta="flip")
    return {
        "arch": state.arch,
        "parameters": count_parameters(state.model),
        "data": data.manifest.name,
        "synthetic": data.manifest.synthetic,
        "recipe_source": row.source,
        "reported": row.claim,
        "epochs": recipe.epochs,
        "epochs_trained": state.epoch,
        "train_images": len(data.train),
        "seed": command.run.seed,
        "final": final.to_dict(data.manifest.class_names),
        "final_flip_tta_top1": mirrored.top1,
        "best_accuracy": state.best_accuracy,
        "best_epoch": state.best_epoch,
        "best_chosen_on": CHOSEN_ON[data.select_name],
        "images_per_second": median(record["images_per_second"] for record in rows),
        "train_seconds": sum(record["train_seconds"] for record in rows),
        "eval_seconds": sum(record["eval_seconds"] or 0.0 for record in rows),
        "first_step_seconds": rows[0]["first_step_seconds"],
        "precision": "fp32" if dtype is None else "bf16",
        "class_names": data.manifest.class_names,
    }


def report_end(console: Console, summary: dict[str, Any], folder: RunFolder) -> None:
    """The last lines: what came out and where it is."""
    final = summary["final"]
    console.print(
        f"test accuracy {final['top1']:.2%} (top-5 {final['top5']:.2%}, "
        f"with the mirror image {summary['final_flip_tta_top1']:.2%}), "
        f"trained in {clock(summary['train_seconds'])} at {summary['images_per_second']:,.0f} img/s"
    )
    warn_synthetic(console, summary["synthetic"], summary["data"])
    if summary["epochs_trained"] < summary["epochs"]:
        console.print(
            f"stopped after epoch {summary['epochs_trained']} of {summary['epochs']}; go on with: "
            f"python -m fastcifar.train --resume {folder.path}"
        )
    console.print(f"curves, confusion matrix and checkpoints: {folder.path}")


def warn_synthetic(console: Console, is_synthetic: bool, name: str) -> None:
    """The banner that must stand wherever a figure came from the stand-in."""
    if is_synthetic:
        console.print(name, style="bold yellow")
