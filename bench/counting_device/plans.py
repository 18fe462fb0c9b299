"""Measures an architecture's plans on the counting device, as training would on a GPU; a process of its own.

python -m bench.counting_device.plans se_resnet18 OUT.json    # in an environment with the device: bench.counting_device

Every plan is compiled but for its kernels, trained, captured and timed: what it does to PyTorch and to the driver is real, its
times are the host's alone. OUT.json gets the plan's record and all lines that were printed.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console

from bench.counting_device.step import Observed, images
from fastcifar import tune
from fastcifar.device import choose_device, set_up_process
from fastcifar.plan import default_choice

BATCHES = 24  # of the resident set


def main() -> None:
    """Measure the plans of the architecture named first, and change the kind of one operation in the fastest."""
    arch, out = sys.argv[1], Path(sys.argv[2])
    command = tune.Options(archs=(arch,), device="cuda").command(arch)
    recipe = replace(command.settings, augmentation=replace(command.settings.augmentation, policy="none"))
    command, device = replace(command, settings=recipe), choose_device("cuda")
    set_up_process(device, deterministic=True)
    console = Console(record=True, width=160)
    observed, reference, changes = Observed(dry=True), tune.Tuning._train_reference, tune.Tuning.changes

    def train_reference(tuning: tune.Tuning) -> tune.Reference:
        with torch.backends.cudnn.flags(enabled=False):  # whose float32 batch norm the device lacks
            return reference(tuning)

    with (
        observed.convolving(),
        observed.watching(),
        torch._inductor.config.patch(force_disable_caches=True, compile_threads=1),
        patch.object(tune.Tuning, "_train_reference", train_reference),
        patch.object(tune, "distance", lambda one, other: 0.0),  # nothing is computed, so nothing can be compared
        patch.object(tune.Tuning, "changes", lambda tuning, plan: [*changes(tuning, plan)][-2:]),  # each compiles anew
    ):
        choice = replace(default_choice(command, device, console.print), seconds=3600.0)
        choice = tune.measured(command, choice, images(BATCHES * recipe.batch_size), device, console)
    out.write_text(json.dumps({"record": choice.record, "lines": console.export_text().splitlines()}), encoding="utf-8")


if __name__ == "__main__":
    main()
