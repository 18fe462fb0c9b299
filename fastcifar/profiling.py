"""Where a training step's time goes: a trace by torch.profiler in the run folder, and a table by stage, on CPU and CUDA.

    data        gathering, augmenting and mixing the batch
    forward     network and loss
    backward    gradients, to the optimizer's first operation: clipping too
    optimizer   the update, to the step's end: averaged weights and the epoch's tally too
    idle        of the host: between steps; of a GPU: whenever no kernel runs

A kernel belongs to the stage that launched it. A step replayed as one CUDA graph has no stages: all of it is `other`.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastcifar.errors import InputError
from fastcifar.step import TrainStep

WARMUP = 3  # steps before the first traced one: they compile and autotune
STAGES = ("data", "forward", "backward", "optimizer", "other")
IDLE = "idle"


class Span(NamedTuple):
    """Microseconds of the profiler's clock."""

    start: float
    end: float


class Launched(NamedTuple):
    """A kernel: when the host launched it, and when it ran."""

    at: float
    ran: Span


class StepSpans(NamedTuple):
    """A step and what of it was marked; what is missing was not called, as in a replayed graph."""

    whole: Span
    data: Span | None
    forward: Span | None
    optimizer: Span | None

    def stage(self, time: float) -> str:
        """The stage of a moment in the step."""
        if self.optimizer is not None and time >= self.optimizer.start:
            return "optimizer"
        if self.forward is not None and time >= self.forward.start:
            return "forward" if time < self.forward.end else "backward"
        return "data" if self.data is not None and self.data.start <= time < self.data.end else "other"


def seconds_by_stage(steps: list[StepSpans], kernels: list[Launched]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the host and of the GPU from the first step's start to the end of the last, by stage and idle.

    The GPU's are empty without kernels. Kernels that overlap count each to its stage, and once against idle.
    """
    host, device = dict.fromkeys((*STAGES, IDLE), 0.0), dict.fromkeys((*STAGES, IDLE), 0.0)
    for step in steps:
        marks = [mark for span in step[1:] if span is not None for mark in span]
        marks = sorted(mark for mark in {*step.whole, *marks} if step.whole.start <= mark <= step.whole.end)
        for start, end in pairwise(marks):
            host[step.stage(start)] += (end - start) / 1e6
    host[IDLE] = (steps[-1].whole.end - steps[0].whole.start) / 1e6 - sum(host.values())
    busy, reached = 0.0, steps[0].whole.start
    for kernel in sorted(kernels, key=lambda each: each.ran):
        own = next((step for step in steps if step.whole.start <= kernel.at < step.whole.end), None)
        if own is None:
            continue
        device[own.stage(kernel.at)] += (kernel.ran.end - kernel.ran.start) / 1e6
        busy += max(0.0, kernel.ran.end - max(kernel.ran.start, reached)) / 1e6
        reached = max(reached, kernel.ran.end)
    device[IDLE] = max(0.0, (max(reached, steps[-1].whole.end) - steps[0].whole.start) / 1e6 - busy)
    return host, device if busy else {}


def profiled(kind: type[TrainStep], steps: int, path: Path, console: Console, *, available: int) -> type[TrainStep]:
    """A training step that traces `steps` of its calls, writes the trace to `path` and prints the table.

    available: steps of the run. Raises InputError when they are not enough.
    """
    if WARMUP + steps > available:
        raise InputError(f"profile {steps} needs {WARMUP + steps} steps, this run has {available:,}: lower --profile")

    class ProfiledStep(kind):  # type: ignore[misc,valid-type]  # mypy does not follow a base that is a variable
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            for stage, name in (("data", "_prepare"), ("forward", "_loss")):
                setattr(self, name, _marked(stage, getattr(self, name)))
            self._calls = 0
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else it reports a missing GPU as an error
            cuda = [ProfilerActivity.CUDA] if self.mean.is_cuda else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True)

        def __call__(self, *arguments: Any, **keywords: Any) -> None:
            if self._calls == WARMUP:
                self._profiler.start()
            with record_function("fastcifar.step"):
                super().__call__(*arguments, **keywords)
            self._calls += 1
            if self._calls == WARMUP + steps:
                self._profiler.stop()  # waits for the device
                self._profiler.export_chrome_trace(str(path))
                console.print(table_of(self._profiler.events(), steps))
                console.print(f"trace of {steps} steps for Perfetto or chrome://tracing: {path}")

    return ProfiledStep


def _marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        with record_function(f"fastcifar.{name}"):
            return function(*arguments, **keywords)

    return call


def table_of(events: Iterable[Any], count: int) -> Table:
    """The table of `count` traced steps, from the profiler's events."""
    host, device = seconds_by_stage(*_read(events))
    columns = [Column(name, justify="right") for name in ("host ms", "%", *(("GPU ms", "%") if device else ()))]
    table = Table("stage", *columns, title="one step by stage", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for stage in (*STAGES, IDLE):
        cells = [stage]
        for seconds in (host, device) if device else (host,):
            whole = sum(host.values()) if seconds is host else max(sum(device.values()), 1e-9)
            cells += [f"{1e3 * seconds[stage] / count:.2f}", f"{seconds[stage] / whole:.0%}"]
        if stage != "other" or host[stage] or device.get(stage):
            table.add_row(*cells)
    return table


def _read(events: Iterable[Any]) -> tuple[list[StepSpans], list[Launched]]:
    """The steps and the kernels that torch.profiler saw."""
    spans: dict[str, list[Span]] = {}
    calls: dict[int, float] = {}  # of the CUDA runtime and driver, by the number that their kernels have too
    ran: list[tuple[int, Span]] = []
    for event in events:
        span = Span(event.time_range.start, event.time_range.end)
        if event.device_type != DeviceType.CPU:
            ran.append((event.id, span))
        elif event.name.startswith("cu"):
            calls[event.id] = span.start
        else:
            name = "optimizer" if event.name.startswith("Optimizer.step#") else event.name.removeprefix("fastcifar.")
            spans.setdefault(name, []).append(span)
    kernels = [Launched(calls[number], span) for number, span in ran if number in calls]

    def inside(name: str, whole: Span) -> Span | None:
        with suppress(StopIteration):
            return next(each for each in spans.get(name, []) if whole.start <= each.start <= whole.end)
        return None

    return [StepSpans(whole, *(inside(name, whole) for name in StepSpans._fields[1:])) for whole in spans["step"]], kernels
