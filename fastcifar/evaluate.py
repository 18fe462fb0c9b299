"""Evaluation: probabilities of a model over the views of test-time augmentation, and the figures every report shows.

python -m fastcifar.evaluate --checkpoint runs/se_resnet18-seed0/best.pt --tta flip
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastcifar.arguments import parse_arguments
from fastcifar.capture import Captured, Recorder
from fastcifar.checkpoint import Trained, load
from fastcifar.dataset import ResidentSet, load_resident
from fastcifar.device import choose_device, choose_precision, set_up_process
from fastcifar.distributed import ALONE, World
from fastcifar.errors import InputError, require, run_command
from fastcifar.models.resnet import PixelClassifier
from fastcifar.step import autocast
from kernels.augment.reference import reflected

MOST_CONFUSED = 2000  # classes of a confusion matrix, which has their square: 65,535 would take 34 GB on the device


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a labelled set."""

    images: int
    loss: float  # mean cross-entropy, no smoothing
    top1: float  # 0..1
    top5: float  # 0..1
    per_class: list[float | None]  # accuracy of each class, 0..1; None where the set has no image of it
    confusion: list[list[int]] | None  # [true class][predicted class], images; None for more than MOST_CONFUSED classes

    def to_dict(self, class_names: list[str]) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "images": self.images,
            "loss": self.loss,
            "top1": self.top1,
            "top5": self.top5,
            "per_class": dict(zip(class_names, self.per_class, strict=True)),
            "confusion": self.confusion,
        }


class EvaluationTally:
    """Counts over batches, on the device."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        # Of each true class: how often each class was predicted; for too many, how often another one and how often itself.
        self.columns = classes if classes <= MOST_CONFUSED else 2
        self.confusion = torch.zeros(classes * self.columns, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.top5 = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch: probabilities [B, C] float32, labels [B] int64."""
        log_likelihood = probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()
        self.loss += F.nll_loss(log_likelihood, labels, reduction="sum")
        best = probabilities.topk(min(5, self.classes), dim=1).indices
        self.top5 += (best == labels[:, None]).sum()
        predicted = best[:, 0] if self.columns == self.classes else (best[:, 0] == labels).long()
        entries = labels * self.columns + predicted
        self.confusion.scatter_add_(0, entries, torch.ones_like(entries))  # bincount would make a GPU tell the host its range

    def reset(self) -> None:
        """Forget what was counted."""
        for count in (self.confusion, self.loss, self.top5):
            count.zero_()

    def read(self, world: World = ALONE) -> Evaluation:
        """Wait for the device, once, and return the figures of what all ranks of `world` counted."""
        parts = (self.confusion.double(), self.top5.double()[None], self.loss[None])  # counts are exact up to 2^53
        values = torch.cat(parts)
        world.add([values])
        *counts, loss = values.tolist()
        *entries, top5 = map(int, counts)
        rows = [entries[start : start + self.columns] for start in range(0, len(entries), self.columns)]
        is_matrix = self.columns == self.classes
        right = [row[number if is_matrix else 1] for number, row in enumerate(rows)]
        images = sum(entries)
        return Evaluation(
            images=images,
            loss=loss / images,
            top1=sum(right) / images,
            top5=top5 / images,
            per_class=[hits / sum(row) if any(row) else None for hits, row in zip(right, rows, strict=True)],
            confusion=rows if is_matrix else None,
        )


TTA = Literal["none", "flip", "flip_translate"]
ALIKE = 1 / 3  # the centre_weight with which all views of flip_translate count alike
SHIFT = 1  # pixels; the two translated views look up-left and down-right of the image


