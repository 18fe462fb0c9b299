"""What the tests of many processes start with torchrun: `fastcifar.train` with a narrow architecture, and a signal on request.

AT="RANK EPOCH STEP SIGNAL" in the environment: that rank sends itself the signal after that step, in torchrun's first attempt.
PATIENCE in the environment: `distributed.PATIENCE`, in seconds.
"""

import os
from dataclasses import replace

from fastcifar import distributed
from fastcifar.errors import run_command
from fastcifar.models import ARCHITECTURES
from fastcifar.step import TrainStep
from fastcifar.train import main

ARCHITECTURES["narrow"] = replace(ARCHITECTURES["light_resnet18"], widths=(4, 8, 8, 16), blocks=(1, 1, 1, 1))
step = TrainStep.__call__


def signalled(self: TrainStep) -> None:
    """A step, and the signal."""
    step(self)
    rank, *when, number = map(int, os.environ["AT"].split())
    if (self.world.rank, self.world.restarts, int(self._epoch) + 1, self.number) == (rank, 0, *when):
        os.kill(os.getpid(), number)


distributed.PATIENCE = float(os.environ.get("PATIENCE", distributed.PATIENCE))
if "AT" in os.environ:
    TrainStep.__call__ = signalled
run_command(main)
