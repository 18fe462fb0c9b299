"""`python -m fastcifar.augmentation`: a contact sheet of what training sees. Rows: images; columns: epochs; original first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from fastcifar.arguments import parse_arguments
from fastcifar.augmentation import Augmentation, augment, draw
from fastcifar.augmentation.mixing import mix
from fastcifar.dataset import ResidentSet, load_resident, normalisation
from fastcifar.errors import require, run_command
from fastcifar.files import atomic_path
from fastcifar.models import architecture
from fastcifar.recipes import reported


@dataclass(frozen=True)
class Options:
    """Draw a contact sheet of a recipe's augmentation, mixing included."""

    arch: str = "se_resnet18"  # whose recipe to show
    data: Path = Path("data/beton")  # folder with the betons
    split: Literal["train", "test"] = "train"  # which images
    out: Path = Path("grid.png")  # PNG to write
    images: int = 10  # rows
    epochs: int = 12  # columns
    seed: int = 0  # of the run to look into

    def __post_init__(self) -> None:
        require(self, 2 <= self.images <= 100, "images", "2..100 (mixing needs two)")
        require(self, 1 <= self.epochs <= 50, "epochs", "1..50")
        require(self, 0 <= self.seed < 2**63, "seed", "0..2^63-1")


def main() -> None:
    """Draw and write the sheet."""
    options = parse_arguments(Options, "python -m fastcifar.augmentation")
    architecture(options.arch)
    row = reported(options.arch)
    data, manifest = load_resident(options.data / f"{options.split}.beton", torch.device("cpu"), limit=options.images)
    mean, std = (torch.tensor(values) for values in normalisation(manifest, row.recipe.std))
    columns = [data.images.numpy()] + [
        seen(row.recipe.augmentation, data, mean, std, options.seed, epoch, options.epochs) for epoch in range(options.epochs)
    ]
    names = [manifest.class_names[label] for label in data.labels.tolist()]
    sheet(columns, names, f"{options.arch}: {row.source}\n{manifest.name}, seed {options.seed}", options.out)
    print(options.out)


def seen(
    settings: Augmentation, data: ResidentSet, mean: torch.Tensor, std: torch.Tensor, seed: int, epoch: int, epochs: int
) -> np.ndarray:
    """What the network is shown of `data` in an epoch, as pixels again: uint8 [N, H, W, 3]. The images make one batch."""
    x, _ = augment(settings, data, torch.arange(len(data)), draw(settings, data.index, seed, epoch, data.size), mean, std)
    if settings.mixes:
        plan = settings.plan_mixing(seed=seed, epoch=epoch, steps=1, progress=epoch / epochs, device=x.device, size=data.size)
        x = mix(x, plan.blend[0], plan.box[0], data.size)
    values = x.permute(0, 2, 3, 1) * (255 * std) + 255 * mean
    return values.round().clamp(0, 255).to(torch.uint8).numpy()


def sheet(columns: list[np.ndarray], names: list[str], title: str, out: Path) -> None:
    """Write the grid: the first column is the original, the others are epochs 1, 2, ..."""
    rows, width = len(names), len(columns)
    figure = Figure(figsize=(0.72 * width + 0.9, 0.72 * rows + 0.8))
    axes = figure.subplots(rows, width, squeeze=False)
    for (r, c), axis in np.ndenumerate(axes):
        axis.imshow(columns[c][r], interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
        if r == 0:
            axis.set_title("original" if c == 0 else f"epoch {c}", fontsize=7)
        if c == 0:
            axis.set_ylabel(names[r], fontsize=7, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=9)
    figure.subplots_adjust(left=0.09, right=0.995, bottom=0.005, top=1 - 0.75 / (0.72 * rows + 0.8), wspace=0.04, hspace=0.04)
    with atomic_path(out) as partial:
        figure.savefig(partial, format="png", dpi=130)


if __name__ == "__main__":
    run_command(main)
