"""Counts what a steady epoch asks of the counting device: the training command's own, evaluation and checkpoint included."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from bench.counting_device import record
from bench.counting_device.step import Observed, images
from fastcifar import train as training
from fastcifar.command import Command
from fastcifar.evaluate import Evaluation, EvaluationTally
from fastcifar.recipes import RunOptions, reported
from fastcifar.saving import EpochWriter

IMAGES, TEST_IMAGES = 2_560, 1_100  # trained on and evaluated: steps are replayed whatever their number, so few will do
COUNTED = 1  # epoch from 0: the one before compiles, warms up and captures


def count_epoch(arch: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train an architecture by its recipe, every epoch written; return what the second epoch took.

    options: of the run, as kernels and capture. Waits of the thread that writes are its own, and not counted.
    """
    recipe = replace(reported(arch).recipe, held_out=0.0)
    splits, events, observed = replace(images(IMAGES), test=images(TEST_IMAGES).test), list[str](), Observed(dry=True)
    splits = replace(splits, select=splits.test)
    with TemporaryDirectory() as folder, observed.convolving(), observed.watching(), as_if_computed(events):
        options = options | {"plan": "default", "device": "cuda", "max_parameters": 0, "plots": False}
        run = RunOptions(out=Path(folder), stop_after=COUNTED + 2, **options)
        with (
            patch.object(training, "load_data", lambda *_, **__: splits),
            patch.object(training, "EpochWriter", partial(EpochWriter, interval=0.0)),
            torch._inductor.config.patch(force_disable_caches=True, compile_threads=1),
        ):
            training.train(Command(arch, None, recipe, run), Console(quiet=True))
    launches = [event for event in events if event.startswith("launch ")]
    graphs = sum(event.endswith(" cudaGraphLaunch") for event in launches)
    copies = [event.split() for event in events if event.startswith("copy ")]
    saved = [int(copy[-1]) for copy in copies if copy[1:5] == ["asynchronous", "device", "to", "host"]]
    return {
        "steps": IMAGES // recipe.batch_size,
        "graphs": graphs,
        "launches": len(launches) - graphs,
        "syncs": sum(event.startswith("sync ") for event in events) + sum(copy[1] == "waiting" for copy in copies),
        "pageable_copies": sum(copy[1:3] == ["pageable", "host"] for copy in copies),
        "bytes_to_host": sum(saved),
    }


@contextmanager
def as_if_computed(events: list[str]) -> Iterator[None]:
    """Give `events` those of the counted epoch, and training the finite weights and the accuracy that no kernel computes."""
    train_epoch, read, counting = training.train_epoch, EvaluationTally.read, ExitStack()

    def counted(step: Any, data: Any, recipe: Any, state: Any, *rest: Any) -> Any:
        if state.epoch == COUNTED:
            counting.enter_context(record(events))
        elif state.epoch == COUNTED + 1:
            counting.close()
        return train_epoch(step, data, recipe, state, *rest)

    def evaluated(tally: EvaluationTally, *world: Any) -> Evaluation:
        with suppress(ZeroDivisionError):  # of no image counted
            read(tally, *world)
        return Evaluation(TEST_IMAGES, 0.0, 0.0, 0.0, [0.0] * tally.classes, None)

    with (
        patch.object(training, "train_epoch", counted),
        patch.object(training, "require_finite_weights", lambda *_: None),
        patch.object(EvaluationTally, "read", evaluated),
    ):
        yield
