"""Trainings in processes of their own, begun or resumed by `python -m fastcifar.train`, and what runs many of them."""

import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.text import Text

from fastcifar import files
from fastcifar.command import Command, differences, parse_command, resumed
from fastcifar.errors import InputError
from fastcifar.recipes import PLANNED, given
from fastcifar.run_folder import RunFolder

FAILED = "failed: "  # how the last line of a failed training's log begins


@dataclass(frozen=True)
class Job:
    """One training: its run folder, and the flags of `python -m fastcifar.train`."""

    runs: Path
    name: str  # of its run folder in `runs`; what the training prints goes to NAME.log beside it
    flags: tuple[str, ...]
    stop_after: int = 0  # epochs to train for now, 0 = the whole schedule

    @property
    def path(self) -> Path:
        return self.runs / self.name

    @cached_property
    def command(self) -> Command:
        """The run those flags describe. Raises InputError for what training would refuse."""
        try:
            return parse_command(list(self.flags))
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from None

    def finished(self, hardware: str | None = None, sha256: Sequence[str] | None = None) -> bool:
        """Whether its run folder has all epochs wanted. Raises InputError when that was begun as another run than this.

        hardware, sha256 (of both files of the data): what the run must have been trained on; None: anything.
        """
        folder = RunFolder(self.path)
        if not (self.path / "config.json").exists():
            return False
        changed = differences(resumed(self.path), self.command)
        for name in ("out", *PLANNED):
            if name not in given(self.command.run):
                changed.pop(name, None)
        config = files.read_json(self.path / "config.json", remedy="delete the folder")
        trained_on = config.get("hardware")
        if config.get("plan", {}).get("chosen", "default") == self.command.run.plan:  # auto may have been the default too
            changed.pop("plan", None)
        if hardware not in (None, trained_on):
            changed["hardware"] = (trained_on, hardware)
        done = (self.path / "summary.json").exists()
        read = folder.read_summary().get("data_sha256") if done else None
        if done and sha256 is not None and read != list(sha256):
            changed["data"] = (read, list(sha256))
        for name, (before, now) in changed.items():
            told = f"{name}: {before} before, {now} given"
            raise InputError(f"{self.path} was begun with other settings ({told}): give the same, or choose another --out")
        return done and (not self.stop_after or len(folder.read_metrics()) >= self.stop_after)

    def lines(self, threads: int = 0) -> Generator[str, None, str]:
        """Begin or resume it in a process of its own; yield what it prints, return "" or a line that tells why it failed.

        threads: of a CPU, 0 = as the process finds. The process ends with its parent, and with this generator.
        """
        begun = (self.path / "config.json").exists()
        where = ["--resume", self.path, "--data", self.command.run.data] if begun else [*self.flags, "--out", self.path]
        where += ["--stop-after", self.stop_after] if self.stop_after else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        libc, last = ctypes.CDLL(None), ""
        with (
            self.path.with_name(f"{self.path.name}.log").open("w", encoding="utf-8") as log,
            subprocess.Popen(
                [sys.executable, "-m", "fastcifar.train", *map(str, where)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace",
                env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
                preexec_fn=lambda: libc.prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG: a child ends with its parent
            ) as child,
        ):  # fmt: skip
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    log.write(line)
                    last = line.strip() or last
                    yield last
            except BaseException:
                child.kill()  # what it has finished is saved
                raise
            error, code = "", child.wait()
            if code < 0:
                error = f"ended by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
            elif code or not (self.path / "summary.json").exists():
                error = last.removeprefix("error: ")[:300] or f"exit code {code}, nothing said"
            if error:
                log.write(f"{FAILED}{error}\n")
        return error

    def train(self, console: Console, title: str) -> str:
        """Begin or resume it, showing its last line; return "", or a line that tells why it failed."""
        with console.status(Text(title)) as status:
            for event in events_of(self):
                status.update(Text(title + event.line))
        return event.error


def latest(flags: Sequence[str]) -> tuple[str, ...]:
    """The flags with each option once, as it is given last: training refuses one that is repeated."""
    options: dict[str, list[str]] = {}
    name = ""
    for flag in flags:
        if flag.startswith("--"):
            name = flag.split("=")[0].replace("_", "-").replace("--no-", "--", 1)
            options[name] = []
        options.setdefault(name, []).append(flag)
    return tuple(part for parts in options.values() for part in parts)


@dataclass(frozen=True)
class Event:
    """Something that happened to a training."""

    job: Job
    line: str = ""  # what it printed last
    ended: bool = False
    error: str = ""  # why it failed, when it has ended


def events_of(job: Job, threads: int = 0) -> Iterator[Event]:
    """Train a job in a process of its own; the last event is its end."""
    lines = job.lines(threads)
    while True:
        try:
            yield Event(job, next(lines))
        except StopIteration as end:
            yield Event(job, ended=True, error=end.value)
            return


class Workers(Protocol):
    """Where trainings run."""

    def events(self, jobs: deque[Job]) -> Iterator[Event]:
        """Train all `jobs`, also those that are appended meanwhile; tell what happens to them."""


@dataclass(frozen=True)
class Alone:
    """This process, one training after the other."""

    threads: int = 0  # of a CPU, 0 = as the process finds

    def events(self, jobs: deque[Job]) -> Iterator[Event]:
        """Train all `jobs`, also those that are appended meanwhile; tell what happens to them."""
        while jobs:
            yield from events_of(jobs.popleft(), self.threads)


@contextmanager
def opened(on: str, data: Path, cores: int, per_gpu: int, console: Console) -> Iterator[Workers]:
    """Where trainings on the betons in `data` run; on, cores, per_gpu: as the options of `fastcifar.sweep`.

    Raises InputError for a cluster that cannot be had.
    """
    if on == "none" or importlib.util.find_spec("ray") is None:
        if on not in ("", "none"):
            raise InputError(f"--on {on} needs Ray, which is not installed: uv sync --extra cluster")
        why = "" if on == "none" else "; Ray (uv sync --extra cluster) would use all GPUs and cores"
        console.print(f"one training after the other{why}")
        yield Alone(cores)
        return
    from fastcifar.cluster import OnRay  # here, since Ray is an extra

    workers = OnRay(on, data, cores=cores, per_gpu=per_gpu)
    try:
        yield workers
    finally:
        workers.close()
