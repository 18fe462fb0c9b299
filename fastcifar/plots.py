"""PNGs of runs that a paper could print: loss, accuracy, best so far, learning rate, and the confusion matrix.

python -m fastcifar.plots runs/a runs/b --out comparison      # several runs overlaid
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastcifar.arguments import parse_arguments
from fastcifar.errors import InputError, run_command
from fastcifar.files import atomic_path
from fastcifar.run_folder import RunFolder

# Okabe and Ito's palette: told apart with any colour vision, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "text.parse_math": False,  # a run's name may hold dollar signs
}
MAX_MARKED = 30  # epochs up to which every point gets a marker


@dataclass(frozen=True)
class Run:
    """What the plots need of one run."""

    label: str
    data_name: str
    rows: list[dict[str, Any]]  # metrics, one an epoch
    summary: dict[str, Any] | None  # None: the run has not finished


@dataclass(frozen=True)
class Options:
    """Draw loss, accuracy, best-so-far accuracy and learning rate against epoch, and the confusion matrix, as PNGs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders; several are overlaid
    out: Path | None = None  # folder for the PNGs; default: the run folder, or the current one for several runs

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no run folder was named: python -m fastcifar.plots RUN_DIR")


def main() -> None:
    """Draw the plots of the runs named on the command line."""
    options = parse_arguments(Options, "python -m fastcifar.plots")
    out = options.out or (options.runs[0] if len(options.runs) == 1 else Path())
    for path in draw([read_run(RunFolder(path)) for path in options.runs], out):
        print(path)


def read_run(folder: RunFolder) -> Run:
    """Read a run, finished or not. Raises InputError when the folder holds none."""
    arch, _, _, _ = folder.read_config()
    rows = folder.read_metrics()
    if not rows:
        raise InputError(f"{folder.path} has no finished epoch yet: nothing to draw")
    summary = folder.read_summary() if (folder.path / "summary.json").exists() else None
    data_name = rows[-1].get("data_name", "")
    name = folder.path.resolve().name
    label = name if name.startswith(arch) else f"{name} ({arch})"
    return Run(label, data_name, rows, summary)


def draw(runs: list[Run], out: Path) -> list[Path]:
    """Write every plot into `out` and return the paths; runs of the same name are numbered."""
    labels = [run.label for run in runs]
    runs = [
        replace(run, label=f"{run.label} #{number}") if labels.count(run.label) > 1 else run
        for number, run in enumerate(runs, start=1)
    ]
    figures: dict[str, Callable[[list[Run]], Figure]] = {
        "loss.png": loss_figure,
        "accuracy.png": accuracy_figure,
        "best_accuracy.png": best_figure,
        "learning_rate.png": learning_rate_figure,
    }
    with mpl.rc_context(STYLE):
        written = [save(out / name, make(runs)) for name, make in figures.items()]
        for run in runs:
            if run.summary is not None and run.summary["final"]["confusion"] is not None:  # too many classes have none
                name = "confusion_matrix.png" if len(runs) == 1 else f"confusion_matrix_{run.label.replace(' ', '_')}.png"
                written.append(save(out / name, confusion_figure(run)))
    return written


def draw_points(settings: list[tuple[str, list[float]]], out: Path) -> Path:
    """Write sweep.png: a row for each setting, best on top, a dot for each seed's top-1 (0..1), a bar at their mean."""
    ordered = sorted(settings, key=lambda setting: fmean(setting[1]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 1 + 0.3 * len(ordered)))
        axes = figure.subplots()
        for row, (_, values) in enumerate(ordered):
            axes.plot([100 * value for value in values], [row] * len(values), "o", color=COLOURS[0], alpha=0.7, markersize=5)
            axes.plot([100 * fmean(values)], [row], "|", color=COLOURS[1], markersize=14, markeredgewidth=2)
        axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
        axes.set_xlabel("top-1 accuracy: each seed, and their mean")
        axes.xaxis.set_major_formatter(PercentFormatter())
        return save(out / "sweep.png", figure)


def loss_figure(runs: list[Run]) -> Figure:
    """Training and evaluation loss against epoch."""
    figure, axes = _epoch_axes(runs, "Loss", "cross-entropy")
    train_and_eval(axes, runs, "loss", 1.0)
    axes.set_ylim(bottom=0)
    return figure


