"""About a minute of training on two CPU cores, and one picture of what came of it.

python -m fastcifar.demo --data data/beton
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fastcifar.arguments import parse_arguments
from fastcifar.checkpoint import load
from fastcifar.command import parse_command
from fastcifar.dataset import load_resident
from fastcifar.device import choose_device, choose_precision
from fastcifar.errors import run_command
from fastcifar.evaluate import class_probabilities
from fastcifar.run_folder import RunFolder
from fastcifar.train import train

ROWS, COLUMNS = 4, 8  # of test images in the picture
# Smaller batches than the recipe's, for so few epochs.
TRAINING = (
    "--arch", "speed94_half", "--epochs", "2", "--batch-size", "500", "--weight-decay", "0.00417", "--limit-test", "2000",
    "--no-plots",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Train a small network for about a minute and draw its curves and its answers to some test images."""

    data: Path = Path("data/beton")  # folder with train.beton and test.beton
    out: Path = Path("demo.png")  # PNG to write
    run: Path = Path("runs/demo")  # run folder to make anew
    seed: int = 0  # of the run, 0..2^63-1


def main() -> None:
    """Train, then draw."""
    options = parse_arguments(Options, "python -m fastcifar.demo")
    folder = RunFolder(fresh(options.run))
    arguments = ["--data", str(options.data), "--out", str(folder.path), "--seed", str(options.seed), *TRAINING]
    train(parse_command(arguments), Console(soft_wrap=True, highlight=False, markup=False))
    draw(folder, options.data, options.out)
    print(options.out)


def fresh(path: Path) -> Path:
    """`path`, or `path-2`, `path-3`, ...: the first that is not there yet, so that no run is overwritten."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def draw(folder: RunFolder, data: Path, out: Path) -> None:
    """Write the picture: test images with the network's answers on the left, loss and accuracy on the right."""
    from matplotlib import rc_context  # here, since matplotlib takes a second to import and training does not need it
    from matplotlib.figure import Figure

    from fastcifar import plots

    device = choose_device("auto")
    model = load(folder.last, device)
    images, manifest = load_resident(data / "test.beton", device, limit=ROWS * COLUMNS)
    settings = {"batch_size": ROWS * COLUMNS, "autocast_dtype": choose_precision("auto", device)}
    (probabilities,) = class_probabilities(model, images.images, tta="none", **settings)  # type: ignore[arg-type]
    run = plots.read_run(folder)
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(13, 6.2))
        left, right = figure.subfigures(1, 2, width_ratios=(1.8, 1))  # type: ignore[misc]  # two of them, not one
        for axis, image, label, answer in zip(
            left.subplots(ROWS, COLUMNS).flat, images.images.cpu(), images.labels.tolist(), probabilities.cpu(), strict=True
        ):
            axis.imshow(image.numpy(), interpolation="nearest")
            axis.set_axis_off()
            certain, named = float(answer.max()), int(answer.argmax())
            colour = plots.COLOURS[2] if named == label else plots.COLOURS[1]
            axis.set_title(f"{manifest.class_names[named]} {certain:.0%}", fontsize=8, color=colour)
        assert run.summary is not None
        seconds, top1 = run.summary["train_seconds"], run.summary["final"]["top1"]
        left.suptitle(f"{top1:.1%} of {run.summary['final']['images']:,} test images after {seconds:.0f} s of training")
        curves = (("loss", 1.0, "cross-entropy"), ("accuracy", 100.0, "top-1 accuracy, %"))
        for axis, (quantity, scale, unit) in zip(right.subplots(2, 1).flat, curves, strict=True):
            plots.train_and_eval(axis, [run], quantity, scale)
            axis.set_ylabel(unit)
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
        right.suptitle(f"{run.summary['arch']}, {manifest.name}", fontsize=9)
        plots.save(out, figure)


if __name__ == "__main__":
    run_command(main)
