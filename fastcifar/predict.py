"""Predicts the classes of unlabelled images and writes the class competition's CSV with the columns ID,Labels.

python -m fastcifar.predict --checkpoint runs/se_resnet18-seed0/best.pt --input cifar_test_nolabel.pkl --out submission.csv
"""

import csv
import io
import re
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from fastcifar.arguments import parse_arguments
from fastcifar.beton import SIDE, read_beton
from fastcifar.checkpoint import load
from fastcifar.device import choose_device, choose_precision, set_up_process
from fastcifar.errors import InputError, require, run_command, shortened
from fastcifar.evaluate import TTA, class_probabilities
from fastcifar.files import write_bytes
from fastcifar.safe_pickle import decode_name, load_pickle

MAX_ID = 255  # characters of an ID, as of a file's name
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PNG = 1 << 22  # bytes; 32x32 pixels take 4 kB, profiles and texts beside them vary


@dataclass(frozen=True)
class Options:
    """Predict the class of every image of a pickle, a beton or a folder of PNGs."""

    checkpoint: Path  # last.pt or best.pt of a run folder
    input: Path  # pickle (dict with data, and ids or none), .beton file, or folder of 32x32 PNGs
    out: Path = Path("submission.csv")  # CSV with the columns ID,Labels
    tta: TTA = "flip"  # test-time augmentation: views whose softmax outputs are averaged
    batch_size: int = 500  # images per batch
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the device computes in it
    force: bool = False  # replace --out when it exists

    def __post_init__(self) -> None:
        require(self, self.batch_size >= 1, "batch_size", "at least 1")


@dataclass(frozen=True)
class Unlabelled:
    """Images to predict, with the IDs to report them under."""

    images: np.ndarray  # [N, 32, 32, 3] uint8
    ids: list[str]


def main() -> None:
    """Predict and write the CSV."""
    options = parse_arguments(Options, "python -m fastcifar.predict")
    if options.out.exists() and not options.force:
        raise InputError(f"{options.out} exists: choose another --out, or replace it with --force")
    labels, unlabelled = predict(options)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ID", "Labels"])
    writer.writerows(zip(unlabelled.ids, labels, strict=True))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(options.out, text.getvalue().encode())
    print(f"{options.out}: {len(labels):,} predictions")


def predict(options: Options) -> tuple[list[int], Unlabelled]:
    """Return the predicted class numbers and what they were predicted for. Raises InputError."""
    device = choose_device(options.device)
    set_up_process(device, deterministic=True)
    unlabelled = read_unlabelled(options.input)
    model = load(options.checkpoint, device)
    batches = class_probabilities(
        model,
        torch.from_numpy(unlabelled.images).to(device),
        batch_size=options.batch_size,
        tta=options.tta,
        autocast_dtype=choose_precision(options.precision, device),
    )
    labels: list[int] = []
    for probabilities in batches:
        if not bool(probabilities.isfinite().all()):
            raise InputError(f"{options.checkpoint} predicts NaN or infinity: its training diverged, choose another checkpoint")
        labels += probabilities.argmax(1).tolist()
    return labels, unlabelled


def read_unlabelled(path: Path) -> Unlabelled:
    """Read a folder of PNGs, a beton or a pickle. Raises InputError naming what does not fit.

    IDs go into the CSV as they are, since a competition compares them; so those that a spreadsheet would take for a formula,
    that hold control characters, or that stand for two images are refused rather than altered.
    """
    if path.is_dir():
        unlabelled = _read_folder(path)
    elif not path.exists():
        raise InputError(f"{path} is missing: name a pickle, a .beton file or a folder of PNGs")
    elif path.suffix == ".beton":
        beton = read_beton(path)
        unlabelled = Unlabelled(beton.images, [str(number) for number in beton.index.tolist()])
    else:
        unlabelled = _read_pickle(path)
    (most, times), *_ = Counter(unlabelled.ids).most_common(1)
    if times > 1:
        raise InputError(f"{path} has ID {most!r} {times} times: give every image an ID of its own")
    for name in unlabelled.ids:
        if not name.isprintable() or name[:1] in ("", "=", "+", "@") or (name[0] == "-" and not name[1:].isdecimal()):
            raise InputError(
                f"{path} has ID {name!r}: rename it, an ID must not be empty, a formula or hold control characters"
            )
    return unlabelled


