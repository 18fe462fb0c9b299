"""What people see of a run: its first and last lines, the bar, a line an epoch, and `summary.json`."""

import math
import time
from statistics import median
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fastcifar.command import Command
from fastcifar.dataset import Splits
from fastcifar.evaluate import warn_synthetic
from fastcifar.measuring import totals
from fastcifar.models import count_parameters
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
    for warning in data.warnings:
        console.print(f"warning: {warning}", style="yellow")
    claim = f", which claims {row.claim}" if row.claim else ""
    console.print(f"{state.arch}, {count_parameters(state.model):,} parameters; {row.source}{claim}")
    sizes = f"{len(data.train):,} training and {len(data.test):,} test images"
    console.print(f"{data.manifest.name}: {sizes}; best.pt is chosen on {CHOSEN_ON[data.select_name]}")
    how = [data.mean.device.type, "fp32" if dtype is None else "bf16 autocast", "channels_last"]
    modes = {"default": "compiled", "tuned": "compiled tuned", "combo": "compiled with combined kernels"}
    how += [modes[command.run.compile_mode or "default"]] if command.run.compile else []
    how += [f"{state.world.size} processes"] if state.world.size > 1 else []
    how += ["batch norm over all, by PyTorch's operations, uncompiled"] if command.run.sync_bn and state.world.size > 1 else []
    epochs = f"{recipe.epochs} epochs" if not command.run.stop_after else f"{command.run.stop_after} of {recipe.epochs} epochs"
    console.print(f"{', '.join(how)}; {epochs} of batch {recipe.batch_size}; into {folder.path}")
    if state.epoch or state.within:
        step = f", step {state.within.step:,} of the next" if state.within else ""
        console.print(f"going on after epoch {state.epoch}{step}")


def summarise(
    command: Command, data: Splits, state: TrainingState, rows: list[Metrics], dtype: torch.dtype | None
) -> dict[str, Any]:
    """Measure the final weights on the test set, plainly and with horizontal flip, and gather the figures of the run."""
    recipe, row = command.settings, reported(command.recipe_name)
    final = state.measure(data, data.test, command.run.eval_batch_size, dtype)
    flipped = state.measure(data, data.test, command.run.eval_batch_size, dtype, tta="flip")
    trained = [weight for group in state.optimizer.param_groups for weight in group["params"]]  # also what is frozen since
    return {
        "arch": state.arch,
        "parameters": sum(weight.numel() for weight in trained),
        "data": data.manifest.name,
        "synthetic": data.manifest.synthetic,
        "data_sha256": list(data.sha256),
        "recipe_source": row.source,
        "reported": row.claim,
        "epochs": recipe.epochs,
        "epochs_trained": state.epoch,
        "train_images": len(data.train),
        "seed": command.run.seed,
        "final": final.to_dict(data.manifest.class_names),
        "final_flip_tta_top1": flipped.top1,
        "best_accuracy": state.best_accuracy if state.best_epoch else None,  # None: stopped before any evaluation
        "best_epoch": state.best_epoch,
        "eval_tta": recipe.eval_tta,
        "best_chosen_on": CHOSEN_ON[data.select_name],
        "images_per_second": median(record["images_per_second"] for record in rows),
        "train_seconds": sum(record["train_seconds"] for record in rows),
        "eval_seconds": sum(record["eval_seconds"] or 0.0 for record in rows),
        "first_step_seconds": rows[0]["first_step_seconds"],
        **totals(rows),
        "precision": "fp32" if dtype is None else "bf16",
        "class_names": data.manifest.class_names,
    }


def report_end(console: Console, summary: dict[str, Any], folder: RunFolder) -> None:
    """The last lines: what came out and where it is."""
    final = summary["final"]
    console.print(
        f"test accuracy {final['top1']:.2%} (top-5 {final['top5']:.2%}, "
        f"with horizontal flip {summary['final_flip_tta_top1']:.2%}), "
        f"trained in {clock(summary['train_seconds'])} at {summary['images_per_second']:,.0f} img/s"
    )
    warn_synthetic(console, summary["synthetic"], summary["data"])
    if summary["epochs_trained"] < summary["epochs"]:
        console.print(
            f"stopped after epoch {summary['epochs_trained']} of {summary['epochs']}; go on with: "
            f"python -m fastcifar.train --resume {folder.path}"
        )
    console.print(f"checkpoints, figures and plots: {folder.path}")


class TrainingProgress:
    """Shows a run to whoever watches it; use as a context manager around the loop.

    In a notebook the bar is drawn by the thread that trains: rich's own thread swallows what is printed meanwhile.
    """

    REDRAWN_EVERY = 0.5  # seconds, in a notebook

    def __init__(self, console: Console, epochs: int, done_epochs: int, images_per_epoch: int) -> None:
        self.console, self.epochs = console, epochs
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.images_per_epoch = images_per_epoch
        total = epochs * images_per_epoch
        self.task = self.bar.add_task("training", total=total, completed=done_epochs * images_per_epoch, rate="")
        self.display_handle: Any = None  # of a notebook
        self.redrawn = -math.inf

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        if self.console.is_jupyter:
            from IPython.display import display

            self.display_handle = display(self.bar, display_id=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()
        if self.display_handle:
            self.display_handle.update(self.bar)

    def advance(self, images: int) -> None:
        """Count trained images; steps are counted when they are launched, so a GPU is never waited for."""
        self.bar.advance(self.task, images)
        if self.display_handle and time.monotonic() - self.redrawn > self.REDRAWN_EVERY:
            self.redrawn = time.monotonic()
            self.display_handle.update(self.bar)

    def epoch(self, record: dict[str, Any], seconds_left: float) -> None:
        """Print an epoch's line, which stays."""
        self.bar.update(
            self.task,
            completed=record["epoch"] * self.images_per_epoch,
            rate=f"{record['images_per_second']:,.0f} img/s",
        )
        self.console.print(epoch_line(record, self.epochs, seconds_left))


def epoch_line(record: dict[str, Any], epochs: int, seconds_left: float) -> str:
    """One line of what an epoch did; evaluation's part only where it was evaluated."""
    width = len(str(epochs))
    parts = [
        f"epoch {record['epoch']:>{width}}/{epochs}",
        f"train loss {record['train_loss']:.3f} acc {record['train_accuracy']:6.2%}",
    ]
    if record["eval_accuracy"] is not None:
        measured = f"{record['eval_split']} loss {record['eval_loss']:.3f} acc {record['eval_accuracy']:6.2%}"
        parts.append(f"{measured} best {record['best_accuracy']:6.2%}")
    counts = {"skipped steps": record.get("skipped_steps"), "loss spikes": record.get("loss_spikes")}
    parts += [f"{count:,} {what}" for what, count in counts.items() if count]
    parts.append(f"{record['images_per_second']:,.0f} img/s")
    parts.append("done" if record["epoch"] == epochs else f"left {clock(seconds_left)}")
    return " | ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
