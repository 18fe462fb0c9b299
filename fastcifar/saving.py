"""Epochs written into their run folder while training goes on, so that a GPU waits for no copy and no disk."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastcifar.checkpoint import Checkpoint
from fastcifar.errors import Stopped
from fastcifar.run_folder import Metrics, RunFolder

INTERVAL = 5.0  # seconds at least from the beginning of one write to that of the next


@dataclass(frozen=True)
class Epoch:
    """What is to be written of a run that stands after an epoch. The checkpoints are on the host once they are called for."""

    rows: list[Metrics]
    last: Callable[[], Checkpoint]
    best: Callable[[], Checkpoint] | None  # where best.pt is older


class EpochWriter:
    """Saves epochs into `folder`; use as a context manager, which ends when the newest is on the disk.

    On a CPU each is written at once. On a GPU (`background`) a thread writes the newest, with the best since its last write, at
    most every `interval` seconds: a kill loses no more than that. What the thread raises, the next call here raises.
    """

    def __init__(self, folder: RunFolder, device: torch.device, *, background: bool, interval: float = INTERVAL) -> None:
        self.folder, self.interval = folder, interval
        self._fetch = Fetch(device)
        self._waiting: Epoch | None = None
        self._error: Exception | None = None
        self._writing = self._hurries = self._ends = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True, name="epoch writer") if background else None

    def __enter__(self) -> "EpochWriter":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped):  # at once, nothing more is saved
            return
        try:
            self.flush()
        except Exception:
            if error is None:  # else that is what the user has to know
                raise
        finally:
            with self._changed:
                self._ends = True
                self._changed.notify_all()

    def save(self, rows: list[Metrics], checkpoint: Checkpoint) -> None:
        """Take an epoch to be written. Raises what writing it, or on a GPU an earlier one, raised."""
        if self._thread is None:
            self.folder.save_epoch(rows, checkpoint)
            return
        fetched = self._fetch(vars(checkpoint))

        def last() -> Checkpoint:
            return Checkpoint(**fetched())

        with self._changed:
            self._raise()
            best = last if checkpoint.best_epoch == checkpoint.epoch else self._waiting.best if self._waiting else None
            self._waiting = Epoch(list(rows), last, best)
            self._changed.notify_all()
            if len(rows) == 1:  # the first metrics must not speak of a second epoch before there is a last.pt
                self._changed.wait_for(lambda: self._waiting is None)

    def flush(self) -> None:
        """Return when all is on the disk. Raises what writing it raised."""
        with self._changed:
            self._hurries = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._thread is None or (self._waiting is None and not self._writing))
            self._hurries = False
            self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        began = -self.interval
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._ends)
                self._changed.wait_for(lambda: self._hurries or self._ends, began + self.interval - time.monotonic())
                epoch, self._waiting = self._waiting, None
                if epoch is None:
                    return
                self._writing = True
                self._changed.notify_all()
            began = time.monotonic()
            try:
                last = epoch.last()
                best = last if epoch.best is epoch.last else epoch.best() if epoch.best is not None else None
                self.folder.save_epoch(epoch.rows, last, best)
            except Exception as error:  # for the main thread, which says it as its own
                self._error = error
            with self._changed:
                self._writing = False
                self._changed.notify_all()


class Fetch:
    """Copies a tree of a device's tensors to the host as they are now, while the device and the host go on."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._packed: Tensor | None = None  # where the tensors are gathered, so that the copy is one
        self._copied: Any = None  # event: the host has them

    def __call__(self, tree: Any) -> Callable[[], Any]:
        """Return what waits for the copy and gives it, in memory of its own; call it from any thread."""
        leaves, spec = tree_flatten(tree)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        wait = self._clone(tensors) if self._stream is None else self._download(tensors, self._stream)

        def fetched() -> Any:
            copies = iter(wait())
            return tree_unflatten([next(copies) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

        return fetched

    def _clone(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        copies = [tensor.clone() for tensor in tensors]
        return lambda: copies

    def _download(self, tensors: list[Tensor], stream: torch.cuda.Stream) -> Callable[[], list[Tensor]]:
        size = sum(_room(tensor) for tensor in tensors)
        if self._packed is None or self._packed.numel() != size:
            self._packed = torch.empty(size, dtype=torch.uint8, device=stream.device)
        current = torch.cuda.current_stream(stream.device)
        if self._copied is not None:
            current.wait_event(self._copied)  # the device waits, should the copy before still run
        places = _places(self._packed, tensors)
        for dtype in {tensor.dtype for tensor in tensors}:  # one launch or a few for each
            chosen = [number for number, tensor in enumerate(tensors) if tensor.dtype == dtype]
            torch._foreach_copy_([places[number] for number in chosen], [tensors[number] for number in chosen])
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            host = torch.empty(size, dtype=torch.uint8, pin_memory=True)  # PyTorch keeps and reuses such memory
            host.copy_(self._packed, non_blocking=True)
            copied = self._copied = torch.cuda.Event()
            copied.record(stream)

        def wait() -> list[Tensor]:
            copied.synchronize()
            return [place.clone() for place in _places(host, tensors)]

        return wait


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // 16) * 16  # bytes, so that every dtype is aligned


def _places(packed: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views of the bytes `packed` that are shaped and strided like dense `tensors`, one after the other."""
    places, offset = [], 0
    for tensor in tensors:
        part = packed[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        places.append(part.as_strided(tensor.shape, tensor.stride()))
        offset += _room(tensor)
    return places