def _read_folder(path: Path) -> Unlabelled:
    """PNGs in the order of the numbers in their names; the ID is the name without `.png`."""
    files = sorted((file for file in path.iterdir() if file.suffix.lower() == ".png"), key=_natural)
    if not files:
        raise InputError(f"{path} holds no .png file: name a folder of 32x32 PNGs")
    images = np.empty((len(files), SIDE, SIDE, 3), np.uint8)
    for number, file in enumerate(files):
        if not file.is_file() or file.stat().st_size > MAX_PNG:
            raise InputError(f"{file} is not a file of at most {MAX_PNG:,} bytes: images must be {SIDE}x{SIDE} PNGs")
        try:
            images[number] = _decode_png(file)
        except Exception as error:  # Pillow's decoder raises almost anything
            problem = " ".join(shortened(error).split())
            raise InputError(
                f"{file} is no {SIDE}x{SIDE} PNG of 8 bits a channel ({problem}): convert it, or get it again"
            ) from None
    return Unlabelled(images, [file.stem for file in files])


def _decode_png(file: Path) -> np.ndarray[Any, Any]:
    """Pixels [32, 32, 3] of a PNG of at most 8 bits a channel. Raises ValueError, or whatever Pillow does.

    Every block's checksum is compared, since Pillow skips those of the pixels, and zlib's own where the block is cut short.
    """
    content = file.read_bytes()
    start, kind = len(PNG_SIGNATURE), b""
    while content.startswith(PNG_SIGNATURE) and kind != b"IEND":
        end = start + 8 + int.from_bytes(content[start : start + 4])
        kind = content[start + 4 : start + 8]
        if len(content) < end + 4 or zlib.crc32(content[start + 4 : end]) != int.from_bytes(content[end : end + 4]):
            raise ValueError("damaged or cut short")
        start = end + 4
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        if image.size != (SIDE, SIDE):
            raise ValueError(f"{image.width}x{image.height} pixels instead of {SIDE}x{SIDE}")
        if any("16" in str(raw_mode) for *_, raw_mode in image.tile):  # which Pillow would cut to 8 without a word
            raise ValueError("16 bits a channel")
        return np.asarray(image.convert("RGB"))


def _natural(file: Path) -> list[Any]:
    """`img2` before `img10`: text and numbers compared each in their own way."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", file.stem) if part]


def _read_pickle(path: Path) -> Unlabelled:
    """The competition's dict: `data` uint8 [N, 32, 32, 3], [N, 3, 32, 32] or rows [N, 3072] channel first; `ids`, or 0..N-1."""
    content = load_pickle(path)
    data = content.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim < 2 or not len(data):
        raise InputError(f"{path} has no entry data of uint8 images: is it the competition's pickle?")
    if data.shape[1:] == (SIDE, SIDE, 3):
        images = data
    elif data.shape[1:] in ((3 * SIDE * SIDE,), (3, SIDE, SIDE)):
        images = data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    else:
        raise InputError(f"{path}: data has shape {list(data.shape)}, not [N, 32, 32, 3] or [N, 3072]: is it the right file?")
    ids = _read_ids(content.get("ids", np.arange(len(images))), len(images), path)
    return Unlabelled(np.array(images, order="C"), ids)


def _read_ids(ids: Any, count: int, path: Path) -> list[str]:
    """`count` IDs as text; a list or one-dimensional array of whole numbers or text."""
    if not isinstance(ids, list | tuple) and not (isinstance(ids, np.ndarray) and ids.ndim == 1):
        raise InputError(f"{path}: ids is not a list of numbers or names: is it the right file?")
    if len(ids) != count:
        raise InputError(f"{path}: {count} images but {len(ids)} ids: is the file whole?")
    entries = ids.tolist() if isinstance(ids, np.ndarray) else ids
    if not all(isinstance(entry, int | str | bytes) and not isinstance(entry, bool) for entry in entries):
        raise InputError(f"{path}: ids is not a list of numbers or names: is it the right file?")
    for entry in entries:
        if isinstance(entry, int) and entry.bit_length() > 64:
            raise InputError(f"{path}: an id is {shortened(entry)}: is it the right file?")
        if isinstance(entry, bytes | str) and len(entry) > MAX_ID:
            raise InputError(f"{path}: an id is a text of {len(entry)} characters, more than {MAX_ID}: is it the right file?")
    return [decode_name(entry) if isinstance(entry, bytes) else str(entry) for entry in entries]


if __name__ == "__main__":
    run_command(main)
