"""Ctrl-C and its like, turned into a request that training heeds where its state can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastcifar.errors import Stopped

HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """While it is open, the first signal waits for `check`; a second one interrupts at once.

    Use as a context manager in the main thread (elsewhere Python hears no signals, and none is asked for).
    """

    def __init__(self) -> None:
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
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped when a signal has come. Call it only where the state can be saved."""
        if self.number:
            raise Stopped(self.number, "")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block a signal raises Stopped wherever it comes: for what changes nothing, as evaluation does."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number, number
        if self._at_once:
            raise Stopped(number, "")
        if again:
            raise KeyboardInterrupt("at once, nothing more was saved")