def accuracy_figure(runs: list[Run]) -> Figure:
    """Training accuracy (on augmented images) and evaluation accuracy against epoch."""
    figure, axes = _epoch_axes(runs, "Accuracy", "top-1 accuracy")
    train_and_eval(axes, runs, "accuracy", 100.0)
    axes.yaxis.set_major_formatter(PercentFormatter())
    return figure


def best_figure(runs: list[Run]) -> Figure:
    """The best evaluation accuracy so far against epoch."""
    figure, axes = _epoch_axes(runs, "Best accuracy so far", "top-1 accuracy")
    for run, colour in _coloured(runs):
        epochs, best = _series(run, "best_accuracy")
        if not len(best):  # not evaluated yet
            continue
        name = run.rows[-1]["eval_split"]
        label = (
            f"{run.label}: {100 * best[-1]:.2f} %"
            if len(runs) > 1
            else f"best {name} accuracy, {100 * best[-1]:.2f} % at the end"
        )
        axes.step(epochs, 100 * best, where="post", color=colour, label=label, **_marker(epochs))
    axes.yaxis.set_major_formatter(PercentFormatter())
    if axes.lines:
        axes.legend()
    return figure


def learning_rate_figure(runs: list[Run]) -> Figure:
    """The learning rate, several points an epoch, against epoch."""
    figure, axes = _epoch_axes(runs, "Learning rate", "learning rate")
    for run, colour in _coloured(runs):
        rates = np.concatenate([row["learning_rates"] for row in run.rows])
        inside = [np.linspace(0, 1, len(row["learning_rates"]), endpoint=False) for row in run.rows]
        epochs = np.concatenate([row["epoch"] - 1 + part for row, part in zip(run.rows, inside, strict=True)])
        axes.plot(epochs, rates, color=colour, label=run.label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend()
    return figure


def confusion_figure(run: Run) -> Figure:
    """Percent of each true class predicted as each class, from 1 % on; the counts are in the summary."""
    assert run.summary is not None
    final = run.summary["final"]
    names, counts = run.summary["class_names"], np.array(final["confusion"])
    share = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    size = max(5.0, 0.55 * len(names)) if len(names) <= 20 else 12.0
    figure = Figure(figsize=(size + 1, size))
    axes = figure.subplots()
    image = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    axes.grid(False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="% of the true class")
    if len(names) <= 20:
        for true, predicted in np.ndindex(share.shape):
            value = 100 * share[true, predicted]
            if value >= 1:
                colour = "white" if value > 55 else "black"
                axes.text(predicted, true, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"{run.label}: {final['top1']:.2%} of {final['images']:,} test images\n{run.data_name}", fontsize=10)
    return figure


def _epoch_axes(runs: list[Run], title: str, unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.subplots()
    subject = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    axes.set_title(f"{title}: {subject}\n{', '.join(dict.fromkeys(run.data_name for run in runs))}", fontsize=10)
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def train_and_eval(axes: Axes, runs: list[Run], quantity: str, scale: float) -> None:
    """Draw training and evaluation `quantity` (loss or accuracy), times `scale`, against epoch."""
    for run, colour in _coloured(runs):
        prefix = f"{run.label}, " if len(runs) > 1 else ""
        split = run.rows[-1]["eval_split"]
        train_colour, eval_colour = (colour, colour) if len(runs) > 1 else COLOURS[:2]
        epochs, values = _series(run, f"train_{quantity}")
        axes.plot(epochs, scale * values, "--", color=train_colour, label=f"{prefix}training (augmented)", **_marker(epochs))
        epochs, values = _series(run, f"eval_{quantity}")
        if len(values):
            axes.plot(epochs, scale * values, "-", color=eval_colour, label=f"{prefix}{split}", **_marker(epochs))
    axes.legend()


def _series(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of a metric, where it was measured."""
    points = [(row["epoch"], row[key]) for row in run.rows if row.get(key) is not None]
    return np.array([epoch for epoch, _ in points]), np.array([value for _, value in points])


def _coloured(runs: list[Run]) -> list[tuple[Run, str]]:
    return [(run, COLOURS[number % len(COLOURS)]) for number, run in enumerate(runs)]


def _marker(epochs: np.ndarray) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.5} if len(epochs) <= MAX_MARKED else {}


def save(path: Path, figure: Figure) -> Path:
    """Write a PNG atomically."""
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png")
    return path


if __name__ == "__main__":
    run_command(main)
