"""A job enters on standard input, one training runs in this process, and its cell leaves on standard output.

    python -m bench.train_cell < job.json

The training is `python -m fastcifar.train`'s own, epoch by epoch, without checkpoints and plots: the same data, weights and
steps, hence the same losses and accuracies. A process of its own keeps peak memory and time to the first step apart, and a
crash away from other cells. Lines of JSON report progress; the last one holds the cell. A job that comes through a pipe is one
line, after which the pipe stays open: when it is closed, which the death of the parent does, the process ends. From a file, as
above, the job is all of it, and the process ends with the training.
"""

import json
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args, get_type_hints

import torch
from rich.console import Console
from torch import Tensor

from bench.levers import compiler_settings, run_options
from bench.loops import build_step
from bench.schema import Cell, Epoch, from_json
from fastcifar.dataset import load_splits
from fastcifar.device import choose_device, choose_precision, set_up_process
from fastcifar.errors import InputError, run_command, unknown
from fastcifar.progress import TrainingProgress
from fastcifar.recipes import Recipe, reported
from fastcifar.state import build_state
from fastcifar.step import EpochPlan, EpochTally, TrainStep
from fastcifar.train import select_best, steps_per_epoch, train_epoch

REPORT_EVERY = 0.5  # seconds between lines of progress


@dataclass(frozen=True)
class Job:
    """One training, as plain values."""

    key: str
    arch: str
    seed: int
    levers: list[str]
    epochs: int
    data: str  # folder with the betons
    limit_train: int = 0  # 0 = all
    limit_test: int = 0
    device: str = "auto"
    overrides: dict[str, Any] = field(default_factory=dict)  # of fields of the arch's recipe

    @property
    def recipe(self) -> Recipe:
        """The arch's recipe with the overrides, over this job's epochs. Raises InputError for a field it does not have."""
        return override(reported(self.arch).recipe, {"epochs": self.epochs, **self.overrides})


