"""fastcifar: small residual networks on CIFAR, trained in minutes, reproducible to the bit, measured honestly."""

__version__ = "0.2.0"

import gc
import signal
import sys

if sys.argv[:1] == ["-m"]:  # `python -m fastcifar.NAME` is being started; `run_command` undoes this
    from fastcifar.errors import interrupted

    signal.signal(signal.SIGINT, interrupted)  # a Ctrl-C ends its seconds of imports in one line
    gc.disable()  # what is imported stays: looking for garbage in it takes a sixth of the time
    if "fastcifar.train" in sys.orig_argv:
        from fastcifar import ahead

        ahead.begin(sys.argv[1:])
