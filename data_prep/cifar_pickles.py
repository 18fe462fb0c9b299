"""Finds, checks and reads CIFAR's official pickles, and tells by their md5 whether they are the official archive."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.beton import printable
from fastcifar.errors import InputError, shortened
from fastcifar.safe_pickle import decode_name, load_pickle

ROW = 3072  # bytes of one image: 1024 red, 1024 green, 1024 blue, each row by row


@dataclass(frozen=True)
class Layout:
    """How one of the two datasets is laid out as pickles."""

    folder: str
    splits: dict[str, dict[str, str]]  # split -> {file name: md5 in the official archive}
    meta: dict[str, str]  # the file with the class names, likewise
    labels_key: str
    names_key: str
    classes: int


LAYOUTS = {
    "cifar10": Layout(
        folder="cifar-10-batches-py",
        splits={
            "train": {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
        },
        meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        labels_key="labels",
        names_key="label_names",
        classes=10,
    ),
    "cifar100": Layout(
        folder="cifar-100-python",
        splits={
            "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
            "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        },
        meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
        labels_key="fine_labels",
        names_key="fine_label_names",
        classes=100,
    ),
}


@dataclass(frozen=True)
class Split:
    """One split, as the pickles have it."""

    images: np.ndarray  # [N, 32, 32, 3] uint8
    labels: np.ndarray  # [N] int64
    class_names: list[str]


def find_pickles(source: Path, layout: Layout) -> Path:
    """Return the folder that holds the pickles: `source` itself, or the dataset's folder inside it.

    Raises InputError naming the first missing file.
    """
    wanted = _file_names(layout)
    for folder in (source, source / layout.folder):
        if is_complete(folder, layout):
            return folder
    if not source.is_dir():
        raise InputError(f"{source} is not a folder: name the one that holds {layout.folder}")
    shown = source / layout.folder if (source / layout.folder).is_dir() else source
    missing = next(name for name in wanted if not (shown / name).is_file())
    raise InputError(f"{shown} has no file {missing}: name the folder that holds {', '.join(wanted)}")


def is_complete(folder: Path, layout: Layout) -> bool:
    """Whether a folder has every file of the layout."""
    return all((folder / name).is_file() for name in _file_names(layout))


def has_any(source: Path, layout: Layout) -> bool:
    """Whether a folder looks like the pickles', complete or not."""
    return (source / layout.folder).is_dir() or any((source / name).is_file() for name in _file_names(layout))


def _file_names(layout: Layout) -> list[str]:
    return [name for split in layout.splits.values() for name in split] + list(layout.meta)


def digests(folder: Path, layout: Layout, split: str, algorithm: str) -> dict[str, str]:
    """Return {file name: digest} of a split's pickles and the class names' file. algorithm: "md5" or "sha256"."""
    found = {}
    for name in (*layout.splits[split], *layout.meta):
        with open(folder / name, "rb") as file:
            found[name] = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    return found


def is_official(md5: dict[str, str], layout: Layout) -> bool:
    """Whether every file has the official archive's md5."""
    official = {name: digest for part in (*layout.splits.values(), layout.meta) for name, digest in part.items()}
    return all(official[name] == digest for name, digest in md5.items())


def read_split(folder: Path, layout: Layout, split: str) -> Split:
    """Read all pickles of one split. Raises InputError naming the file for anything that is not valid CIFAR data."""
    class_names = _read_class_names(folder / next(iter(layout.meta)), layout)
    parts = [_read_batch(folder / name, layout) for name in layout.splits[split]]
    rows = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    images = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Split(images, labels, class_names)


def _read_batch(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [N, 3072] uint8 and labels [N] int64 of one pickle."""
    batch = load_pickle(path)
    rows = _entry(batch, "data", path)
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != ROW:
        what = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise InputError(f"{path}: data is {what}, not uint8 [N, {ROW}]: get the file again")
    listed = _entry(batch, layout.labels_key, path)
    if not isinstance(listed, list) and not (isinstance(listed, np.ndarray) and listed.ndim == 1):
        raise InputError(f"{path}: {layout.labels_key} is not a list of whole numbers: get the file again")
    if len(rows) == 0 or len(rows) != len(listed):
        raise InputError(f"{path}: {len(rows)} images but {len(listed)} labels: get the file again")
    if isinstance(listed, np.ndarray):
        listed = listed.tolist()
    if not all(isinstance(label, int) and not isinstance(label, bool) for label in listed):
        raise InputError(f"{path}: {layout.labels_key} is not a list of whole numbers: get the file again")
    if min(listed) < 0 or max(listed) >= layout.classes:
        wrong = next(label for label in listed if not 0 <= label < layout.classes)
        raise InputError(f"{path}: label {shortened(wrong)} is outside 0..{layout.classes - 1}: get the file again")
    return rows, np.array(listed, np.int64)


def _read_class_names(path: Path, layout: Layout) -> list[str]:
    names = _entry(load_pickle(path), layout.names_key, path)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise InputError(f"{path}: {layout.names_key} is not a list of class names: get the file again")
    if len(names) != layout.classes:
        raise InputError(
            f"{path} names {len(names)} classes, this layout has {layout.classes}: only CIFAR-10's layout and "
            "CIFAR-100's (--dataset cifar100) can be converted"
        )
    return [printable(decode_name(name)) for name in names]


def _entry(batch: dict[str, Any], key: str, path: Path) -> Any:
    if key not in batch:
        found = shortened(", ".join(sorted(batch)) or "none")
        raise InputError(f"{path} has no entry {key!r} (it has {found}): is it the right dataset?")
    return batch[key]
