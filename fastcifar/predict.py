"""Predicts the classes of unlabelled images and writes the class competition's CSV with the columns ID,Labels.

python -m fastcifar.predict --checkpoint runs/se_resnet18-seed0/best.pt --input cifar_test_nolabel.pkl --out submission.csv
"""

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastcifar.arguments import parse_arguments
from fastcifar.beton import SIDE, Size, read_beton
from fastcifar.checkpoint import load
from fastcifar.device import choose_device, choose_precision, set_up_process
from fastcifar.errors import InputError, require, run_command, shortened
from fastcifar.evaluate import ALIKE, TTA, class_probabilities, require_views
from fastcifar.files import write_bytes
from fastcifar.pictures import MOST_BYTES, SUFFIXES, decode, fitted
from fastcifar.safe_pickle import decode_name, load_pickle

MAX_ID = 255  # characters of an ID, as of a file's name
MOST_OWN_BYTES = 1 << 22  # of a picture that is not to be resized; 32x32 pixels take 4 kB, profiles and texts beside them vary
CIFAR: Size = (SIDE, SIDE)


@dataclass(frozen=True)
class Options:
    """Predict the class of every image of a pickle, a beton or a folder of pictures."""

    checkpoint: Path  # last.pt or best.pt of a run folder
    input: Path  # pickle (dict with data, and ids or none), .beton file, or folder of pictures
    out: Path = Path("submission.csv")  # CSV with the columns ID,Labels
    tta: TTA = "flip"  # test-time augmentation: views whose softmax outputs are averaged
    centre_weight: float = ALIKE  # flip_translate: weight of the two views in place together, 0..1; 1/3: all six count alike
    resize: bool = False  # pictures of another size than the model's: crop them about their centre and resize them to it
    batch_size: int = 500  # images per batch
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the device computes in it
    force: bool = False  # replace --out when it exists

    def __post_init__(self) -> None:
        require_views(self.tta, self.centre_weight)
        require(self, self.batch_size >= 1, "batch_size", "at least 1")


@dataclass(frozen=True)
class Unlabelled:
    """Images to predict, with the IDs to report them under."""

    images: np.ndarray  # [N, H, W, 3] uint8
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
    model = load(options.checkpoint, device)
    unlabelled = read_unlabelled(options.input, model.preprocessing.size, resize=options.resize)
    batches = class_probabilities(
        model,
        torch.from_numpy(unlabelled.images).to(device),
        batch_size=options.batch_size,
        tta=options.tta,
        centre_weight=options.centre_weight,
        autocast_dtype=choose_precision(options.precision, device),
    )
    labels: list[int] = []
    for probabilities in batches:
        if not bool(probabilities.isfinite().all()):
            raise InputError(f"{options.checkpoint} predicts NaN or infinity: its training diverged, choose another checkpoint")
        labels += probabilities.argmax(1).tolist()
    return labels, unlabelled


def read_unlabelled(path: Path, size: Size = CIFAR, *, resize: bool = False) -> Unlabelled:
    """Read a folder of pictures, a beton or a pickle, whose images have `size`. Raises InputError naming what does not fit.

    resize: pictures of another size are brought to it.

    IDs go into the CSV as they are, since a competition compares them; so those that a spreadsheet would take for a formula,
    that hold control characters, or that stand for two images are refused rather than altered.
    """
    if path.is_dir():
        unlabelled = _read_folder(path, size, resize)
    elif not path.exists():
        raise InputError(f"{path} is missing: name a pickle, a .beton file or a folder of pictures")
    elif path.suffix == ".beton":
        beton = read_beton(path)
        if beton.manifest.size != size:
            raise InputError(f"{path} has images of {_shape(beton.manifest.size)} pixels, the checkpoint's have {_shape(size)}")
        unlabelled = Unlabelled(beton.images, [str(number) for number in beton.index.tolist()])
    else:
        unlabelled = _read_pickle(path, size)
    (most, times), *_ = Counter(unlabelled.ids).most_common(1)
    if times > 1:
        raise InputError(f"{path} has ID {most!r} {times} times: give every image an ID of its own")
    for name in unlabelled.ids:
        if not name.isprintable() or name[:1] in ("", "=", "+", "@") or (name[0] == "-" and not name[1:].isdecimal()):
            raise InputError(
                f"{path} has ID {name!r}: rename it, an ID must not be empty, a formula or hold control characters"
            )
    return unlabelled


def _read_folder(path: Path, size: Size, resize: bool) -> Unlabelled:
    """Pictures in the order of the numbers in their names; the ID is the name without `.png`."""
    files = sorted((file for file in path.iterdir() if file.suffix.lower() in SUFFIXES), key=_natural)
    if not files:
        raise InputError(f"{path} holds no .png file, nor another picture: name a folder of {_shape(size)} pictures")
    images, most = np.empty((len(files), *size, 3), np.uint8), MOST_BYTES if resize else MOST_OWN_BYTES
    for number, file in enumerate(files):
        if not file.is_file() or file.stat().st_size > most:
            raise InputError(f"{file} is not a file of at most {most:,} bytes: images must be {_shape(size)} pictures")
        try:
            image = decode(file, only=None if resize else size)
            if not resize and image.size != size[::-1]:
                raise ValueError(f"{image.width}x{image.height} pixels")
            images[number] = np.asarray(fitted(image, size).convert("RGB"))
        except Exception as error:  # Pillow's decoder raises almost anything
            problem = " ".join(shortened(error).split())
            what = f"{file} is no {_shape(size)} picture of 8 bits a channel ({problem})"
            raise InputError(f"{what}: convert it, get it again, or let --resize fit it") from None
    return Unlabelled(images, [file.stem for file in files])


def _shape(size: Size) -> str:
    """For messages: width x height."""
    return f"{size[1]}x{size[0]}"


def _natural(file: Path) -> list[Any]:
    """`img2` before `img10`: text and numbers compared each in their own way."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", file.stem) if part]


def _read_pickle(path: Path, size: Size) -> Unlabelled:
    """The competition's dict: `data` uint8 [N, H, W, 3], [N, 3, H, W] or rows [N, 3 H W] channel first; `ids`, or 0..N-1."""
    content = load_pickle(path)
    data = content.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim < 2 or not len(data):
        raise InputError(f"{path} has no entry data of uint8 images: is it the competition's pickle?")
    row = 3 * size[0] * size[1]
    if data.shape[1:] == (*size, 3):
        images = data
    elif data.shape[1:] in ((row,), (3, *size)):
        images = data.reshape(-1, 3, *size).transpose(0, 2, 3, 1)
    else:
        wanted = f"[N, {size[0]}, {size[1]}, 3] or [N, {row}]"
        raise InputError(f"{path}: data has shape {list(data.shape)}, not {wanted}: is it the right file?")
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
