"""Writes a `.beton` file with raw images, byte for byte as FFCV 1.0.2's own writer does with one worker, but without FFCV.

FFCV needs the headers of OpenCV and libjpeg-turbo to be installed, and its writer waits forever for a child process that died,
of a full disk for example. What it writes is simple where images are stored raw (`fastcifar.beton` has the tables): images fill
pages of 8 MiB, none crosses from one page into the next, and zeros fill up the rest.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.beton import ALLOCATION, FIELD_DESCRIPTOR, FIELDS, HEADER, MODE_RAW, SAMPLE_METADATA, VERSION

PAGE = 1 << 23  # bytes, FFCV's default


def write(path: Path, images: np.ndarray, labels: np.ndarray, advance: Callable[[int], None]) -> None:
    """Write fields `image` (raw), `label` and `index` to `path`. Raises OSError when the disk refuses.

    images: [N, H, W, 3] uint8, each at most a page. labels: [N] integers. advance: told how many images were written.
    """
    count, size = len(images), images[0].size
    in_page = PAGE // size
    tables = HEADER.itemsize + len(FIELDS) * FIELD_DESCRIPTOR.itemsize + count * SAMPLE_METADATA.itemsize
    start = -(-tables // PAGE) * PAGE
    page, place = np.divmod(np.arange(count), in_page)
    pointers = start + page * PAGE + place * size
    end = start + -(-count // in_page) * PAGE
    header = {"version": VERSION, "num_fields": len(FIELDS), "page_size": PAGE, "num_samples": count, "alloc_table_ptr": end}
    metadata = _filled(SAMPLE_METADATA, count, label=labels, index=np.arange(count))
    stored = {"mode": MODE_RAW, "width": images.shape[2], "height": images.shape[1], "data_ptr": pointers}
    for name, values in stored.items():
        metadata["image"][name] = values
    with path.open("wb") as file:
        file.write(_filled(HEADER, 1, **header).tobytes())
        for name, kind in FIELDS:
            characters = np.frombuffer(name.encode().ljust(16, b"\0"), np.uint8)
            file.write(_filled(FIELD_DESCRIPTOR, 1, type_id=kind, name=characters).tobytes())
        file.write(metadata.tobytes())
        file.write(bytes(start - tables))
        for first in range(0, count, in_page):
            part = images[first : first + in_page]
            file.write(part.tobytes())
            file.write(bytes(PAGE - part.nbytes))
            advance(len(part))
        file.write(_filled(ALLOCATION, count, sample_id=np.arange(count), ptr=pointers, size=size).tobytes())


def _filled(kind: np.dtype[Any], count: int, **fields: Any) -> np.ndarray:
    rows = np.zeros(count, kind)
    for name, values in fields.items():
        rows[name] = values
    return rows
