"""fastcifar: small residual networks on CIFAR, trained in minutes, reproducible to the bit, measured honestly."""

__version__ = "0.2.0"

import signal
import sys

if sys.argv[:1] == ["-m"]:  # `python -m fastcifar.NAME` is being started: a Ctrl-C ends its seconds of imports in one line
    from fastcifar.errors import interrupted

    signal.signal(signal.SIGINT, interrupted)
