"""Ctrl-C and its like, turned into a request that training heeds where its state can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastcifar.distributed import ALONE, World
from fastcifar.errors import Stopped

HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """While it is open, the first signal waits for `check`; a second one interrupts at once.

    Use as a context manager in the main thread (elsewhere Python hears no signals, and none is asked for).
    world: the processes that stop together, for which nothing happens at once; torchrun ends those that take half a minute.
    """

    def __init__(self, world: World = ALONE) -> None:
        self.world = world
        self.number = 0  # of the signal that came; 0: none yet
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in HEEDED:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's choice stands
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.world.size > 1 and exception[0] is not None:  # torchrun's SIGTERM must not end who tells what happened
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def came(self) -> bool:
        """Whether a signal has come, to whichever process; all of them ask."""
        self.number = self.world.largest(self.number)
        return self.number > 0

    def check(self) -> None:
        """Raise Stopped when a signal has come. Call it only where the state can be saved."""
        if self.came():
            raise Stopped(self.number, "")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block a signal raises Stopped wherever it comes: for what changes nothing, as evaluation does."""
        self.check()
        self._at_once = self.world.size == 1
        try:
            yield
        finally:
            self._at_once = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number, number
        if self._at_once:
            raise Stopped(number, "")
        if again and self.world.size == 1:
            raise KeyboardInterrupt("at once, nothing more was saved")