def views(images: Tensor, tta: TTA) -> list[Tensor]:
    """The views of images [B, H, W, 3] whose softmax outputs are averaged.

    none: the image. flip: and its horizontal flip (report C). flip_translate: both of these, in place and moved one pixel along
    the diagonal either way with reflected edges, six views (Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024).
    """
    shown = [images]
    if tta == "flip_translate":
        places = [torch.arange(side, device=images.device) for side in images.shape[1:3]]
        for offset in (-SHIFT, SHIFT):
            rows, columns = (reflected(place + offset, len(place)) for place in places)
            shown.append(images[:, rows][:, :, columns])
    if tta != "none":
        shown += [view.flip(2) for view in shown]
    return shown


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients within the block; the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def mean_probabilities(
    model: PixelClassifier, images: Tensor, tta: TTA, autocast_dtype: torch.dtype | None, centre_weight: float = ALIKE
) -> Tensor:
    """Float32 probabilities [B, C] for uint8 images [B, H, W, 3], averaged over the views.

    centre_weight: of flip_translate's two views in place together, 0..1; the four moved ones have the rest.
    """
    with autocast(images.device, autocast_dtype):
        outputs = [model(view) for view in views(images, tta)]
    probabilities = torch.stack([output.float().softmax(1) for output in outputs])
    if tta != "flip_translate" or centre_weight == ALIKE:
        return probabilities.mean(0)
    in_place, *moved = probabilities.unflatten(0, (2, 3)).mean(0)  # of each view and its flip
    return torch.lerp(torch.stack(moved).mean(0), in_place, centre_weight)


def class_probabilities(
    model: PixelClassifier,
    images: Tensor,
    *,
    batch_size: int,
    tta: TTA,
    autocast_dtype: torch.dtype | None,
    centre_weight: float = ALIKE,
) -> Iterator[Tensor]:
    """Yield `mean_probabilities` [B, C] for uint8 images [N, H, W, 3], batch by batch, in eval mode."""
    for batch in images.split(batch_size):
        with evaluating(model):
            probabilities = mean_probabilities(model, batch, tta, autocast_dtype, centre_weight)
        yield probabilities


class Evaluator:
    """Measures a model on a labelled set, as its weights are when called; waits for the device once a call, at the end.

    record: what records the evaluation of a batch, so that later ones replay it. say: told where that fails. world: the
    processes that share the set, all of which call it.
    """

    def __init__(
        self,
        model: PixelClassifier,
        data: ResidentSet,
        *,
        batch_size: int = 500,
        tta: TTA = "none",
        centre_weight: float = ALIKE,
        autocast_dtype: torch.dtype | None = None,
        record: Recorder | None = None,
        say: Callable[[str], object] = print,
        world: World = ALONE,
    ) -> None:
        self.model, self.data, self.batch_size, self.world = model, data.part(world.rank, world.size), batch_size, world
        self._probabilities = partial(
            mean_probabilities, model, tta=tta, autocast_dtype=autocast_dtype, centre_weight=centre_weight
        )
        device = data.images.device
        self._tally = EvaluationTally(model.classes, device)
        self._positions = torch.arange(batch_size, device=device)  # of the batch that comes next
        changes = (self._positions, self._tally.confusion, self._tally.loss, self._tally.top5)
        self._batch = Captured(self._next_batch, lambda: changes, device, record, "evaluation", say)

    def __call__(self) -> Evaluation:
        whole, rest = divmod(len(self.data), self.batch_size)
        with evaluating(self.model):
            self._tally.reset()
            torch.arange(self.batch_size, out=self._positions)
            for _ in range(whole):
                self._batch()
            if rest:
                self._count(self.data.images[-rest:], self.data.labels[-rest:])
        return self._tally.read(self.world)

    def _next_batch(self) -> None:
        self._count(self.data.images.index_select(0, self._positions), self.data.labels.index_select(0, self._positions))
        self._positions += self.batch_size

    def _count(self, images: Tensor, labels: Tensor) -> None:
        self._tally.add(self._probabilities(images), labels)


def require_views(tta: TTA, centre_weight: float) -> None:
    """Raise InputError unless the weight of the views in place is a share, and of views that there are."""
    if not 0 <= centre_weight <= 1:
        raise InputError(f"centre_weight must be 0..1, got {centre_weight}")
    if centre_weight != ALIKE and tta != "flip_translate":
        raise InputError(f"--centre-weight is for --tta flip_translate, got --tta {tta}: choose that, or leave it out")


