"""Reads `.beton` files and their manifests, every pointer checked before it is followed.

The one home of the format as fastcifar uses it: FFCV version 2, fields `image` (RGB, raw), `label`, `index`.

    header 24 B | 3 field descriptors of 1041 B | metadata, 32 B a sample | zeros | pages of pixels | allocation table

FFCV's own reader checks nothing of this: it follows a zeroed pointer into a segmentation fault. Here the file is read
once, hashed, and every pointer is compared with the region it must lie in before a pixel is touched.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar import files
from fastcifar.errors import InputError, shortened

SIDE = 32  # pixels of a CIFAR image's side
SMALLEST, LARGEST = 8, 256  # pixels of an image's side
Size = tuple[int, int]  # height and width, pixels
IMAGE_BYTES = SIDE * SIDE * 3  # of a CIFAR image
MOST_CLASSES = 65_535

VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD_DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
IMAGE_METADATA = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE_METADATA = np.dtype([("image", IMAGE_METADATA), ("label", "<i8"), ("index", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

FIELDS = (("image", 2), ("label", 1), ("index", 1))  # name and FFCV's type number: 2 = RGBImageField, 1 = IntField
MODE_RAW = 1  # FFCV's number for uncompressed pixels

MAX_MANIFEST = 1 << 25  # bytes; CIFAR-100's has 4 kB, 65,535 long names more than a megabyte
MAX_NAME = 200  # characters of a data set's or a class's name
REWRITE = "write it again with `python data_prep/write_beton.py --force`"


@dataclass(frozen=True)
class Manifest:
    """What stands beside a beton: what the data is, where it came from, and the hash that ties both files together."""

    dataset: str  # "cifar10", "cifar100", or "own" for other pictures
    split: str  # "train" or "test"
    name: str  # what banners, reports and plots call this data
    count: int  # images
    class_names: list[str]
    mean: list[float]  # per channel R, G, B of this split, in 0..1
    std: list[float]
    sha256: str  # of the beton file
    official: bool  # every source file has the md5 of the official archive's
    synthetic: bool  # a synthetic dataset: accuracy means nothing
    source_md5: dict[str, str] = field(default_factory=dict)  # pickle's name -> md5
    source_sha256: dict[str, str] = field(default_factory=dict)  # likewise; none: written by version 0.2 or before
    versions: dict[str, str | None] = field(default_factory=dict)  # of what wrote the file
    height: int = SIDE  # pixels, of every image; like `width` and `channels` not written where it is CIFAR's
    width: int = SIDE
    channels: int = 3  # 1: grey images, stored as three equal channels

    @property
    def size(self) -> Size:
        """Height and width of every image."""
        return self.height, self.width

    def encoded(self) -> bytes:
        """This manifest as JSON; its last entry is the sha256 of the others, so that no changed byte passes."""
        values = {name: value for name, value in asdict(self).items() if (name, value) not in USUAL.items()}
        own = hashlib.sha256(json.dumps(values, allow_nan=False).encode()).hexdigest()
        return (json.dumps(values | {"manifest_sha256": own}, indent=2) + "\n").encode()

    def save(self, beton: Path) -> None:
        """Write this manifest beside `beton`, atomically."""
        files.write_bytes(manifest_path(beton), self.encoded())

    @classmethod
    def load(cls, beton: Path) -> "Manifest":
        """Read the manifest beside `beton`. Raises InputError when it is missing, not as it was written, or of wrong types.

        Manifests of version 0.2 and before have no hash of themselves: `read_beton` computes their statistics again.
        """
        path = manifest_path(beton)
        _require_regular(path, MAX_MANIFEST)
        values: Any = files.read_json(path, remedy=REWRITE)
        expected = {entry.name for entry in fields(cls)}
        written = set(values) | set(USUAL) if isinstance(values, dict) else set()
        older = written == expected - {"source_sha256"}
        if not older and written != expected | {"manifest_sha256"}:
            raise InputError(f"{path} does not have the fields of a manifest of this version: {REWRITE}")
        manifest = cls(**{name: value for name, value in values.items() if name in expected})
        for name, is_valid in VALID.items():
            if not is_valid(getattr(manifest, name)):
                raise InputError(f"{path}: {name} cannot be {shortened(getattr(manifest, name))!r}: {REWRITE}")
        if not older and path.read_bytes() != manifest.encoded():
            raise InputError(f"{path} is not as it was written, by its own sha256: {REWRITE}")
        return manifest


@dataclass(frozen=True)
class Beton:
    """A beton's content, in the order in which its samples are stored."""

    images: np.ndarray  # [N, H, W, 3] uint8
    labels: np.ndarray  # [N] int64
    index: np.ndarray  # [N] int64, each sample's index in the source, which keys its randomness
    manifest: Manifest


