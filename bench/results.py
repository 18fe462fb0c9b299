"""One benchmark's figures, gathered from its run folders and timed comparisons into `results.json`, with CSVs beside it.

OUT/runs/ARCH-seedN/    the run folder of a training as `python -m fastcifar.train` leaves it, OUT/runs/STUDY/ARM-seedN/ an
                        ablation's; NAME.log beside it holds what the training printed
OUT/results.json        everything below; runs.csv, timings.csv, report.html and report.md are made of it

Rates are images per second, times seconds, accuracies shares 0..1. What was repeated is kept as the list of its repetitions;
means and intervals are made when it is shown.
"""

import contextlib
import csv
import io
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import psutil
import torch

from fastcifar import files
from fastcifar.errors import InputError, shortened
from fastcifar.launch import FAILED
from fastcifar.run_folder import RunFolder, environment_facts

VERSION = 2  # of the format; raise it when a field changes its meaning
NOT_FAILURES = ("not applicable", "left out")  # how `Timing.error` begins where nothing went wrong
EPOCH_IMAGES = 50_000  # CIFAR's training set: epochs always mean so many images where speeds are shown
AGAIN = "run the benchmark again"
ABOVE_0 = math.ulp(0.0)


@dataclass(frozen=True)
class Run:
    """One training, or the one line that a failed one left."""

    name: str  # its folder within OUT/runs
    arch: str = ""
    seed: int = 0
    batch_size: int = 0
    images_per_epoch: int = 0  # trained on
    test_images: int = 0
    train_seconds: list[float] = field(default_factory=list)  # of each epoch
    eval_seconds: list[float | None] = field(default_factory=list)
    epoch_top1: list[float | None] = field(default_factory=list)  # on the test set after each epoch
    top1: float = 0.0  # of the final weights
    flip_top1: float = 0.0  # averaged with the horizontally flipped image
    best_top1: float = 0.0  # of the best epoch, chosen on the test set: optimistic
    first_step_seconds: float = 0.0  # from the start of the process to the end of its first step
    compile_seconds: float | None = None  # first step less a later one
    peak_memory_bytes: int | None = None
    energy_joules: float | None = None  # of all training epochs
    epoch_joules: list[float | None] = field(default_factory=list)  # of training
    epoch_flops: list[float | None] = field(default_factory=list)  # of training; older runs recorded none
    error: str = ""

    @property
    def hits(self) -> int:
        """Test images the final weights classify correctly."""
        return round(self.top1 * self.test_images)

    @property
    def last_top1(self) -> float:
        """Of the evaluation after the last epoch, by the views of the recipe's `eval_tta`."""
        return next((top1 for top1 in reversed(self.epoch_top1) if top1 is not None), self.top1)

    @property
    def steady_seconds(self) -> list[float]:
        """Of each epoch but the first, which holds compiling and warming up (unless it is the only one).

        Epochs at a smaller size of the images are left out: they tell no rate that another variant's can stand beside.
        """
        later, flops = self.train_seconds[1:], [count or 0.0 for count in self.epoch_flops[1:]]
        largest = [seconds for seconds, count in zip(later, flops, strict=False) if count == max(flops)]
        return largest or later or self.train_seconds

    @property
    def rates(self) -> list[float]:
        """Images per second of those epochs."""
        return [self.images_per_epoch / seconds for seconds in self.steady_seconds]

    def epochs_to(self, target: float) -> int | None:
        """Epochs up to the first whose test top-1 is `target`; None: never."""
        return next((epoch for epoch, top1 in enumerate(self.epoch_top1, start=1) if (top1 or 0.0) >= target), None)


def total(costs: Sequence[float | None]) -> float | None:
    """Of epochs; None where one was not counted, or there is none."""
    known = [cost for cost in costs if cost is not None]
    return sum(known) if known and len(known) == len(costs) else None


@dataclass(frozen=True)
class Variant:
    """What an architecture costs, and what its report claims."""

    arch: str
    report: str  # A to E, "-" for the field's baseline
    parameters: int
    flops_per_image: int  # forward and backward, 2 per multiply-add
    claim: str
    roofline_images_per_second: float  # the device's ceiling for it: bench/roofline.py


@dataclass(frozen=True)
class Timing:
    """One of several things timed together."""

    name: str
    title: str
    note: str = ""
    images_per_second: list[float] = field(default_factory=list)  # one a round; empty where it failed
    error: str = ""  # one line: why there is no rate
    in_turns: bool = True  # False: an outside script, whose rates are no rounds of the others
    top1: float | None = None  # 0..1, as an outside script states it
    seconds_to_accuracy: float | None = None  # as an outside script states it
    runs: list[Run] = field(default_factory=list)  # as an outside script states them

    @property
    def failed(self) -> bool:
        """Whether something went wrong, other than that the device lacks what it needs."""
        return not self.images_per_second and not self.error.startswith(NOT_FAILURES)


@dataclass(frozen=True)
class Comparison:
    """Timings of one call, which took turns; other settings need another call."""

    settings: dict[str, Any]
    timings: list[Timing] = field(default_factory=list)

    def measured(self) -> list[Timing]:
        return [timing for timing in self.timings if timing.images_per_second]


