"""A beton of twenty images with every part in reach, for tests of damage: FFCV's pages would make it 16 MB of zeros."""

import hashlib

import numpy as np

from fastcifar import beton
from fastcifar.beton import IMAGE_BYTES, Manifest, channel_statistics

U64 = 2**64

COUNT = 20
START = 24 + 3 * 1041  # where metadata begins
END = START + 32 * COUNT  # where it ends; some zeros follow, as in a page that is not full
PIXELS = END + 100
TABLE = PIXELS + IMAGE_BYTES * COUNT + 50
SIZE = TABLE + 24 * COUNT


class Parts:
    """A copy of a small beton's bytes, and arrays that change them."""

    def __init__(self, content: bytes = bytes(SIZE)) -> None:
        self.content = bytearray(content)
        self.header = np.frombuffer(self.content, beton.HEADER, 1)
        self.fields = np.frombuffer(self.content, beton.FIELD_DESCRIPTOR, 3, 24)
        self.samples = np.frombuffer(self.content, beton.SAMPLE_METADATA, COUNT, START)
        self.image = self.samples["image"]
        self.table = np.frombuffer(self.content, beton.ALLOCATION, COUNT, TABLE)

    def set(self, part: str, field: str, row: int, value: int) -> None:
        """Set a number, modulo its size."""
        place = getattr(self, part)[field][row : row + 1]
        place.view(f"u{place.itemsize}")[0] = int(value) % 256**place.itemsize

    def move(self, sample: int, pointer: int) -> None:
        """Point metadata and allocation table, consistently, to another place: only a check of bounds can notice."""
        self.set("image", "data_ptr", sample, pointer)
        self.set("table", "ptr", sample, pointer)


def small_beton(seed: int = 0) -> bytes:
    """Images and nothing else differ by the seed."""
    parts = Parts()
    parts.header[0] = (beton.VERSION, 3, 1 << 23, COUNT, TABLE)
    for field, (name, type_id) in zip(parts.fields, beton.FIELDS, strict=True):
        field["name"][: len(name)], field["type_id"] = list(name.encode()), type_id
    pointers = PIXELS + IMAGE_BYTES * np.arange(COUNT)
    for name, value in {"mode": beton.MODE_RAW, "width": 32, "height": 32, "data_ptr": pointers}.items():
        parts.image[name] = value
    parts.samples["label"], parts.samples["index"] = np.arange(COUNT) % 10, np.arange(COUNT)
    for name, values in {"sample_id": np.arange(COUNT), "ptr": pointers, "size": IMAGE_BYTES}.items():
        parts.table[name] = values
    pixels = np.random.default_rng(seed).integers(0, 256, IMAGE_BYTES * COUNT, dtype=np.uint8)
    parts.content[PIXELS : PIXELS + pixels.size] = pixels.tobytes()
    return bytes(parts.content)


def manifest_of(content: bytes, split: str = "train") -> Manifest:
    """The manifest of a small beton."""
    pixels = np.frombuffer(content, np.uint8)[PIXELS : PIXELS + IMAGE_BYTES * COUNT].reshape(COUNT, 32, 32, 3)
    return Manifest(
        "cifar10", split, "with ünïcode", COUNT, list("abcdefghij"), *channel_statistics([pixels]),
        hashlib.sha256(content).hexdigest(), official=True, synthetic=False, source_md5={"train": "1" * 32},
        source_sha256={"train": "2" * 64}, versions={"ffcv": "1.0.2", "numpy": None},
    )  # fmt: skip


VALID = small_beton()