def printable(name: str) -> str:
    """A name that any file may have made up, for terminals and pages: no control character, and not too long."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:MAX_NAME])[:MAX_NAME]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value == printable(value)


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) and 0 <= v <= 1 for v in value)


def _maps_names(value: object) -> bool:
    return isinstance(value, dict) and all(entry is None or _is_name(entry) for entry in (*value, *value.values()))


USUAL = {"height": SIDE, "width": SIDE, "channels": 3}  # CIFAR's, which manifests do not write
# What a manifest's fields may be.
VALID: dict[str, Callable[[Any], bool]] = {
    "dataset": lambda value: value in ("cifar10", "cifar100", "own"),
    "split": lambda value: value in ("train", "test"),
    "name": _is_name,
    "count": lambda value: type(value) is int and value > 0,
    "class_names": lambda value: isinstance(value, list) and 0 < len(value) <= MOST_CLASSES and all(map(_is_name, value)),
    **dict.fromkeys(("mean", "std"), _is_colour),
    "sha256": _is_name,
    **dict.fromkeys(("official", "synthetic"), lambda value: isinstance(value, bool)),
    **dict.fromkeys(("source_md5", "source_sha256", "versions"), _maps_names),
    **dict.fromkeys(("height", "width"), lambda value: type(value) is int and SMALLEST <= value <= LARGEST),
    "channels": lambda value: value in (1, 3),
}


def manifest_path(beton: Path) -> Path:
    """`train.beton` -> `train.json`, in the same folder."""
    return beton.with_suffix(".json")


def read_beton(path: Path, *, verify: bool = True) -> Beton:
    """Read and check a beton with its manifest.

    verify: also compare the file's sha256 with the manifest's (about 0.1 s); pointers, counts and label ranges are
    always checked. Raises InputError naming the file and the remedy.
    """
    manifest = load_manifest(path)
    content = path.read_bytes()  # one immutable copy: what was checked is what is used
    images, labels, index = parse(content, path)
    check_content(path, manifest, images.shape[1:3], labels, hashlib.sha256(content).hexdigest() if verify else None)
    if verify and not manifest.source_sha256:
        check_statistics(path, manifest, in_parts(images))
    return Beton(images, labels, index, manifest)


def load_manifest(path: Path) -> Manifest:
    """The manifest of the beton at `path`: of the split of that name, and of a file not far larger than it says.

    Raises InputError.
    """
    if not path.exists():
        raise InputError(f"{path} is missing: write it with `python data_prep/write_beton.py --out {path.parent}`")
    manifest = Manifest.load(path)
    if path.stem in ("train", "test") and path.stem != manifest.split:
        raise InputError(f"{path} is the {manifest.split} split under another name: {REWRITE}")
    _require_regular(
        path, 2 * 3 * manifest.height * manifest.width * manifest.count + (64 << 20)
    )  # FFCV fills up two pages, of 8 MiB by default
    return manifest


def _require_regular(path: Path, limit: int) -> None:
    if path.exists() and not path.is_file():  # a pipe or device may have no end
        raise InputError(f"{path} is not a file: {REWRITE}")
    if path.exists() and path.stat().st_size > limit:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes, far more than it needs: {REWRITE}")


def in_parts(images: np.ndarray) -> Iterable[np.ndarray]:
    """Images a thousand at a time."""
    return (images[first : first + 1000] for first in range(0, len(images), 1000))


def channel_statistics(parts: Iterable[np.ndarray]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in 0..1, of parts [N, H, W, 3] uint8; exact, from histograms."""
    counts = np.zeros((3, 256), np.int64)
    for part in parts:
        for channel in range(3):
            counts[channel] += np.bincount(part[..., channel].reshape(-1), minlength=256)
    share, values = counts / counts[0].sum(), np.arange(256) / 255
    mean = [float(channel @ values) for channel in share]
    return mean, [float(np.sqrt(channel @ (values - m) ** 2)) for channel, m in zip(share, mean, strict=True)]


def check_statistics(path: Path, manifest: Manifest, parts: Iterable[np.ndarray]) -> None:
    """Raise InputError unless the manifest's mean and standard deviation are those of the images."""
    measured = channel_statistics(parts)
    if not np.allclose(measured, (manifest.mean, manifest.std), rtol=0, atol=1e-9):  # sums may round in another order
        raise InputError(f"{manifest_path(path)} has another mean or std than the images: {REWRITE}")


def check_content(
    path: Path, manifest: Manifest, size: tuple[int, ...], labels: np.ndarray, sha256: str | None, limit: int = 0
) -> None:
    """Raise InputError unless a beton's content is what its manifest says. sha256: of the file; None: not compared.

    size: height and width of its images. limit: how many samples were asked for, 0 = all.
    """
    if sha256 is not None and sha256 != manifest.sha256:
        raise InputError(f"{path} does not have the sha256 of its manifest (a byte changed): {REWRITE}")
    if size != manifest.size:
        found, said = ("x".join(map(str, pair[::-1])) for pair in (size, manifest.size))
        raise InputError(f"{path} holds images of {found} pixels, its manifest says {said}: {REWRITE}")
    if len(labels) != manifest.count:
        said = shortened(manifest.count)
        raise InputError(f"{path} holds {len(labels)} images, its manifest says {said}: {REWRITE}")
    if labels.max() >= len(manifest.class_names):
        raise InputError(f"{path} has label {labels.max()} for {len(manifest.class_names)} classes: {REWRITE}")
    if limit > len(labels):
        raise InputError(f"{path} holds {len(labels):,} images, {limit:,} were asked for: lower the limit")


