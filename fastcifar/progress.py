"""Epoch records enter; a live bar on a terminal or plain lines elsewhere leave."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows a run to whoever watches it; use as a context manager around the loop."""

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

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def advance(self, images: int) -> None:
        """Count trained images; steps are counted when they are launched, so a GPU is never waited for."""
        self.bar.advance(self.task, images)

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
    parts.append(f"{record['images_per_second']:,.0f} img/s")
    parts.append("done" if record["epoch"] == epochs else f"left {clock(seconds_left)}")
    return " | ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
