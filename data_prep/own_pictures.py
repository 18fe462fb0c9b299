"""Other data than CIFAR, as a training and a test split: a folder of class folders, or a NumPy archive."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastcifar.beton import LARGEST, MOST_CLASSES, SMALLEST, Size, printable
from fastcifar.errors import InputError
from fastcifar.pictures import SUFFIXES, Labelled, fitted, read_folder, why

# Names of images and labels in archives, of training and of testing: Keras', MedMNIST's, and plain ones.
ENTRIES = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", "test_images", "test_labels"),
)
Advance = Callable[[int], object]


def parse_size(text: str) -> Size:
    """`64` or `96x64`, width x height in pixels, as (height, width). Raises InputError."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and SMALLEST <= int(side[:4]) <= LARGEST for side in sides):
        raise InputError(f"size must be 64 or WIDTHxHEIGHT, as 96x64, {SMALLEST}..{LARGEST} pixels each, got {text}")
    return int(sides[-1]), int(sides[0])


def is_own(source: Path) -> bool:
    """Whether a source is an archive, or a folder with folders or pictures in it."""
    found = source.iterdir() if source.is_dir() else ()
    return source.suffix == ".npz" or any(path.is_dir() or path.suffix.lower() in SUFFIXES for path in found)


def read_splits(source: Path, size: Size | None, test_fraction: float, skip_bad: bool, advance: Advance) -> dict[str, Labelled]:
    """Read both splits: those the source has, `train` with `test` or `val`, else a share of each class is held out for testing.

    advance: called for every picture with how many there are. Raises InputError naming the file.
    """
    if source.suffix == ".npz":
        parts = _read_archive(source, size)
    else:
        tests = [source / name for name in ("test", "val") if (source / name).is_dir()]
        folders = [source / "train", tests[0]] if tests and (source / "train").is_dir() else [source]
        parts = []
        for folder in folders:
            names = parts[0].class_names if parts else None
            parts.append(read_folder(folder, size, class_names=names, skip_bad=skip_bad, advance=advance))
    if len(parts) == 1:
        parts = hold_out(parts[0], test_fraction)
    train, test = parts
    if train.images.shape[1:] != test.images.shape[1:]:
        sizes = " and ".join(f"{part.images.shape[2]}x{part.images.shape[1]}" for part in parts)
        raise InputError(f"{source}: its training and test pictures have {sizes} pixels: bring all to one size with --size")
    train.channels = test.channels = max(train.channels, test.channels)
    return {"train": train, "test": test}


def hold_out(found: Labelled, fraction: float) -> list[Labelled]:
    """Part into training and test pictures; of each class those are held out whose names' hashes come first.

    The same names give the same parts. Raises InputError where a class has only one picture.
    """
    keys = np.array([hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest() for name in found.names])
    order = np.lexsort((keys, found.labels))
    counts = np.bincount(found.labels, minlength=len(found.class_names))
    if counts.min() < 2:
        name = found.class_names[int(counts.argmin())]
        raise InputError(f"class {name} has {counts.min()} pictures, too few to hold one out: add some, or remove it")
    starts = np.cumsum(counts) - counts
    held = np.zeros(len(order), bool)
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        held[order[start : start + min(count - 1, max(1, round(count * fraction)))]] = True
    return [_subset(found, np.flatnonzero(part)) for part in (~held, held)]


def _subset(found: Labelled, rows: np.ndarray[Any, Any]) -> Labelled:
    names = [found.names[row] for row in rows]
    return Labelled(found.images[rows], found.labels[rows], found.class_names, names, found.channels, found.bad)


def _read_archive(path: Path, size: Size | None) -> list[Labelled]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            entries = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise InputError(f"{path} is missing: name a NumPy archive or a folder of class folders") from None
    except Exception as error:  # damaged archives raise almost anything
        raise InputError(f"{path} is no NumPy archive of plain arrays ({why(error)}): write it again with np.savez") from None
    known = next((names for names in ENTRIES if {*names[:2]} <= set(entries)), None)
    if known is None:
        has = ", ".join(map(printable, entries)) or "none"
        raise InputError(f"{path} must have entries x_train and y_train, or images and labels, it has {has}")
    pairs = [known[first : first + 2] for first in (0, 2) if known[first] in entries]
    labels = [_labels(path, pair[1], entries) for pair in pairs]
    classes = 1 + max(int(part.max()) for part in labels)
    names = [printable(str(name)) for name in entries.get("class_names", np.arange(classes)).reshape(-1).tolist()]
    if not 2 <= classes <= len(names) <= MOST_CLASSES:
        raise InputError(f"{path}: labels have {classes:,} classes, {len(names):,} are named, 2..{MOST_CLASSES:,} can be used")
    parts = []
    for pair, numbers in zip(pairs, labels, strict=True):
        images, channels = _images(path, pair[0], entries[pair[0]], size)
        if len(images) != len(numbers):
            raise InputError(f"{path}: {len(images):,} {pair[0]} but {len(numbers):,} {pair[1]}: write it again")
        parts.append(Labelled(images, numbers, names, [str(number) for number in range(len(images))], channels))
    return parts


def _labels(path: Path, name: str, entries: dict[str, Any]) -> np.ndarray[Any, Any]:
    labels = entries.get(name, np.empty(0)).reshape(-1)
    if not len(labels) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise InputError(f"{path}: {name} must be class numbers from 0 on [N], got {labels.dtype} [{len(labels)}]")
    return labels.astype(np.int64)


def _images(path: Path, name: str, images: np.ndarray[Any, Any], size: Size | None) -> tuple[np.ndarray[Any, Any], int]:
    """Images [N, H, W, 3] and how many channels they had."""
    shaped = images[..., None] if images.ndim == 3 else images
    channels = shaped.shape[-1] if shaped.ndim == 4 else 0
    if images.dtype != np.uint8 or channels not in (1, 3):
        got = f"{images.dtype} {list(images.shape)}"
        raise InputError(f"{path}: {name} must be uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3], got {got}")
    colour = np.ascontiguousarray(np.broadcast_to(shaped, (*shaped.shape[:3], 3)))
    if size is not None:
        colour = np.stack([np.asarray(fitted(Image.fromarray(image), size)) for image in colour])
    elif not SMALLEST <= min(colour.shape[1:3]) <= max(colour.shape[1:3]) <= LARGEST:
        got = f"{colour.shape[2]}x{colour.shape[1]}"
        raise InputError(f"{path}: {name} have {got} pixels, not {SMALLEST}..{LARGEST} a side: change that with --size")
    return colour, channels
