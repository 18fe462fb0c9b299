"""Pictures of any kind as arrays: one file, or a folder with a folder for each class. What cannot be used is said of each file.

EXIF orientation is applied, CMYK becomes RGB, transparent pixels are put on white. Refused are damaged and truncated files,
animations and several pages, and more than 8 bits a channel, which would have to be cut.
"""

import io
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastcifar.beton import LARGEST, MOST_CLASSES, SMALLEST, Size, printable
from fastcifar.errors import InputError, shortened

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
GREY = ("1", "L", "LA")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_BYTES = 1 << 28  # of a file


@dataclass
class Labelled:
    """Pictures with their classes."""

    images: np.ndarray[Any, Any]  # [N, H, W, 3] uint8
    labels: np.ndarray[Any, Any]  # [N] int64
    class_names: list[str]
    names: list[str]  # of each picture, which decide what is held out for testing
    channels: int = 3  # 1: all are grey
    bad: list[str] = field(default_factory=list)  # one line for each that was left out


def decode(file: Path, formats: tuple[str, ...] = FORMATS, *, only: Size | None = None) -> Image.Image:
    """A picture in mode L or RGB, upright. Raises ValueError saying what is wrong, or whatever else Pillow does.

    only: height and width that it must have, lying or upright, before memory is taken for its pixels.
    """
    if not file.is_file() or file.stat().st_size > MOST_BYTES:
        raise ValueError(f"not a file of at most {MOST_BYTES:,} bytes")
    content = file.read_bytes()
    _require_whole_png(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{image.n_frames} frames or pages")  # type: ignore[attr-defined]
            if only is not None and sorted(image.size) != sorted(only):
                raise ValueError(f"{image.width}x{image.height} pixels")
            deep = any("16" in str(raw_mode) or "32" in str(raw_mode) for *_, raw_mode in image.tile)
            if deep or image.mode.startswith(("I", "F")):  # which Pillow would cut to 8 without a word
                raise ValueError("16 bits a channel or more")
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                clear = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
            return upright.convert("L" if image.mode in GREY else "RGB")


def _require_whole_png(content: bytes) -> None:
    """Raise ValueError where a block of a PNG has another checksum than it says: Pillow skips those of the pixels."""
    start, kind = len(PNG_SIGNATURE), b""
    while content.startswith(PNG_SIGNATURE) and kind != b"IEND":
        end = start + 8 + int.from_bytes(content[start : start + 4])
        kind = content[start + 4 : start + 8]
        if len(content) < end + 4 or zlib.crc32(content[start + 4 : end]) != int.from_bytes(content[end : end + 4]):
            raise ValueError("damaged or cut short")
        start = end + 4


def fitted(image: Image.Image, size: Size) -> Image.Image:
    """Cropped about its centre to the shape of `size` (height, width), then resized; of that size already, as it is."""
    return image if image.size == size[::-1] else ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)


def why(error: Exception) -> str:
    """What was wrong with a picture, in a few words: decoders raise almost anything."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture of a known kind"
    return " ".join(shortened(error).split()) or type(error).__name__


def read_folder(
    folder: Path,
    size: Size | None = None,
    *,
    class_names: list[str] | None = None,
    skip_bad: bool = False,
    advance: Callable[[int], object] = lambda total: None,
) -> Labelled:
    """Read a folder of class folders; classes are numbered by their names' order.

    size: (height, width) to which all are `fitted`; None: all must have one. class_names: those of another split, which these
    must be among. skip_bad: leave out what cannot be used, named in `bad`. advance: called for every picture with how many
    there are. Raises InputError naming the file or folder.
    """
    folders, wanted = class_folders(folder, class_names), size
    names = class_names or [printable(path.name) for path in folders]
    numbers = {name: number for number, name in enumerate(names)}
    files = [(file, numbers[printable(path.name)]) for path in folders for file in picture_files(path)]
    if not files:
        raise InputError(f"{folder} holds no picture in its class folders: fill them, or remove it")
    found = Labelled(np.empty(0), np.empty(0), names, [])
    pixels, labels, modes = [], [], set()
    for file, label in files:
        advance(len(files))
        try:
            image = decode(file)
        except Exception as error:  # Pillow's decoders raise almost anything
            found.bad.append(f"{file}: {why(error)}")
            continue
        size = size or _own_size(file, image)
        if wanted is None and image.size != size[::-1]:
            raise InputError(f"{file} has {_shape(image)} pixels, others {size[1]}x{size[0]}: bring all to one with --size")
        pixels.append(np.asarray(fitted(image, size).convert("RGB")))
        labels.append(label)
        modes.add(image.mode)
        found.names.append(file.relative_to(folder).as_posix())
    if found.bad and not (skip_bad and pixels):
        told = f"{len(found.bad):,} of {len(files):,} pictures cannot be used: {'; '.join(found.bad[:3])}"
        raise InputError(f"{told}; repair or remove them, or leave them out with --skip-bad")
    found.images, found.labels = np.stack(pixels), np.array(labels, np.int64)
    found.channels = 1 if modes == {"L"} else 3
    return found


def _own_size(file: Path, image: Image.Image) -> Size:
    if not SMALLEST <= min(image.size) <= max(image.size) <= LARGEST:
        raise InputError(f"{file} has {_shape(image)} pixels, not {SMALLEST}..{LARGEST} a side: change that with --size")
    return image.height, image.width


def _shape(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def class_folders(folder: Path, class_names: list[str] | None = None) -> list[Path]:
    """The class folders in `folder`, by name. Raises InputError unless there are two classes or more, all with pictures."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name one that holds a folder of pictures for each class")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if class_names is None and len(folders) < 2:
        found = f"only one, {folders[0].name}" if folders else "none"
        raise InputError(f"{folder} must hold a folder of pictures for each of two classes or more, it has {found}")
    if len(folders) > MOST_CLASSES:
        raise InputError(f"{folder} holds {len(folders):,} class folders, more than {MOST_CLASSES:,}: put classes together")
    for path in folders:
        if class_names is not None and printable(path.name) not in class_names:
            raise InputError(f"{path} is a class that the training pictures do not have: remove it, or add training pictures")
        if class_names is None and not picture_files(path):
            raise InputError(f"{path} holds no picture ({', '.join(SUFFIXES)}): remove it, or fill it")
    return folders


def picture_files(folder: Path) -> list[Path]:
    """All pictures in and below a folder, by name; hidden files are none."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in files if not path.is_dir())  # a link to nowhere is a picture that cannot be read