class ClockedStep(TrainStep):
    """The training step that notes when each step of the first epoch ended."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.first_seconds = 0.0
        self.ends: list[Any] = []  # host seconds, or CUDA events

    def __call__(
        self, positions: Tensor, step: int, rate: float, plan: EpochPlan, tally: EpochTally, momentum: float | None = None
    ) -> None:
        started = time.perf_counter()
        super().__call__(positions, step, rate, plan, tally, momentum)
        cuda = self.mean.is_cuda
        if not self.ends:
            if cuda:
                torch.cuda.synchronize()  # host sync, once: the first step with its compiling
            self.first_seconds = time.perf_counter() - started
        if len(self.ends) <= 100:
            self.ends.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
            if cuda:
                self.ends[-1].record()

    @property
    def compile_seconds(self) -> float:
        """First step minus the median later one; 0 when there is only one. After the epoch has ended."""
        pairs = list(zip(self.ends, self.ends[1:], strict=False))
        if not pairs:
            return 0.0
        later = [before.elapsed_time(after) / 1000 if self.mean.is_cuda else after - before for before, after in pairs]
        return max(0.0, self.first_seconds - median(later))


class Relay(TrainingProgress):
    """Progress for the parent: how many epochs are trained, with the fraction of the one that runs."""

    def __init__(self, tell: Callable[[dict[str, Any]], None], images_per_epoch: int) -> None:
        super().__init__(Console(quiet=True), 1, 0, images_per_epoch)
        self.tell, self.images, self.told_at = tell, 0, time.perf_counter()

    def advance(self, images: int) -> None:
        self.images += images
        if time.perf_counter() - self.told_at > REPORT_EVERY:
            self.tell({"epochs": self.images / self.images_per_epoch})
            self.told_at = time.perf_counter()


def train_cell(job: Job, tell: Callable[[dict[str, Any]], None]) -> Cell:
    """Train a job from beginning to end. Raises InputError for anything that cannot be trained."""
    recipe = job.recipe
    run = run_options(job.levers, data=Path(job.data), seed=job.seed)
    device = choose_device(job.device)  # type: ignore[arg-type]  # checked by the command that made the job
    set_up_process(device, deterministic=run.deterministic)
    data = load_splits(
        run.data, device, limit_train=job.limit_train, limit_test=job.limit_test, val_fraction=0.0, seed=job.seed, verify=False
    )
    steps, dtype = steps_per_epoch(data, recipe.batch_size), choose_precision(run.precision, device)
    state = build_state(job.arch, recipe, run, data, device)
    step = build_step(state, recipe, run, data, ClockedStep)
    assert isinstance(step, ClockedStep)
    meter, progress = EnergyMeter(device), Relay(tell, steps * recipe.batch_size)
    rows, records = [], []
    with compiler_settings(job.levers):
        for epoch in range(recipe.epochs):
            with meter:
                record = train_epoch(step, data, recipe, epoch, steps, progress)
            state.epoch += 1
            record |= select_best(state, data, run.eval_batch_size, dtype)
            rows.append(_epoch(record))
            records.append(record)
    return Cell(
        key=job.key,
        arch=job.arch,
        seed=job.seed,
        levers=job.levers,
        epochs=rows,
        batch_size=recipe.batch_size,
        images_per_epoch=steps * recipe.batch_size,
        test_images=len(data.test),
        final_top1=rows[-1].test_top1,
        final_flip_top1=state.measure(data, data.test, run.eval_batch_size, dtype, tta="flip").top1,
        best_top1=max(row.test_top1 for row in rows),
        first_step_seconds=records[0]["first_step_seconds"],
        compile_seconds=step.compile_seconds,
        peak_memory=peak_memory(device),
        energy_joules=meter.joules,
    )


def _epoch(record: dict[str, Any]) -> Epoch:
    return Epoch(
        train_seconds=record["train_seconds"],
        eval_seconds=record["eval_seconds"],
        train_loss=record["train_loss"],
        train_top1=record["train_accuracy"],
        test_loss=record["eval_loss"],
        test_top1=record["eval_accuracy"],
    )


def override(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """Replace fields of a recipe, its schedule or its augmentation by name.

    None is a value where the field may be None. Raises InputError for an unknown name, or a value of another type or out of
    range.
    """
    parts: dict[str, Any] = {"": recipe, "schedule": recipe.schedule, "augmentation": recipe.augmentation}
    homes = {name: part for part, row in parts.items() for name in vars(row) if name not in parts}
    changed: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for name, value in values.items():
        if name not in homes:
            raise unknown("field of a recipe", name, homes)
        home = parts[homes[name]]
        now, hint = getattr(home, name), get_type_hints(type(home))[name]
        if value is None and type(None) in get_args(hint):
            changed[homes[name]][name] = None
            continue
        kind = next(option for option in get_args(hint) if option is not type(None)) if now is None else type(now)
        if isinstance(value, int) and not isinstance(value, bool) and kind is float:
            value = float(value)
        if isinstance(value, list) and kind is tuple:
            if not all(type(entry) in (int, float) for entry in value):
                raise InputError(f"{name} must be a list of numbers, got {value!r}")
            value = tuple(value)
        if type(value) is not kind:
            example = "" if now is None else f", e.g. {now}"
            raise InputError(f"{name} must be of type {kind.__name__}{example}, got {value!r}")
        changed[homes[name]][name] = value
    nested = {part: replace(parts[part], **changed[part]) for part in ("schedule", "augmentation")}
    return replace(recipe, **changed[""], **nested)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes the device's allocator held; on a CPU the largest resident set of this process, None where it is not told.

    Not getrusage's: a child counts its parent's resident set from before it became another program.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


class EnergyMeter:
    """Energy of a GPU while the meter is entered, summed, by NVML's counter; none where pynvml or the counter is missing."""

    def __init__(self, device: torch.device) -> None:
        self.joules: float | None = None
        self._read: Callable[[], int] | None = None
        if device.type != "cuda":
            return
        try:
            import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]  # here, since it is optional

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception:  # no NVML, no such counter: a figure less, not a failure
            return
        self.joules = 0.0
        self._read = lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))  # millijoules since the driver started

    def __enter__(self) -> None:
        self._began = self._read() if self._read is not None else 0

    def __exit__(self, *_: object) -> None:
        if self._read is not None and self.joules is not None:
            self.joules += (self._read() - self._began) / 1000


def main() -> None:
    """Read the job, train, tell the cell."""
    piped = stat.S_ISFIFO(os.fstat(0).st_mode)
    try:
        values = json.loads(sys.stdin.readline() if piped else sys.stdin.read())
    except ValueError as error:
        raise InputError(f"standard input holds no job as JSON: {error}") from None
    job = from_json(Job, values, "the job")
    if piped:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is not ours to parse

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    tell({"cell": asdict(train_cell(job, tell))})


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock an ending interpreter would wait for
        pass
    os._exit(1)


if __name__ == "__main__":
    run_command(main)
