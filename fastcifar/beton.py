"""Reads `.beton` files and their manifests, every pointer checked before it is followed.

The one home of the format as fastcifar uses it: FFCV version 2, fields `image` (RGB, raw), `label`, `index`.

    header 24 B | 3 field descriptors of 1041 B | metadata, 32 B a sample | zeros | pages of pixels | allocation table

FFCV's own reader checks nothing of this: it follows a zeroed pointer into a segmentation fault. Here the file is read
once, hashed, and every pointer is compared with the region it must lie in before a pixel is touched.
"""

import hashlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar import files
from fastcifar.errors import InputError

SIDE = 32  # pixels; CIFAR images are square
IMAGE_BYTES = SIDE * SIDE * 3

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

REWRITE = "write it again with `python data_prep/write_beton.py --force`"


@dataclass(frozen=True)
class Manifest:
    """What stands beside a beton: what the data is, where it came from, and the hash that ties both files together."""

    dataset: str  # "cifar10" or "cifar100"
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
    versions: dict[str, str | None] = field(default_factory=dict)  # of what wrote the file

    def save(self, beton: Path) -> None:
        """Write this manifest beside `beton`, atomically."""
        files.write_json(manifest_path(beton), asdict(self))

    @classmethod
    def load(cls, beton: Path) -> "Manifest":
        """Read the manifest beside `beton`. Raises InputError when it is missing, not JSON, or lacks a field."""
        path = manifest_path(beton)
        values: Any = files.read_json(path, remedy=REWRITE)
        expected = {entry.name: entry.type for entry in fields(cls)}
        if not isinstance(values, dict) or set(values) != set(expected):
            raise InputError(f"{path} does not have the fields of a manifest of this version: {REWRITE}")
        manifest = cls(**values)
        valid = (
            isinstance(manifest.count, int)
            and isinstance(manifest.sha256, str)
            and isinstance(manifest.class_names, list)
            and all(isinstance(name, str) for name in manifest.class_names)
            and all(_is_colour(value) for value in (manifest.mean, manifest.std))
        )
        if not valid:
            raise InputError(f"{path} has fields of the wrong type: {REWRITE}")
        return manifest


@dataclass(frozen=True)
class Beton:
    """A beton's content, in the order in which its samples are stored."""

    images: np.ndarray  # [N, 32, 32, 3] uint8
    labels: np.ndarray  # [N] int64
    index: np.ndarray  # [N] int64, each sample's index in the source, which keys its randomness
    manifest: Manifest


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) and 0 <= v <= 1 for v in value)


def manifest_path(beton: Path) -> Path:
    """`train.beton` -> `train.json`, in the same folder."""
    return beton.with_suffix(".json")


def read_beton(path: Path, *, verify: bool = True) -> Beton:
    """Read and check a beton with its manifest.

    verify: also compare the file's sha256 with the manifest's (about 0.1 s); pointers, counts and label ranges are
    always checked. Raises InputError naming the file and the remedy.
    """
    require_file(path)
    manifest = Manifest.load(path)
    content = path.read_bytes()  # one immutable copy: what was checked is what is used
    images, labels, index = parse(content, path)
    check_content(path, manifest, labels, hashlib.sha256(content).hexdigest() if verify else None)
    return Beton(images, labels, index, manifest)


def require_file(path: Path) -> None:
    """Raise InputError that says how to write the beton when it is missing."""
    if not path.exists():
        raise InputError(f"{path} is missing: write it with `python data_prep/write_beton.py --out {path.parent}`")


def check_content(path: Path, manifest: Manifest, labels: np.ndarray, sha256: str | None, limit: int = 0) -> None:
    """Raise InputError unless a beton's content is what its manifest says. sha256: of the file; None: not compared.

    limit: how many samples were asked for, 0 = all.
    """
    if sha256 is not None and sha256 != manifest.sha256:
        raise InputError(f"{path} does not have the sha256 of its manifest (a byte changed): {REWRITE}")
    if len(labels) != manifest.count:
        raise InputError(f"{path} holds {len(labels)} images, its manifest says {manifest.count}: {REWRITE}")
    if labels.max() >= len(manifest.class_names):
        raise InputError(f"{path} has label {labels.max()} for {len(manifest.class_names)} classes: {REWRITE}")
    if limit > len(labels):
        raise InputError(f"{path} holds {len(labels):,} images, {limit:,} were asked for: lower the limit")


