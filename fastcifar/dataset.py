"""Betons as sets that live on the device as uint8, each epoch's order, and what is held out from training."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastcifar.beton import IMAGE_BYTES, SIDE, Manifest, check_content, layout, read_beton, require_file
from fastcifar.errors import InputError
from kernels.philox import Purpose, philox

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The mean that all five reports' notebooks subtract from CIFAR-10, per channel R, G, B in 0..1, and CIFAR-10's own standard
# deviation, by which report C's and the later of report E's divide; each report's own is a field of its recipe.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
Channels = tuple[float, ...]  # R, G, B in 0..1


@dataclass(frozen=True)
class ResidentSet:
    """Images on the device, stored once; batches are positions into it."""

    images: Tensor  # [N, 32, 32, 3] uint8
    labels: Tensor  # [N] int64
    index: Tensor  # [N] int64, each sample's number in its source: the key of its randomness

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> "ResidentSet":
        """The samples at `positions`, which keep their numbers and so their randomness."""
        return ResidentSet(self.images[positions], self.labels[positions], self.index[positions])


class StreamedSet:
    """A set too large for the memory given to it: its images stay in their file, labels and numbers are on the device.

    The file is mapped, and each batch's pixels are copied out by the pointers of its samples, in our own order. A sample's
    randomness is keyed by its number, so a streamed run sees the resident run's pixels.
    """

    def __init__(self, content: np.ndarray[Any, Any], pointers: np.ndarray[Any, Any], labels: Tensor, index: Tensor) -> None:
        """content: the file's bytes, mapped. pointers: [N] int64, where each image begins. labels, index: [N] int64."""
        self.content, self.pointers, self.labels, self.index = content, pointers, labels, index

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> "StreamedSet":
        """The samples at `positions`, which keep their numbers and so their randomness."""
        return StreamedSet(self.content, self.pointers[positions.cpu().numpy()], self.labels[positions], self.index[positions])

    def fetch(self, positions: Tensor) -> ResidentSet:
        """Read the samples at `positions` [B] onto the device; on a GPU the host waits for the positions."""
        images = torch.empty(len(positions), IMAGE_BYTES, dtype=torch.uint8, pin_memory=positions.is_cuda)
        rows = images.numpy()
        for row, pointer in enumerate(self.pointers[positions.cpu().numpy()].tolist()):
            rows[row] = self.content[pointer : pointer + IMAGE_BYTES]
        pixels = images.to(self.labels.device, non_blocking=True).view(-1, SIDE, SIDE, 3)
        return ResidentSet(pixels, self.labels[positions], self.index[positions])


AnySet: TypeAlias = ResidentSet | StreamedSet


