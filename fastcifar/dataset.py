"""Betons as sets that live on the device as uint8, each epoch's order, and what is held out from training."""

import hashlib
import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastcifar import ahead, subsets
from fastcifar.beton import (
    REWRITE,
    Manifest,
    check_content,
    check_statistics,
    layout,
    load_manifest,
)
from fastcifar.errors import InputError
from kernels.augment.operations import Size
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

    images: Tensor  # [N, H, W, 3] uint8
    labels: Tensor  # [N] int64
    index: Tensor  # [N] int64, each sample's number in its source: the key of its randomness

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> Size:
        """Height and width of the images."""
        return self.images.shape[1], self.images.shape[2]

    def subset(self, positions: Tensor) -> "ResidentSet":
        """The samples at `positions`, which keep their numbers and so their randomness."""
        return ResidentSet(self.images[positions], self.labels[positions], self.index[positions])

    def relabelled(self, labels: Tensor) -> "ResidentSet":
        """The same samples with other labels [N]."""
        return replace(self, labels=labels)

    def fetch(self, positions: Tensor) -> "ResidentSet":
        """The same, under the name that reads them from a streamed set."""
        return self.subset(positions)

    def part(self, number: int, count: int) -> "ResidentSet":
        """Part `number` of `count` parts that differ by one sample at most; its tensors are views."""
        return ResidentSet(*(values.tensor_split(count)[number] for values in (self.images, self.labels, self.index)))


class OpenFile:
    """A file held open: renamed over or deleted it stays readable, overwritten or truncated it is refused, not believed."""

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size, self.state = os.fstat(self.descriptor).st_size, self._state()

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def check(self) -> None:
        """Raise InputError when the file was written to since it was opened."""
        if self._state() != self.state:
            raise self._changed()

    def _changed(self) -> InputError:
        return InputError(f"{self.path} changed while it was read: {REWRITE}, then resume")

    def read_into(self, rows: np.ndarray[Any, Any], starts: Iterable[int]) -> None:
        """Fill rows [B, L] uint8 with the L bytes from each of `starts` [B]. Raises InputError, or OSError of the disk."""
        try:
            for row, start in zip(rows, starts, strict=True):
                if os.preadv(self.descriptor, [row], start) != len(row):
                    raise self._changed()
        except OSError as error:
            error.filename = str(self.path)
            raise
        self.check()

    def read(self, start: int, length: int) -> np.ndarray[Any, Any]:
        """The bytes [length] from `start`."""
        content = np.empty((1, length), np.uint8)
        self.read_into(content, [start])
        return content[0]


class StreamedSet:
    """A set too large for the memory given to it: its images stay in their file, labels and numbers are on the device.

    Each batch's pixels are read by the pointers of its samples, in our own order. A sample's randomness is keyed by its
    number, so a streamed run sees the resident run's pixels.
    """

    def __init__(self, file: OpenFile, pointers: np.ndarray[Any, Any], labels: Tensor, index: Tensor, size: Size) -> None:
        """pointers: [N] int64, where each image begins in the file. labels, index: [N] int64. size: of the images."""
        self.file, self.pointers, self.labels, self.index, self.size = file, pointers, labels, index, size

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> "StreamedSet":
        """The samples at `positions`, which keep their numbers and so their randomness."""
        pointers = self.pointers[positions.cpu().numpy()]
        return StreamedSet(self.file, pointers, self.labels[positions], self.index[positions], self.size)

    def relabelled(self, labels: Tensor) -> "StreamedSet":
        """The same samples with other labels [N]."""
        return StreamedSet(self.file, self.pointers, labels, self.index, self.size)

    def fetch(self, positions: Tensor) -> ResidentSet:
        """Read the samples at `positions` [B] onto the device; on a GPU the host waits for the positions."""
        images = torch.empty(len(positions), *self.size, 3, dtype=torch.uint8, pin_memory=positions.is_cuda)
        self.file.read_into(images.flatten(1).numpy(), self.pointers[positions.cpu().numpy()].tolist())
        pixels = images.to(self.labels.device, non_blocking=True)
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
    sha256: tuple[str, ...]  # of train.beton, test.beton and a file of train_indices
    mean: Tensor  # [3] float32, of normalisation, 0..1
    std: Tensor
    warnings: list[str] = field(default_factory=list)  # one line each, to be shown before training

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
    indices: Path | None = None,
    label_noise: float = 0.0,
) -> Splits:
    """Read `train.beton` and `test.beton` of a folder onto `device`; with `stream` the training images stay on the disk.

    limit_train, limit_test: only the first so many images, 0 = all. val_fraction: share of the training images held out, 0..1;
    0 selects on the test set. std, std_everywhere: as `normalisation` says. indices, label_noise: as `fastcifar.subsets` says;
    images held out keep their labels. Raises InputError for anything invalid.
    """
    full: AnySet
    load = load_streamed if stream else load_resident
    full, manifest = load(folder / "train.beton", device, limit=limit_train, verify=verify)
    test, test_manifest = load_resident(folder / "test.beton", device, limit=limit_test, verify=verify)
    if manifest.sha256 == test_manifest.sha256:
        raise InputError(f"{folder}: train.beton and test.beton are the same file: {REWRITE}")
    kinds = ((part.dataset, part.class_names, part.size, part.channels) for part in (manifest, test_manifest))
    if operator.ne(*kinds):
        raise InputError(f"{folder}: train.beton and test.beton are of different data: write them again with --force")
    sha256 = [manifest.sha256, test_manifest.sha256]
    if indices is not None:
        positions, digest = subsets.listed(full.index, indices)
        full, sha256 = full.subset(positions), [*sha256, digest]
    twice = count_shared(full, test)
    warnings = [f"{twice:,} of {len(test):,} test images are also training images: accuracy is too high"] if twice else []
    select, select_name = test, "test"
    if val_fraction:
        full, held_out = hold_out(full, val_fraction, seed)
        if not len(full) or not len(held_out):
            raise InputError(f"val_fraction {val_fraction} leaves no image on one side: choose another")
        select_name = "held-out"
        select = held_out.fetch(torch.arange(len(held_out)))
    if len(full) < 2:
        raise InputError(f"{folder}/train.beton: one image is too few to train on (batch norm needs two): give it more")
    if label_noise:
        full = full.relabelled(subsets.mislabelled(full.labels, full.index, label_noise, len(manifest.class_names), seed))
    statistics = normalisation(manifest, std, everywhere=std_everywhere)
    mean, deviation = (torch.tensor(values, device=device) for values in statistics)
    return Splits(full, select, select_name, test, manifest, tuple(sha256), mean, deviation, warnings)


