"""Jobs and a folder enter; each is trained once in a process of its own, and its cell is saved the moment it is finished.

A restart runs only what is not finished: a cell with an error line is tried again, and so is one whose file is broken, after a
line that says so. What all cells of a folder have in common stands in its `settings.json`; other settings are refused.
"""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bench.roofline import Rates, cost_of_arch
from bench.schema import Cell, from_json, read_cell, write_cell
from bench.train_cell import Job
from fastcifar import files
from fastcifar.errors import InputError
from fastcifar.progress import clock

# How long a cell takes is guessed from its roofline: the share of it that training reaches (se_resnet18 on two cores: 360 of
# 1,036 img/s), and seconds for the start of a process, its data and, where the step is compiled, the compiler. Guesses only
# for the plan; the bar goes by what was measured.
SHARE = {"cpu": 0.35, "cuda": 0.5}
START_SECONDS = 6.0
COMPILE_SECONDS = 60.0


def estimate(job: Job, rates: Rates, device: torch.device, train_images: int, test_images: int) -> float:
    """Seconds a cell is expected to take: training, one evaluation an epoch, and the last with the mirror image."""
    images = job.epochs * train_images + (job.epochs + 2) * test_images / 3  # a forward pass is a third of a step
    cost = cost_of_arch(job.arch)
    start = START_SECONDS + (COMPILE_SECONDS if "compile" in job.levers else 0.0)
    return start + images / (SHARE[device.type] * cost.images_per_second(rates))


def finished(folder: Path, job: Job, console: Console) -> Cell | None:
    """The job's cell, if it is there, sound and without error."""
    path = folder / "cells" / f"{job.key}.json"
    if not path.exists():
        return None
    try:
        cell = read_cell(path)
        if (cell.key, cell.arch, cell.seed) != (job.key, job.arch, job.seed):
            raise InputError(f"{path} holds cell {cell.key}")
    except InputError as error:
        console.print(f"{error}; this cell runs again", style="yellow")
        return None
    return None if cell.error is not None else cell


def run_jobs(
    jobs: list[Job], folder: Path, seconds: dict[str, float], console: Console, saved: Callable[[], None] = lambda: None
) -> list[Cell]:
    """Run the jobs that are not finished, one after the other; return all cells, failed ones too.

    seconds: each job's estimate by its key, by which the bar weighs them. saved: called after each cell is on disk.
    """
    cells = {job.key: cell for job in jobs if (cell := finished(folder, job, console)) is not None}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    to_do = [job for job in jobs if job.key not in cells]
    done_before = 0.0
    with bar:
        task = bar.add_task("cells", total=sum(seconds[job.key] for job in to_do))
        for number, job in enumerate(to_do, start=1):
            bar.update(task, description=f"cell {number} of {len(to_do)}: {job.key}")

            def advance(share: float, job: Job = job, base: float = done_before) -> None:
                bar.update(task, completed=base + share * seconds[job.key])

            cells[job.key] = run_job(job, advance)
            done_before += seconds[job.key]
            bar.update(task, completed=done_before)
            write_cell(folder, cells[job.key])
            console.print(f"[{number}/{len(to_do)}] {cell_line(cells[job.key])}")
            saved()
    return [cells[job.key] for job in jobs]


def run_job(job: Job, advance: Callable[[float], None] = lambda share: None) -> Cell:
    """Train a job in a fresh process; whatever goes wrong there becomes the cell's error. advance: takes the share done."""
    cell, epochs_done, unreadable = None, 0.0, ""
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "bench.train_cell"]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            try:
                child.stdin.write(json.dumps(asdict(job)) + "\n")  # and stays open: the child ends when we do
                child.stdin.flush()
            except BrokenPipeError:  # it ended before it read; its exit says why
                pass
            for line in child.stdout:
                try:
                    told = json.loads(line)
                    if "cell" in told:
                        cell = from_json(Cell, told["cell"], job.key)
                    else:
                        epochs_done = float(told["epochs"])
                except (ValueError, KeyError, TypeError, InputError):  # cut off by the end of its process
                    unreadable = line.strip()
                advance(epochs_done / job.epochs)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip().splitlines()
    if code == 0 and cell is not None:
        return cell
    if code == 0 and unreadable:
        said = [f"its process told what is no cell: {unreadable}"]
    return Cell(job.key, job.arch, job.seed, job.levers, error=_failure(code, said))


def _failure(code: int, said: list[str]) -> str:
    """One line: what the process said last, or which signal ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    last = next((line.strip() for line in reversed(said) if line.strip()), f"exit code {code}, nothing said")
    return last.removeprefix("error: ")[:300]


def cell_line(cell: Cell) -> str:
    """What a cell brought, for people."""
    if cell.error is not None:
        return f"{cell.key}: failed: {cell.error}"
    steady = cell.epochs[1:] or cell.epochs
    rate = len(steady) * cell.images_per_epoch / sum(epoch.train_seconds for epoch in steady)
    took = sum(epoch.train_seconds + epoch.eval_seconds for epoch in cell.epochs)
    return f"{cell.key}: top-1 {cell.final_top1:.2%}, {rate:,.0f} img/s, {clock(took)}"


def settle(path: Path, given: dict[str, Any]) -> None:
    """Record the settings that define what is in a folder, or hold `given` against those recorded there.

    A nested dict may gain names and keeps those it has. Raises InputError naming the first difference.
    """
    recorded: dict[str, Any] = {}
    if path.exists():
        recorded = files.read_json(path, remedy="choose another --out")
        if not isinstance(recorded, dict):
            raise InputError(f"{path} is not the settings of a benchmark: choose another --out")
    merged = dict(recorded)
    for name, value in json.loads(json.dumps(given)).items():
        there = recorded.get(name, value)
        if isinstance(value, dict) and isinstance(there, dict):
            differing = next((key for key in value if key in there and there[key] != value[key]), None)
            merged[name] = there | value
            if differing is not None:
                raise _refusal(path, f"{name} {differing}", there[differing], value[differing])
        elif there != value:
            raise _refusal(path, name, there, value)
        else:
            merged[name] = value
    if merged != recorded:
        files.write_json(path, merged)


def _refusal(path: Path, name: str, there: Any, given: Any) -> InputError:
    where = f"{path.parent} was begun with other settings"
    return InputError(f"{where} ({name}: {there} there, {given} given): give the same, or choose another --out")