@dataclass(frozen=True)
class Splits:
    """The sets of a run on its device."""

    train: AnySet
    select: ResidentSet  # what best.pt is chosen on: images held out from training, or the test set
    select_name: str  # "held-out" or "test"
    test: ResidentSet
    manifest: Manifest  # of the training split
    sha256: tuple[str, str]  # of train.beton and test.beton
    mean: Tensor  # [3] float32, of normalisation, 0..1
    std: Tensor

    @property
    def classes(self) -> int:
        return len(self.manifest.class_names)

    @cached_property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation on the host; the device is asked once."""
        return self.mean.tolist(), self.std.tolist()


def load_splits(
    folder: Path,
    device: torch.device,
    *,
    limit_train: int,
    limit_test: int,
    val_fraction: float,
    seed: int,
    verify: bool,
    stream: bool = False,
    std: Channels | None = None,
    std_everywhere: bool = False,
) -> Splits:
    """Read `train.beton` and `test.beton` of a folder onto `device`; with `stream` the training images stay on the disk.

    limit_train, limit_test: only the first so many images, 0 = all. val_fraction: share of the training images held out, 0..1;
    0 selects on the test set. std, std_everywhere: as `normalisation` says. Raises InputError for anything invalid.
    """
    full: AnySet
    load = load_streamed if stream else load_resident
    full, manifest = load(folder / "train.beton", device, limit=limit_train, verify=verify)
    test, test_manifest = load_resident(folder / "test.beton", device, limit=limit_test, verify=verify)
    if (manifest.dataset, manifest.class_names) != (test_manifest.dataset, test_manifest.class_names):
        raise InputError(f"{folder}: train.beton and test.beton are of different data: write them again with --force")
    select, select_name = test, "test"
    if val_fraction:
        full, held_out = hold_out(full, val_fraction, seed)
        if not len(full) or not len(held_out):
            raise InputError(f"val_fraction {val_fraction} leaves no image on one side: choose another")
        select_name = "held-out"
        select = held_out.fetch(torch.arange(len(held_out))) if isinstance(held_out, StreamedSet) else held_out
    statistics = normalisation(manifest, std, everywhere=std_everywhere)
    tensors = (torch.tensor(values, device=device) for values in statistics)
    return Splits(full, select, select_name, test, manifest, (manifest.sha256, test_manifest.sha256), *tensors)


def load_resident(path: Path, device: torch.device, *, limit: int = 0, verify: bool = True) -> tuple[ResidentSet, Manifest]:
    """Read a beton onto `device`. limit: only the first so many samples, 0 = all. Raises InputError for anything unsound."""
    beton = read_beton(path, verify=verify)
    check_content(path, beton.manifest, beton.labels, None, limit)
    part = slice(limit or None)
    tensors = (torch.from_numpy(array[part]).to(device) for array in (beton.images, beton.labels, beton.index))
    return ResidentSet(*tensors), beton.manifest


def load_streamed(path: Path, device: torch.device, *, limit: int = 0, verify: bool = True) -> tuple[StreamedSet, Manifest]:
    """Map a beton. limit: only the first so many samples, 0 = all. Raises InputError for anything unsound."""
    require_file(path)
    manifest = Manifest.load(path)
    content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    pointers, labels, index = layout(content, path)
    digest = None
    if verify:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    check_content(path, manifest, labels, digest, limit)
    part = slice(limit or None)
    tensors = (torch.from_numpy(array[part]).to(device) for array in (labels, index))
    return StreamedSet(content, pointers[part], *tensors), manifest


def is_cifar10(manifest: Manifest) -> bool:
    """Whether the data has CIFAR-10's ten classes, for which the reports' statistics hold."""
    return tuple(manifest.class_names) == CIFAR10_CLASSES


def normalisation(manifest: Manifest, std: Channels | None = None, *, everywhere: bool = False) -> tuple[Channels, Channels]:
    """Mean and standard deviation per channel: CIFAR-10's for its ten classes, otherwise the training split's own.

    std: a recipe's deviation, which takes the place of CIFAR-10's, and of other data's own only if it holds `everywhere`.
    Raises InputError when a channel has the same value everywhere, which cannot be normalised.
    """
    if is_cifar10(manifest):
        return CIFAR10_MEAN, std or CIFAR10_STD
    if std is not None and everywhere:
        return tuple(manifest.mean), std
    if min(manifest.std) == 0:
        raise InputError(f"{manifest.name}: a channel is the same in every pixel, which cannot be normalised: check it")
    return tuple(manifest.mean), tuple(manifest.std)


def epoch_order(index: Tensor, seed: int, epoch: int | Tensor) -> Tensor:
    """The permutation of an epoch: positions sorted by each sample's 63-bit key, drawn at (seed, epoch, sample) alone."""
    return _keyed_order(index, seed, epoch, Purpose.ORDER)


def hold_out(full: AnySet, fraction: float, seed: int) -> tuple[AnySet, AnySet]:
    """Split into (training, held-out) sets; `fraction` in 0..1 is held out, the same samples for the same seed and set."""
    order = _keyed_order(full.index, seed, 0, Purpose.HOLD_OUT)
    held = round(len(full) * fraction)
    return full.subset(order[held:].sort().values), full.subset(order[:held].sort().values)


def _keyed_order(index: Tensor, seed: int, epoch: int | Tensor, purpose: Purpose) -> Tensor:
    high, low, _, _ = philox(seed, index, epoch, purpose)
    return torch.argsort(high << 31 | low >> 1, stable=True)
