#!/usr/bin/env python3
"""Trains each report's network by its own recipe for the first epochs and draws our curve over the one its authors printed.

python bench/reports.py                                              # every row, each for its default number of epochs
python bench/reports.py --archs se_resnet18 --epochs 3
python bench/reports.py --archs se_resnet18 -- --limit-train 5000    # after `--`: options of python -m fastcifar.train
python bench/reports.py --only-draw                                  # only read the run folders that are in --out

A run that has its epochs is not repeated and an interrupted one is resumed: the same command again does what is left. What a
training prints is in OUT/ARCH-seedN.log. The authors' figures are in bench/report_curves.json; docs/reports.md says how far the
two can be compared.
"""

import math
import sys
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.run import OWN_FLAGS, new_console, require_free, resumable
from fastcifar import files
from fastcifar.arguments import parse_arguments
from fastcifar.beton import Manifest
from fastcifar.device import choose_device
from fastcifar.errors import InputError, require, run_command
from fastcifar.launch import Job, latest
from fastcifar.models import architecture
from fastcifar.plots import COLOURS, STYLE
from fastcifar.recipes import reported
from fastcifar.run_folder import RunFolder, environment_facts

PROGRAM = "python bench/reports.py"
CURVES = Path(__file__).with_name("report_curves.json")

# Epochs to train when --epochs names none: few, since a CPU takes from minutes to an hour for each.
EPOCHS = {
    "se_resnet18": 3, "dropout_resnet24": 2, "mish_se_resnet18": 2, "light_resnet18": 2, "resnet42": 2,
    "robust_resnet64": 1, "light_resnet18_v2_40": 1, "light_resnet18_v2_45": 1,
}  # fmt: skip
AHEAD = 3  # epochs of the authors' curve drawn beyond the end of ours, to show where it goes

NOTES = (
    "The authors trained on the original CIFAR-10. On a JPEG round trip of it accuracy is lower; training loss is comparable.",
    "`resnet42`: report B measured its held-out accuracy with the network in training mode and on augmented images, ours is "
    "measured in evaluation mode on the images as they are: not the same measurement.",
    "The authors' loaders keep the last, smaller batch of an epoch, ours drops it: 391 against 390 steps at batch size 128.",
)


@dataclass(frozen=True)
class Options:
    """Train the first epochs of the reports' own recipes and compare them with the authors' curves.

    Options of `python -m fastcifar.train` may follow after `--`.
    """

    archs: tuple[str, ...] = tuple(EPOCHS)  # architectures of the reports; `python -m fastcifar.models` lists them
    epochs: int = 0  # epochs of each architecture's full schedule to train, 0 = the row's default
    seed: int = 0  # of every run, 0..2^63-1
    data: Path = Path("data/beton")  # folder with train.beton and test.beton
    out: Path = Path("runs/reports")  # folder of the run folders, reports.png, reports.md and reports.json
    curves: Path = CURVES  # JSON of the authors' figures
    only_draw: bool = False  # train nothing: draw the run folders that are in --out

    def __post_init__(self) -> None:
        for arch in self.archs:
            architecture(arch)
        require(self, bool(self.archs), "archs", "at least one")
        require(self, self.epochs >= 0, "epochs", "0 or more")
        require(self, 0 <= self.seed < 2**63, "seed", "0..2^63-1")

    def job(self, arch: str, flags: list[str] | None = None) -> Job:
        """The training of an architecture, with further flags of its own."""
        given = ("--arch", arch, "--seed", str(self.seed), "--data", str(self.data), "--plan", "default", *(flags or []))
        return Job(self.out, f"{arch}-seed{self.seed}", latest(given), stop_after=self.epochs or EPOCHS.get(arch, 1))


@dataclass(frozen=True)
class Curve:
    """What the authors of a report printed after each epoch; index 0 is epoch 1."""

    source: str
    accuracy_on: str  # "test" or "held-out": the images that accuracy was measured on
    train_loss: tuple[float, ...]
    accuracy: tuple[float, ...]  # percent