@dataclass(frozen=True)
class Options:
    """Measure a checkpoint on a split."""

    checkpoint: Path  # last.pt or best.pt of a run folder
    data: Path = Path("data/beton")  # folder with the betons
    split: Literal["test", "train"] = "test"  # which beton to measure on
    tta: TTA = "none"  # test-time augmentation: views whose softmax outputs are averaged
    centre_weight: float = ALIKE  # flip_translate: weight of the two views in place together, 0..1; 1/3: all six count alike
    limit: int = 0  # only the first so many images, 0 = all
    batch_size: int = 500  # images per batch
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the device computes in it
    json: bool = False  # print one JSON object instead of tables

    def __post_init__(self) -> None:
        require(self, self.limit >= 0, "limit", "0 or more")
        require_views(self.tta, self.centre_weight)
        require(self, self.batch_size >= 1, "batch_size", "at least 1")


def main() -> None:
    """Measure and print."""
    options = parse_arguments(Options, "python -m fastcifar.evaluate")
    tell(measure(options), show, as_json=options.json)


def tell(result: dict[str, Any], show: Callable[[dict[str, Any], Console], None], *, as_json: bool) -> None:
    """Print a command's figures as one JSON object, or as `show` prints them."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console(soft_wrap=True, highlight=False, markup=False))


def measure(options: Options) -> dict[str, Any]:
    """Return the figures as plain values. Raises InputError when checkpoint and data do not fit."""
    device = choose_device(options.device)
    set_up_process(device, deterministic=True)
    model = load(options.checkpoint, device)
    data, manifest = load_resident(options.data / f"{options.split}.beton", device, limit=options.limit)
    require_same_kind(options.checkpoint, model, options.data, data, manifest.class_names)
    evaluation = Evaluator(
        model,
        data,
        batch_size=options.batch_size,
        tta=options.tta,
        centre_weight=options.centre_weight,
        autocast_dtype=choose_precision(options.precision, device),
    )()
    return {
        "checkpoint": str(options.checkpoint),
        "arch": model.arch,
        "epoch": model.epoch,
        "data": manifest.name,
        "synthetic": manifest.synthetic,
        "split": options.split,
        "tta": options.tta,
        "centre_weight": options.centre_weight,
        **evaluation.to_dict(model.class_names),
    }


def require_same_kind(checkpoint: Path, model: Trained, folder: Path, data: ResidentSet, found: list[str]) -> None:
    """Raise InputError unless data has the classes, `found`, and the size of image that a checkpoint was trained on."""
    known = model.class_names
    if known != found:
        raise InputError(
            f"{checkpoint} knows other classes ({', '.join(known[:3])}, ...) than "
            f"{folder} ({', '.join(found[:3])}, ...): name the data it was trained on"
        )
    if data.size != model.preprocessing.size:
        sizes = [f"{width}x{height}" for height, width in (data.size, model.preprocessing.size)]
        raise InputError(f"{folder} has images of {sizes[0]} pixels, {checkpoint} was trained on {sizes[1]}: name its data")


def warn_synthetic(console: Console, is_synthetic: bool, name: str) -> None:
    """The banner that must stand wherever a figure came from the synthetic dataset."""
    if is_synthetic:
        console.print(name, style="bold yellow")


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures for people."""
    warn_synthetic(console, result["synthetic"], result["data"])
    measured = f"{result['data']}, {result['split']} split, TTA {result['tta']}"
    console.print(f"{result['arch']} after epoch {result['epoch']}: {measured}")
    figures = f"top-5 {result['top5']:.2%}, loss {result['loss']:.4f}, {result['images']:,} images"
    console.print(f"top-1 {result['top1']:.2%}, {figures}")
    names = list(result["per_class"])
    confusion = result["confusion"] if len(names) <= 20 else None
    caption = "rows: true class; columns: predicted class; images" if confusion else None
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption=caption)
    table.add_column("class", no_wrap=True)
    table.add_column("accuracy", justify="right")
    if confusion:
        for name in names:
            table.add_column(name[:5], justify="right")
    for number, (name, accuracy) in enumerate(result["per_class"].items()):
        counts = [str(count) if count else "·" for count in confusion[number]] if confusion else []
        table.add_row(name, "-" if accuracy is None else f"{accuracy:.1%}", *counts)
    console.print(table)


if __name__ == "__main__":
    run_command(main)