@dataclass(frozen=True)
class Arm:
    """One configuration of an ablation."""

    name: str
    flags: str = ""  # of `python -m fastcifar.train`, beyond those all arms share; may name another --arch or --recipe
    claim: str = ""  # what the report gives for it
    runs: list[str] = field(default_factory=list)  # names of its runs, in the order of the ablation's seeds


@dataclass(frozen=True)
class Ablation:
    """Configurations trained with the same seeds; the first arm is what the others are compared with."""

    name: str
    title: str
    arch: str
    epochs: int = 0  # where no flags say otherwise
    seeds: list[int] = field(default_factory=list)
    arms: list[Arm] = field(default_factory=list)
    flags: str = ""  # of `python -m fastcifar.train`, for every arm whose own do not say otherwise


@dataclass(frozen=True)
class Results:
    """A whole `results.json`."""

    environment: dict[str, Any]  # hardware, versions, commit, command, load
    data: dict[str, Any]  # name, official, synthetic, sha256 of both files
    settings: dict[str, Any]  # the options of the command
    variants: list[Variant] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    speeds: Comparison | None = None  # every variant's training step
    optimizations: Comparison | None = None  # each added to those before it
    baselines: Comparison | None = None  # other training loops; the first is ours
    ablations: list[Ablation] = field(default_factory=list)
    schema: int = VERSION

    def groups(self) -> dict[str, list[Run]]:
        """Finished trainings that differ in their seed alone: by architecture, an ablation's by STUDY/ARM."""
        groups: dict[str, list[Run]] = {}
        for run in (run for run in self.runs if not run.error):
            groups.setdefault(run.name.rpartition("-seed")[0] if "/" in run.name else run.arch, []).append(run)
        return groups

    def comparisons(self) -> dict[str, Comparison]:
        named = {"speeds": self.speeds, "optimizations": self.optimizations, "baselines": self.baselines}
        return {name: comparison for name, comparison in named.items() if comparison is not None}


@dataclass(frozen=True)
class Facts:
    """What the page computes with or calls by its name; the other facts it only prints."""

    hardware: str | None = None
    cores: int = 0


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit, command; clocks, load and threads as they are now."""
    facts = environment_facts(device) | {
        "device": device.type,
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,  # bytes
        "load": {"at the start": load()},
    }
    if device.type == "cuda":
        facts |= {"gpu_memory": torch.cuda.get_device_properties(device).total_memory, "cuda": torch.version.cuda}
        query = "clocks.gr,clocks.mem,clocks.max.gr,power.limit,driver_version"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
            told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
            facts["clocks"] = f"{query}: {told}"
    return facts


def load() -> float:
    """Processes that want a core, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def read_run(runs: Path, name: str) -> Run | None:
    """The training `name`, finished or failed; None when it has not run to its end. Raises InputError for a broken folder."""
    folder, log = RunFolder(runs / name), runs / f"{name}.log"
    if not (folder.path / "summary.json").exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        return Run(name, error=lines[-1].removeprefix(FAILED)) if lines and lines[-1].startswith(FAILED) else None
    (arch, _, recipe, options), rows, summary = folder.read_config(), folder.read_metrics(), folder.read_summary()
    try:
        measured = {key: [row[key] for row in rows] for key in ("train_seconds", "eval_seconds")}
        summed_up = ("first_step_seconds", "compile_seconds", "peak_memory_bytes", "energy_joules")
        values = measured | {key: summary.get(key) for key in summed_up} | {
            "name": name, "arch": arch, "seed": options.seed, "batch_size": recipe.batch_size,
            "images_per_epoch": round(rows[0]["images_per_second"] * rows[0]["train_seconds"]),
            "epoch_joules": [row.get("energy_joules") for row in rows], "epoch_flops": [row.get("flops") for row in rows],
            "test_images": summary["final"]["images"], "epoch_top1": [row["eval_accuracy"] for row in rows],
            "top1": summary["final"]["top1"], "flip_top1": summary["final_flip_tta_top1"],
            "best_top1": summary["best_accuracy"],
        }  # fmt: skip
        return from_json(Run, values, str(folder.path))
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{folder.path} is not a finished run ({error!r}): delete it to train it again") from None


def write_results(out: Path, results: Results) -> None:
    """Write results.json, runs.csv and timings.csv into the folder `out`."""
    files.write_json(out / "results.json", asdict(results))
    lists = {"train_seconds", "eval_seconds", "epoch_top1", "epoch_joules", "epoch_flops"}
    columns = [entry.name for entry in fields(Run) if entry.name not in lists]
    rows = [[*(getattr(run, name) for name in columns), len(run.train_seconds), sum(run.train_seconds)] for run in results.runs]
    _write_csv(out / "runs.csv", [*columns, "epochs", "train_seconds"], rows)
    timings = [
        [what, timing.name, timing.in_turns, number, rate]
        for what, comparison in results.comparisons().items()
        for timing in comparison.timings
        for number, rate in enumerate(timing.images_per_second, start=1)
    ]
    _write_csv(out / "timings.csv", ["comparison", "name", "in_turns", "round", "images_per_second"], timings)


