"""The batches of a set that stays on the disk, at their place on the device when their step comes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastcifar.dataset import ResidentSet, StreamedSet


class BatchRing:
    """Two batches on a set's device: a step reads one while the other comes from the disk, by pinned memory and a stream of its
    own. Events keep either from being overwritten too soon; on a CPU both are read where they lie. `begin` an epoch first.
    """

    def __init__(self, data: StreamedSet, batch_size: int) -> None:
        self.data, device = data, data.labels.device
        self._pixels = torch.empty(2, batch_size, *data.size, 3, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host = self._pixels if self._stream is None else torch.empty_like(self._pixels, device="cpu", pin_memory=True)
        if self._stream is not None:
            self._copied, self._used = ((torch.cuda.Event(), torch.cuda.Event()) for _ in range(2))

    def begin(self, order: Tensor, first: int) -> None:
        """Load batch `first` of an epoch's batches `order` [steps, B], which are positions in the set."""
        self._pointers = self.data.pointers[order.cpu().numpy()]  # host sync, once an epoch: nothing uses the ring then
        self._load(first)

    def batch(self, cursor: Tensor, positions: Tensor) -> ResidentSet:
        """The samples at `positions` [B] that the step at `cursor` [1] trains on; nothing waits."""
        pixels = self._pixels.index_select(0, cursor % 2)[0]
        return ResidentSet(pixels, self.data.labels[positions], self.data.index[positions])

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Launch step `number` inside; the next batch is loaded while the device works on it."""
        current = torch.cuda.current_stream(self._stream.device) if self._stream is not None else None
        if current is not None:
            current.wait_event(self._copied[number % 2])
        yield
        if current is not None:
            self._used[number % 2].record(current)
        self._load(number + 1)

    def _load(self, number: int) -> None:
        """Raises InputError when the file has changed, or OSError of the disk."""
        if number == len(self._pointers):
            return
        slot = number % 2
        if self._stream is not None:
            self._copied[slot].synchronize()  # host sync where it is two steps ahead, which is no device's loss
        self.data.file.read_into(self._host[slot].flatten(1).numpy(), self._pointers[number].tolist())
        if self._stream is not None:
            self._stream.wait_event(self._used[slot])
            with torch.cuda.stream(self._stream):
                self._pixels[slot].copy_(self._host[slot], non_blocking=True)
                self._copied[slot].record()