def load_resident(path: Path, device: torch.device, *, limit: int = 0, verify: bool = True) -> tuple[ResidentSet, Manifest]:
    """Read a beton onto `device`. limit: only the first so many samples, 0 = all. Raises InputError for anything unsound."""
    beton = ahead.beton(path, verify=verify)
    check_content(path, beton.manifest, beton.images.shape[1:3], beton.labels, None, limit)
    part = slice(limit or None)
    tensors = (torch.from_numpy(array[part]).to(device) for array in (beton.images, beton.labels, beton.index))
    return ResidentSet(*tensors), beton.manifest


def load_streamed(path: Path, device: torch.device, *, limit: int = 0, verify: bool = True) -> tuple[StreamedSet, Manifest]:
    """Open a beton. limit: only the first so many samples, 0 = all. Raises InputError for anything unsound."""
    manifest = load_manifest(path)
    file = OpenFile(path)
    pointers, labels, index, size = layout(file.read, file.size, path)
    digest = hashlib.sha256()
    for start in range(0, file.size if verify else 0, 1 << 20):
        digest.update(file.read(start, min(1 << 20, file.size - start)).data)
    check_content(path, manifest, size, labels, digest.hexdigest() if verify else None, limit)
    part = slice(limit or None)
    on_device = [torch.from_numpy(array[part]).to(device) for array in (labels, index)]
    streamed = StreamedSet(file, pointers[part], on_device[0], on_device[1], size)
    if verify and not manifest.source_sha256:
        whole = StreamedSet(file, pointers, torch.from_numpy(labels), torch.from_numpy(index), size)
        parts = (whole.fetch(positions).images.numpy() for positions in torch.arange(len(labels)).split(1000))
        check_statistics(path, manifest, parts)
    return streamed, manifest


def count_shared(train: AnySet, test: ResidentSet) -> int:
    """How many test images are, byte for byte, training images too: those whose keys agree are compared whole."""
    keys = [_middles(part) for part in (train, test)]
    common = set(keys[0]) & set(keys[1])
    if not common:
        return 0
    alike = [
        torch.tensor([place for place, key in enumerate(part) if key in common], device=test.labels.device) for part in keys
    ]
    tested = [image.tobytes() for image in test.subset(alike[1]).images.cpu().numpy()]
    wanted, trained = set(tested), set()
    for positions in alike[0].split(1000):
        trained |= wanted.intersection(image.tobytes() for image in train.fetch(positions).images.cpu().numpy())
    return sum(image in trained for image in tested)


def _middles(part: AnySet) -> list[bytes]:
    """Each image's key: two thirds of its middle row, which few pairs of images share."""
    height, width = part.size
    start, length = height // 2 * width * 3, width * 2
    if isinstance(part, StreamedSet):
        keys = np.empty((len(part), length), np.uint8)
        part.file.read_into(keys, (part.pointers + start).tolist())
    else:
        keys = part.images.flatten(1)[:, start : start + length].contiguous().cpu().numpy()
    return keys.view(f"V{keys.shape[1]}")[:, 0].tolist()


def is_cifar10(manifest: Manifest) -> bool:
    """Whether the data has CIFAR-10's layout and ten classes, for which the reports' statistics hold."""
    return manifest.dataset == "cifar10" and tuple(manifest.class_names) == CIFAR10_CLASSES


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