def _write_csv(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    files.write_bytes(path, text.getvalue().encode())


def read_results(path: Path) -> tuple[Path, Results]:
    """Read `path`, a results.json or its folder; return the file's path too. Raises InputError for what cannot be results."""
    path = path / "results.json" if path.is_dir() else path
    values = files.read_json(path, remedy=AGAIN)
    found = values.get("schema") if isinstance(values, dict) else None
    if found != VERSION:
        whose = "of version 0.1" if found == 1 else f"of format {shortened(found)}"
        raise InputError(
            f"{path} is {whose}, and this version reads format {VERSION} only: read the report beside it, or run the benchmark "
            "again with another --out"
        )
    results = from_json(Results, _plain(values, str(path)), str(path))
    check(results, str(path))
    return path, results


def check(results: Results, where: str = "results") -> None:
    """Refuse figures that no measurement gives, such as a rate of zero. Raises InputError naming the first."""
    within = partial(_require_within, where)
    facts, load = results.environment, results.environment.get("load", {})
    from_json(Facts, {name: facts[name] for name in ("hardware", "cores") if name in facts}, f"{where}: environment")
    within("the load", [_value(float, value, f"{where}: load") for value in _typed(dict, load, f"{where}: load").values()])
    within("target_top1", [_value(float | None, results.settings.get("target_top1"), f"{where}: target_top1")], high=1)
    for run in results.runs:
        check_run(run, where)
    for variant in results.variants:
        within(f"{variant.arch}: the roofline", [variant.roofline_images_per_second], ABOVE_0)
    for what, comparison in results.comparisons().items():
        rounds = {len(timing.images_per_second) for timing in comparison.measured() if timing.in_turns}
        if len(rounds) > 1:
            raise InputError(f"{where}: {what} that took turns have unequal numbers of rounds ({rounds}): {AGAIN}")
        for timing in comparison.timings:
            within(f"{timing.name}: a rate", timing.images_per_second, ABOVE_0)
            for run in timing.runs:
                check_run(run, where)


def check_run(run: Run, where: str) -> None:
    """Refuse a run's figures that no measurement gives. Raises InputError naming the first."""
    within = partial(_require_within, where)
    within(f"{run.name}: an accuracy", [run.top1, run.flip_top1, run.best_top1, *run.epoch_top1], high=1)
    within(f"{run.name}: a time", [*run.eval_seconds, run.first_step_seconds, run.compile_seconds])
    within(f"{run.name}: a training time", run.train_seconds, ABOVE_0)
    within(f"{run.name}: a count", [run.peak_memory_bytes, run.energy_joules, *run.epoch_joules, *run.epoch_flops])
    counts = [run.images_per_epoch, run.test_images, len(run.train_seconds), len(run.epoch_top1)]
    within(f"{run.name}: a number of images or epochs", [] if run.error else counts, 1)


def _require_within(
    where: str, what: str, values: Iterable[float | None], low: float = 0.0, high: float = sys.float_info.max
) -> None:
    for value in values:
        if value is not None and not low <= value <= high:  # NaN is not
            raise InputError(f"{where}: {shortened(what)} is {value}: {AGAIN}")


Row = TypeVar("Row")


def from_json(kind: type[Row], values: Any, where: str) -> Row:
    """Rebuild a dataclass, nested ones included, checking names and types. Raises InputError naming the field."""
    hints = get_type_hints(kind)
    if unknown := _typed(dict, values, where).keys() - hints.keys():
        raise InputError(f"{where}: unknown field {shortened(repr(sorted(unknown)[0]))}: {AGAIN}")
    parsed = {name: _value(hints[name], entry, f"{where}: {name}") for name, entry in values.items()}
    try:
        return kind(**parsed)
    except TypeError as error:
        raise InputError(f"{where}: {error}: {AGAIN}") from None


def _plain(value: Any, where: str) -> Any:
    """JSON whose texts cannot steer a terminal, and whose numbers are finite and have an end. Raises InputError."""
    match value:
        case dict():
            return {_plain(key, where): _plain(entry, where) for key, entry in value.items()}
        case list():
            return [_plain(entry, where) for entry in value]
        case str():
            return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in value)
        case int() if abs(value) >= 2**63:
            raise InputError(f"{where}: a number of {value.bit_length()} bits: {AGAIN}")
        case float() if not math.isfinite(value):
            raise InputError(f"{where}: a number is {value}: {AGAIN}")
    return value


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is list:
        return [_value(get_args(hint)[0], entry, where) for entry in _typed(list, value, where)]
    if type(None) in get_args(hint):
        return None if value is None else _value(get_args(hint)[0], value, where)
    if is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]  # a class, not an instance
    return float(value) if hint is float and type(value) is int else _typed(get_origin(hint) or hint, value, where)


def _typed(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:  # also a bool for a number
        raise InputError(f"{where}: expected {kind.__name__}, found {type(value).__name__}: {AGAIN}")
    return value