def parse(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images [N, 32, 32, 3] uint8, labels [N] and index [N] int64 of a beton's bytes, every bound checked.

    path: named in errors only. Raises InputError.
    """
    pointers, labels, index = layout(content, path)
    return _gather_images(content, pointers), labels, index


def layout(content: "bytes | np.ndarray", path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each image begins [N], labels [N] and index [N], int64, of a beton's bytes, every bound checked.

    path: named in errors only. Raises InputError.
    """

    def demand(condition: bool, problem: str) -> None:
        if not condition:
            raise InputError(f"{path} is damaged ({problem}): {REWRITE}")

    metadata_start = HEADER.itemsize + len(FIELDS) * FIELD_DESCRIPTOR.itemsize
    demand(len(content) >= metadata_start, f"{len(content)} bytes are too few for a header")
    header = np.frombuffer(content, HEADER, 1)[0]
    if header["version"] != VERSION:
        raise InputError(f"{path} has beton version {header['version']}, this reads version {VERSION}: {REWRITE}")
    demand(header["num_fields"] == len(FIELDS), f"{header['num_fields']} fields instead of {len(FIELDS)}")
    descriptors = np.frombuffer(content, FIELD_DESCRIPTOR, len(FIELDS), HEADER.itemsize)
    found = tuple((bytes(d["name"]).rstrip(b"\0").decode("latin1"), int(d["type_id"])) for d in descriptors)
    demand(found == FIELDS, f"fields {found} instead of {FIELDS}")

    # Python integers from here on: a pointer near 2^64 must not wrap around into bounds.
    size, count, table_start = len(content), int(header["num_samples"]), int(header["alloc_table_ptr"])
    metadata_end = metadata_start + count * SAMPLE_METADATA.itemsize
    demand(count > 0, "no samples")
    demand(metadata_end <= table_start <= size, f"allocation table at byte {table_start} of {size}")
    demand(
        size - table_start == count * ALLOCATION.itemsize,
        f"allocation table of {size - table_start} bytes for {count} samples: the file is truncated or extended",
    )
    metadata = np.frombuffer(content, SAMPLE_METADATA, count, metadata_start)
    table = np.frombuffer(content, ALLOCATION, count, table_start)

    image = metadata["image"]
    demand(bool(np.all(image["mode"] == MODE_RAW)), "an image is not stored raw")
    demand(bool(np.all((image["width"] == SIDE) & (image["height"] == SIDE))), f"an image is not {SIDE}x{SIDE}")
    pointers = image["data_ptr"]
    in_bounds = (pointers >= metadata_end) & (pointers <= table_start - IMAGE_BYTES)
    demand(bool(np.all(in_bounds)), "an image pointer leaves the file's data region")
    demand(bool(np.all(np.diff(np.sort(pointers)) >= IMAGE_BYTES)), "two images overlap")
    by_sample = table[np.argsort(table["sample_id"], kind="stable")]
    agree = (by_sample["sample_id"] == np.arange(count)) & (by_sample["ptr"] == pointers)
    demand(bool(np.all(agree & (by_sample["size"] == IMAGE_BYTES))), "allocation table and image pointers disagree")

    labels, index = metadata["label"].copy(), metadata["index"].copy()
    demand(bool(labels.min() >= 0), f"label {labels.min()}")
    demand(bool(np.array_equal(np.sort(index), np.arange(count))), "the sample indices are not 0..N-1")
    return pointers.astype(np.int64), labels, index


def _gather_images(content: bytes, pointers: np.ndarray) -> np.ndarray:
    """Copy images [N, 32, 32, 3] out of `content`: pages hold them back to back, so a few long slices fetch them all."""
    images = np.empty((len(pointers), IMAGE_BYTES), np.uint8)
    source = np.frombuffer(content, np.uint8)
    breaks = np.flatnonzero(np.diff(pointers) != IMAGE_BYTES) + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(pointers)], strict=True):
        start = int(pointers[first])
        images[first:last] = source[start : start + (last - first) * IMAGE_BYTES].reshape(-1, IMAGE_BYTES)
    return images.reshape(-1, SIDE, SIDE, 3)