def parse(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images [N, H, W, 3] uint8, labels [N] and index [N] int64 of a beton's bytes, every bound checked.

    path: named in errors only. Raises InputError.
    """
    view = memoryview(content)
    pointers, labels, index, size = layout(lambda start, length: view[start : start + length], len(content), path)
    return _gather_images(content, pointers, size), labels, index


def layout(read: Callable[[int, int], Any], size: int, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, Size]:
    """Where each image begins [N], labels [N] and index [N], int64, and the images' size, of a beton, every bound checked.

    read: (start, length) -> those bytes. size: of the file, in bytes. path: named in errors only. Raises InputError.
    """

    def demand(condition: bool, problem: str) -> None:
        if not condition:
            raise InputError(f"{path} is damaged ({problem}): {REWRITE}")

    metadata_start = HEADER.itemsize + len(FIELDS) * FIELD_DESCRIPTOR.itemsize
    demand(size >= metadata_start, f"{size} bytes are too few for a header")
    header = np.frombuffer(read(0, HEADER.itemsize), HEADER)[0]
    if header["version"] != VERSION:
        raise InputError(f"{path} has beton version {header['version']}, this reads version {VERSION}: {REWRITE}")
    demand(header["num_fields"] == len(FIELDS), f"{header['num_fields']} fields instead of {len(FIELDS)}")
    descriptors = np.frombuffer(read(HEADER.itemsize, metadata_start - HEADER.itemsize), FIELD_DESCRIPTOR)
    found = tuple((bytes(d["name"]).rstrip(b"\0").decode("latin1"), int(d["type_id"])) for d in descriptors)
    demand(found == FIELDS, f"fields {found} instead of {FIELDS}")

    # Python integers from here on: a pointer near 2^64 must not wrap around into bounds.
    count, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
    metadata_end = metadata_start + count * SAMPLE_METADATA.itemsize
    demand(count > 0, "no samples")
    demand(metadata_end <= table_start <= size, f"allocation table at byte {table_start} of {size}")
    demand(
        size - table_start == count * ALLOCATION.itemsize,
        f"allocation table of {size - table_start} bytes for {count} samples: the file is truncated or extended",
    )
    metadata = np.frombuffer(read(metadata_start, metadata_end - metadata_start), SAMPLE_METADATA)
    table = np.frombuffer(read(table_start, size - table_start), ALLOCATION)

    image = metadata["image"]
    demand(bool(np.all(image["mode"] == MODE_RAW)), "an image is not stored raw")
    height, width = int(image["height"][0]), int(image["width"][0])
    demand(min(height, width) >= SMALLEST and max(height, width) <= LARGEST, f"an image is {width}x{height}")
    alike = (image["width"] == width) & (image["height"] == height)
    demand(bool(np.all(alike)), f"an image is not {width}x{height} as the first one is")
    pointers, image_bytes = image["data_ptr"], height * width * 3
    demand(image_bytes <= table_start, "no room for an image")
    in_bounds = (pointers >= metadata_end) & (pointers <= table_start - image_bytes)
    demand(bool(np.all(in_bounds)), "an image pointer leaves the file's data region")
    demand(bool(np.all(np.diff(np.sort(pointers)) >= image_bytes)), "two images overlap")
    by_sample = table[np.argsort(table["sample_id"], kind="stable")]
    agree = (by_sample["sample_id"] == np.arange(count)) & (by_sample["ptr"] == pointers)
    demand(bool(np.all(agree & (by_sample["size"] == image_bytes))), "allocation table and image pointers disagree")

    labels, index = metadata["label"].copy(), metadata["index"].copy()
    demand(bool(labels.min() >= 0), f"label {labels.min()}")
    demand(bool(np.array_equal(np.sort(index), np.arange(count))), "the sample indices are not 0..N-1")
    return pointers.astype(np.int64), labels, index, (height, width)


def _gather_images(content: bytes, pointers: np.ndarray, size: Size) -> np.ndarray:
    """Copy images [N, H, W, 3] out of `content`: pages hold them back to back, so a few long slices fetch them all."""
    image_bytes = size[0] * size[1] * 3
    images = np.empty((len(pointers), image_bytes), np.uint8)
    source = np.frombuffer(content, np.uint8)
    breaks = np.flatnonzero(np.diff(pointers) != image_bytes) + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(pointers)], strict=True):
        start = int(pointers[first])
        images[first:last] = source[start : start + (last - first) * image_bytes].reshape(-1, image_bytes)
    return images.reshape(-1, *size, 3)
