"""Experiments on the training data itself: which of its images are used, and with what labels."""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcifar.errors import InputError
from kernels.philox import Purpose, below, philox, uniform


def listed(index: Tensor, path: Path) -> tuple[Tensor, str]:
    """Positions [K] in `index` [N] of the sample numbers that a file lists, ascending, and the file's sha256.

    path: an array of integers [K] as .npy, or text with numbers in any layout, each once. Raises InputError.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: name a .npy or text file with the numbers of the images to train on")
    content = path.read_bytes()
    try:
        wanted = np.load(io.BytesIO(content), allow_pickle=False) if path.suffix == ".npy" else _numbers(content)
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu" or not len(wanted):
            raise ValueError("another dtype or shape")
    except (ValueError, EOFError, OverflowError):
        raise InputError(f"{path} is no list of whole numbers: write each image's once, as an array or as text") from None
    numbers, counts = np.unique(wanted, return_counts=True)
    if counts.max() > 1:
        raise InputError(f"{path} has number {numbers[counts.argmax()]} {counts.max()} times: write each image's once")
    known = index.cpu().numpy()
    unknown = np.setdiff1d(numbers, known)
    if len(unknown):
        raise InputError(f"{path} has number {unknown[0]}, the training images are 0..{known.max()}: are these other data's?")
    positions = torch.from_numpy(np.flatnonzero(np.isin(known, numbers))).to(index.device)
    return positions, hashlib.sha256(content).hexdigest()


def _numbers(content: bytes) -> np.ndarray:
    return np.array([int(word) for word in content.split()], np.int64)


def mislabelled(labels: Tensor, index: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Labels [N], each replaced with probability `share` by one of the other classes with equal chances.

    Drawn at (seed, sample number in `index` [N]) alone: the same images have the same wrong labels in any subset.
    """
    whether, which, _, _ = philox(seed, index, 0, Purpose.LABEL_NOISE)
    others = (labels + 1 + below(which, classes - 1)) % classes
    return torch.where(uniform(whether) < share, others, labels)
