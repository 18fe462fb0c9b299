"""Writes a `.beton` file by FFCV's own code, in this process and with the same bytes every time.

FFCV's `DatasetWriter` hands the work to child processes and waits for a counter; when a child dies, of a full disk for
example, it waits forever. This subclass runs the same worker function here, so an error is an error, and one worker means
one order of bytes.
"""

import queue
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numba.typed
import numpy as np
import torch

_threads = torch.get_num_threads()
numba.typed.Dict = dict  # FFCV keeps two numbers in one, for which Numba compiles for three seconds
from ffcv.fields import IntField, RGBImageField  # noqa: E402
from ffcv.memory_allocator import MemoryAllocator  # noqa: E402
from ffcv.writer import DatasetWriter  # noqa: E402

del numba.typed.Dict  # the module looks its own up again
torch.set_num_threads(_threads)  # importing FFCV sets it to 1 for the whole process

Sample = tuple[np.ndarray, int, int]


class _Samples:
    """The indexable set FFCV reads from: (image, label, sample index); calls `advance` once a sample."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, advance: Callable[[], None]) -> None:
        self.images, self.labels, self.advance = images, labels, advance

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        self.advance()
        return self.images[index], int(self.labels[index]), int(index)


class _Counter:
    """Replaces the shared counter by which FFCV's workers report progress."""

    value = 0

    def get_lock(self) -> "_Counter":
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


class InProcessWriter(DatasetWriter):  # type: ignore[misc]  # FFCV has no types
    """FFCV's writer with its one worker run here instead of in a child process."""

    def _write_common(
        self,
        num_samples: int,
        queue_content: Iterable[Any],
        work_fn: Callable[..., None],
        extra_worker_args: tuple[Any, ...],
    ) -> None:
        self.num_samples = num_samples
        self.prepare()
        try:
            work: queue.SimpleQueue[Any] = queue.SimpleQueue()
            for chunk in (*queue_content, None):  # None tells the worker that there is no more
                work.put(chunk)
            allocations: queue.SimpleQueue[Any] = queue.SimpleQueue()
            allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
            work_fn(
                work,
                self.metadata_sm,
                self.metadata_type,
                self.fields,
                allocator,
                _Counter(),
                allocations,
                *extra_worker_args,
            )
            self.finalize(allocations.get())
        finally:
            self.metadata_sm.unlink()


def write(path: Path, images: np.ndarray, labels: np.ndarray, advance: Callable[[], None]) -> None:
    """Write fields `image` (raw), `label` and `index` to `path`. Raises OSError when the disk refuses.

    images: [N, 32, 32, 3] uint8. labels: [N] integers. advance: called once for every sample.
    """
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField(), "index": IntField()}
    InProcessWriter(str(path), fields, num_workers=1).from_indexed_dataset(_Samples(images, labels, advance))