def main() -> None:
    """Train what is left; write the comparison after each run."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags = sys.argv[split + 1 :]
    require_free(flags, *OWN_FLAGS, "--arch")
    options = parse_arguments(Options, PROGRAM, sys.argv[1:split])
    curves, console = read_curves(options.curves), new_console()
    for arch in options.archs:
        if arch not in curves:
            raise InputError(f"{options.curves} has no curve of {arch}, only of {', '.join(sorted(curves))}")
        _ = options.job(arch, flags).command  # refused before anything is trained, as is missing data
    for part in () if options.only_draw else ("train", "test"):
        Manifest.load(options.data / f"{part}.beton")
    if not options.only_draw:
        with resumable(options.out):
            train_all(options, curves, flags, console)
    comparisons = write(options, curves)
    if not comparisons:
        raise InputError(f"{options.out} has no finished epoch of {', '.join(options.archs)}: leave out --only-draw")
    for comparison in comparisons:
        console.print(verdict(comparison))
    console.print(f"figure, tables and figures as JSON: {options.out}/reports.png, .md, .json")


def read_curves(path: Path) -> dict[str, Curve]:
    """The authors' figures by architecture. Raises InputError when the file is not of this form."""
    remedy = f"--curves takes a file of the form of bench/{CURVES.name}"
    values = files.read_json(path, remedy=remedy)
    try:
        return {arch: _curve(run) for arch, run in values["runs"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} does not hold curves ({type(error).__name__}: {error}): {remedy}") from None


def _curve(run: dict[str, Any]) -> Curve:
    # One notebook calls its held-out images "test"; the full file keeps its word and says in `source` what they are.
    held_out = "validation_accuracy" in run or "(validation =" in run["source"]
    loss = tuple(map(float, run["train_loss"]))
    accuracy = tuple(map(float, run["validation_accuracy" if "validation_accuracy" in run else "test_accuracy"]))
    if not loss or not accuracy or not all(map(math.isfinite, loss + accuracy)):
        raise ValueError("losses and accuracies must be finite numbers, at least one each")
    return Curve(run["source"], "held-out" if held_out else "test", loss, accuracy)


def train_all(options: Options, curves: dict[str, Curve], flags: list[str], console: Console) -> None:
    """Train every row to its epoch, one after the other. Raises InputError when a training fails."""
    for arch in dict.fromkeys(options.archs):
        job = options.job(arch, flags)
        if job.finished():
            console.print(f"{arch}: epoch {job.stop_after} is done")
            continue
        console.print(f"{arch}: training to epoch {job.stop_after}, see {job.path}.log")
        error = job.train(console, f"{arch}: ")
        if error:
            raise InputError(f"the training of {arch} failed: {error}")
        write(options, curves)


def write(options: Options, curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """Compare every run that has a finished epoch, write figure, tables and JSON, and return the comparisons."""
    folders = {arch: RunFolder(options.job(arch).path) for arch in options.archs}
    begun = {arch: folder for arch, folder in folders.items() if (folder.path / "metrics.jsonl").exists()}
    comparisons = [compare(arch, folder, curves[arch]) for arch, folder in begun.items()]
    if comparisons:
        draw(comparisons, options.out / "reports.png")
        files.write_bytes(options.out / "reports.md", tables(comparisons).encode())
        content = environment_facts(choose_device("auto")) | {"notes": NOTES, "comparisons": comparisons}
        files.write_json(options.out / "reports.json", content)
    return comparisons


def compare(arch: str, folder: RunFolder, curve: Curve) -> dict[str, Any]:
    """A run beside its authors' curve, as reports.json has it. InputError when the folder's run is another architecture's.

    train_loss and accuracy (percent) have {theirs, ours, difference} for each of our epochs, None where it was not measured.
    """
    run_arch, _, recipe, run = folder.read_config()
    if run_arch != arch:
        raise InputError(f"{folder.path} is a run of {run_arch}, not of {arch}: choose another --out")
    config = files.read_json(folder.path / "config.json", remedy="choose another --out")
    rows = folder.read_metrics()
    return {
        "arch": arch,
        "report": architecture(arch).report,
        "theirs": asdict(curve),
        "accuracy_on": rows[-1]["eval_split"],
        "data_name": rows[-1]["data_name"],
        "train_images": folder.read_summary()["train_images"] if (folder.path / "summary.json").exists() else None,
        "is_row_recipe": recipe == reported(arch).recipe,
        "run": {"seed": run.seed} | {name: config.get(name) for name in ("hardware", "versions", "commit", "command")},
        "train_loss": pairs(curve.train_loss, [row["train_loss"] for row in rows]),
        "accuracy": pairs(curve.accuracy, [row["eval_accuracy"] and 100 * row["eval_accuracy"] for row in rows]),
    }


def pairs(theirs: tuple[float, ...], ours: list[float | None]) -> list[dict[str, float | None]]:
    """A pair for each of our epochs; the difference is ours minus theirs."""
    both = list(zip_longest(theirs, ours))[: len(ours)]
    return [{"theirs": a, "ours": b, "difference": None if a is None or b is None else b - a} for a, b in both]


def verdict(comparison: dict[str, Any]) -> str:
    """One line: where training loss differs most."""
    differences = [pair["difference"] for pair in comparison["train_loss"] if pair["difference"] is not None]  # 1st epoch's is
    worst = max(differences, key=abs)
    return f"{comparison['arch']}: training loss differs by {worst:+.4f} at most, in epoch {1 + differences.index(worst)}"


def draw(comparisons: list[dict[str, Any]], path: Path) -> None:
    """Write the figure: a row of panels for each architecture, training loss on the left and accuracy on the right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    def panel(axes: Any, unit: str, curve: list[float], pairs: list[dict[str, float | None]], *names: str) -> None:
        theirs, ours = curve[: len(pairs) + AHEAD], [math.nan if pair["ours"] is None else pair["ours"] for pair in pairs]
        thin = {"linewidth": 0.9, "marker": "o", "markersize": 4, "markerfacecolor": "white"}
        axes.plot(range(1, len(theirs) + 1), theirs, color=COLOURS[1], label=names[0], **thin)
        axes.plot(range(1, len(ours) + 1), ours, color=COLOURS[0], label=names[1], linewidth=2.2, marker="o", markersize=5)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8)

    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.9 * len(comparisons) + 0.5))
        grid = figure.subplots(len(comparisons), 2, squeeze=False)
        for (left, right), each in zip(grid, comparisons, strict=True):
            theirs = each["theirs"]
            images = "" if each["train_images"] is None else f", {each['train_images']:,} images"
            changed = "" if each["is_row_recipe"] else ", recipe changed"
            left.set_title(f"{each['arch']} (report {each['report']}{images}{changed})", loc="left")
            panel(left, "training loss", theirs["train_loss"], each["train_loss"], "authors", "ours")
            names = f"authors, {theirs['accuracy_on']}", f"ours, {each['accuracy_on']}"
            panel(right, "top-1 accuracy", theirs["accuracy"], each["accuracy"], *names)
            right.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        data = ", ".join(dict.fromkeys(each["data_name"] for each in comparisons))
        figure.suptitle(f"Ours: {data}. Authors: the original CIFAR-10.")
        with files.atomic_path(path) as partial:
            figure.savefig(partial, format="png")


def tables(comparisons: list[dict[str, Any]]) -> str:
    """The comparison as Markdown: a table for each architecture."""

    def cells(pair: dict[str, float | None], form: str) -> str:
        values = zip(pair.values(), (form, form, "+" + form), strict=True)
        return " | ".join("-" if value is None else format(value, how) for value, how in values)

    lines = ["# Our first epochs beside the authors'", "", "Differences are ours minus theirs; accuracy is in percent.", ""]
    lines += [f"- {note}" for note in NOTES]
    for each in comparisons:
        run, theirs = each["run"], each["theirs"]
        images = "" if each["train_images"] is None else f"{each['train_images']:,} training images, "
        versions = ", ".join(f"{name} {version}" for name, version in (run["versions"] or {}).items())
        lines += [
            *("", f"## {each['arch']} (report {each['report']})", ""),
            f"- Theirs: {theirs['source']}",
            f"- Ours: {each['data_name']}, {images}seed {run['seed']}; "
            f"{run['hardware']}; {versions}; commit {run['commit']}; `{run['command']}`",
            *([] if each["is_row_recipe"] else ["- **Not the recipe of this row**: see the command."]),
            "",
            "| epoch | training loss, theirs | ours | difference "
            f"| accuracy, theirs ({theirs['accuracy_on']}) | ours ({each['accuracy_on']}) | difference |",
            "|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for epoch, (loss, accuracy) in enumerate(zip(each["train_loss"], each["accuracy"], strict=True), start=1):
            lines.append(f"| {epoch} | {cells(loss, '.4f')} | {cells(accuracy, '.2f')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
