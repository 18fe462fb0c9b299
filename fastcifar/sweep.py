"""Many trainings from one command: architectures times seeds times settings, on this machine or on a Ray cluster.

python -m fastcifar.sweep --archs se_resnet18 mish_se_resnet18 --seeds 0 1 2 --set peak_lr=0.05,0.1 --set cutout=0,8,16
python -m fastcifar.sweep --archs se_resnet18 --seeds 0 1 2 3 --epochs 30 --per-gpu 4 --on auto --out runs/sweep-se

Every point is a run folder of `fastcifar.train` in OUT/runs. The same command again repeats no finished point and goes on with
an interrupted one. `sweep.json`, `sweep.csv` and `sweep.png` in OUT always show what is there.
"""

import contextlib
import csv
import io
import itertools
import random
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text
from scipy import stats

from fastcifar import files
from fastcifar.arguments import parse_arguments, split_flags
from fastcifar.errors import InputError, require, run_command
from fastcifar.launch import Event, Job, Workers, latest, opened
from fastcifar.models import architecture
from fastcifar.reporting import clock
from fastcifar.run_folder import RunFolder

PROGRAM = "python -m fastcifar.sweep"
ENDED = ("done", "stopped")  # states in which nothing is left to do
OWN_FLAGS = ("--arch", "--seed", "--out", "--resume", "--stop-after", "--data")  # of training, which the sweep sets


@dataclass(frozen=True)
class Options:
    """Train a grid of architectures, settings and seeds; the same command again goes on."""

    archs: tuple[str, ...] = ("se_resnet18",)  # architectures; `python -m fastcifar.models` lists them
    seeds: tuple[int, ...] = (0,)  # every setting is trained with each
    # FLAG=VALUE,VALUE of `python -m fastcifar.train`, e.g. peak_lr=0.05,0.1; several make a grid
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    points: int = 0  # draw so many of the grid's settings, 0 = all
    points_seed: int = 0  # of that draw
    epochs: int = 0  # of each training, 0 = its recipe's
    flags: str = ""  # of `python -m fastcifar.train`, for every training: --flags='--limit-train 5000'
    data: Path = Path("data/beton")  # folder with train.beton and test.beton
    out: Path = Path("runs/sweep")  # folder of the sweep
    on: str = ""  # "": a Ray of this machine's own; auto or HOST:PORT: a cluster that runs; none: one after the other, no Ray
    per_gpu: int = 1  # runs that share a GPU
    cores: int = 0  # of a CPU for each run, 0 = all of this machine's
    # epochs after which a setting goes on only if it is among the best `keep` of those that came so far (ASHA); one seed only
    rungs: tuple[int, ...] = ()
    keep: float = 0.5  # share that goes on at each rung, above 0, below 1
    plot: bool = True  # draw sweep.png

    def __post_init__(self) -> None:
        for arch in self.archs:
            architecture(arch)
        require(self, bool(self.archs) and len(set(self.archs)) == len(self.archs), "archs", "one or more, each once")
        seeds = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds)
        require(self, seeds and all(0 <= seed < 2**63 for seed in self.seeds), "seeds", "one or more in 0..2^63-1, each once")
        for name in ("points", "epochs", "cores"):
            require(self, getattr(self, name) >= 0, name, "0 or more")
        require(self, self.per_gpu >= 1, "per_gpu", "at least 1")
        require(self, 0 < self.keep < 1, "keep", "above 0, below 1")
        require(self, all(a < b for a, b in itertools.pairwise((0, *self.rungs))), "rungs", "rising epochs, from 1 on")
        if self.rungs and len(self.seeds) > 1:
            raise InputError(
                "rungs would stop some seeds of a setting and bias its mean: search with one seed, without the others"
            )


@dataclass
class Point:
    """One training of the grid and how far it is."""

    arch: str
    setting: dict[str, str]  # {flag: value} of --set
    seed: int
    job: Job
    state: str = "waiting"  # waiting, running, done, stopped (at a rung), failed
    epochs: int = 0  # trained
    accuracy: float | None = None  # of the last evaluation, 0..1
    seconds: float = 0.0  # of training and evaluation so far
    told: str = ""  # its last line, or why it failed
    at: dict[int, float] = field(default_factory=dict)  # accuracy after each evaluated epoch

    @property
    def total(self) -> int:
        return self.job.command.settings.epochs

    def read(self, stopped: bool = False) -> None:
        """Take what its run folder has. stopped: whether it was stopped at a rung."""
        self.state = "stopped" if stopped else self.state
        folder = RunFolder(self.job.path)
        with contextlib.suppress(InputError):
            rows = folder.read_metrics()
            evaluated = [row["eval_accuracy"] for row in rows if row["eval_accuracy"] is not None]
            self.epochs, self.accuracy = len(rows), evaluated[-1] if evaluated else None
            self.seconds = sum(row["train_seconds"] + (row["eval_seconds"] or 0.0) for row in rows)
            self.at = {row["epoch"]: row["eval_accuracy"] for row in rows if row["eval_accuracy"] is not None}
        if self.epochs == self.total and (self.job.path / "summary.json").exists():
            self.state, self.accuracy = "done", folder.read_summary()["final"]["top1"]

    @property
    def seconds_left(self) -> float | None:
        return self.seconds / self.epochs * (self.total - self.epochs) if self.epochs else None


@dataclass
class Sweep:
    """A sweep while it runs."""

    options: Options
    points: list[Point]
    rungs: dict[int, dict[str, float]] = field(default_factory=dict)  # {epoch: {point: its accuracy then}}

    def remember(self, point: Point) -> None:
        """Note what a point reached at the rungs it came to."""
        for rung in self.options.rungs:
            if rung in point.at:
                self.rungs.setdefault(rung, {})[point.job.name] = point.at[rung]

    def run(self, workers: Workers, console: Console) -> None:
        """Train what is left, showing a table of all points."""
        by_name = {point.job.name: point for point in self.points}
        jobs = deque(self._to_next_rung(point) for point in self.points if point.state not in ENDED)
        live = Live(console=console, get_renderable=self.table, refresh_per_second=2, transient=False)
        with live if console.is_terminal else contextlib.nullcontext():
            for event in workers.events(jobs):
                point = by_name[event.job.name]
                before = point.epochs
                self._take(point, event, jobs)
                if not console.is_terminal and (event.ended or point.epochs > before):
                    console.print(f"{point.job.name}: {point.told or point.state}")

    def _take(self, point: Point, event: Event, jobs: deque[Job]) -> None:
        point.state, point.told = "running", event.line or point.told
        point.read()
        if not event.ended:
            return
        if event.error:
            point.state, point.told = "failed", event.error
        elif point.state != "done":
            self._at_rung(point, jobs)
        save(self)

    def _to_next_rung(self, point: Point) -> Job:
        rung = next((epoch for epoch in self.options.rungs if epoch > point.epochs), 0)
        return replace(point.job, stop_after=rung if rung < point.total else 0)

    def _at_rung(self, point: Point, jobs: deque[Job]) -> None:
        """Let a point go on if it is among the best of its rung so far (Li et al., "ASHA", MLSys 2020: the stopping rule)."""
        self.remember(point)
        accuracy, came = point.at[point.epochs], self.rungs[point.epochs].values()
        if sum(other > accuracy for other in came) < max(1, len(came) * self.options.keep):
            point.state = "waiting"
            jobs.append(self._to_next_rung(point))
        else:
            point.state = "stopped"

    def table(self) -> Table:
        """Of all points: state, epoch, accuracy, time left."""
        table = Table(
            "point", "state", Column("epoch", justify="right"), Column("top-1", justify="right"),
            Column("left", justify="right"), box=None, pad_edge=False, padding=(0, 2, 0, 0),
        )  # fmt: skip
        shown = sorted(self.points, key=lambda point: ("running", "failed", "waiting", "done", "stopped").index(point.state))
        for point in shown[:40]:
            accuracy = "" if point.accuracy is None else f"{point.accuracy:.2%}"
            left = clock(point.seconds_left) if point.state == "running" and point.seconds_left is not None else ""
            table.add_row(Text(point.job.name), point.state, f"{point.epochs}/{point.total}", accuracy, left)
        if len(shown) > 40:
            table.caption = f"and {len(shown) - 40} more"
        return table


def main() -> None:
    """Parse, plan, train what is left, sum up."""
    options = parse_arguments(Options, PROGRAM, repeatable="--set")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    sweep = Sweep(options, points_of(options))
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with RunFolder(options.out).held(new=False):
            go_on(sweep, console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is in {options.out}; the same command goes on") from None
    failed = [point for point in sweep.points if point.state == "failed"]
    console.print(sweep.table() if console.is_terminal else summary_table(sweep))
    for point in failed:
        console.print(f"{point.job.name} failed: {point.told}", style="yellow")
    console.print(f"results: {options.out}")
    sys.exit(1 if failed else 0)


def go_on(sweep: Sweep, console: Console) -> None:
    """Train what is left of a sweep and sum up all of it."""
    before = read_states(sweep.options.out)
    for point in sweep.points:
        point.job.finished()  # raises for one that was begun otherwise
        point.read(before.get(point.job.name) == "stopped")
        sweep.remember(point)
    left = [point for point in sweep.points if point.state not in ENDED]
    console.print(f"{len(sweep.points)} points, {len(sweep.points) - len(left)} done; into {sweep.options.out}")
    if left:
        began = time.monotonic()
        options = sweep.options
        with opened(options.on, options.data, options.cores, options.per_gpu, console) as workers:
            sweep.run(workers, console)
        console.print(f"took {clock(time.monotonic() - began)}")
    save(sweep)
    if sweep.options.plot and (done := [point for point in sweep.points if point.state == "done"]):
        from fastcifar import plots  # here, since matplotlib takes a second to import

        plots.draw_points([(name, [p.accuracy or 0.0 for p in group]) for name, group in settings_of(done)], sweep.options.out)


def read_states(out: Path) -> dict[str, str]:
    """{point: state} as sweep.json has it; nothing where there is none."""
    if not (out / "sweep.json").exists():
        return {}
    values = files.read_json(out / "sweep.json", remedy="delete it")
    try:
        return {point["name"]: point["state"] for point in values["points"]}
    except (TypeError, KeyError):
        raise InputError(f"{out / 'sweep.json'} is not a sweep's: delete it, or choose another --out") from None


def points_of(options: Options) -> list[Point]:
    """The grid, every command line of it checked. Raises InputError for what training would refuse."""
    settings = [dict(pairs) for pairs in itertools.product(*map(values_of, options.set))]
    if options.points > len(settings):
        raise InputError(
            f"points {options.points} is more than the grid's {len(settings)} settings: lower it, or give --set more"
        )
    if options.points:
        drawn = sorted(random.Random(options.points_seed).sample(range(len(settings)), options.points))
        settings = [settings[number] for number in drawn]
    points = [point_of(options, *each) for each in itertools.product(options.archs, settings, options.seeds)]
    for point in points:
        total = point.total  # parses its flags
        require(options, all(rung < total for rung in options.rungs), "rungs", f"below the {total} epochs of {point.job.name}")
        every = point.job.command.run.eval_every
        require(options, all(rung % every == 0 for rung in options.rungs), "rungs", f"multiples of eval_every ({every})")
    return points


def values_of(text: str) -> list[tuple[str, str]]:
    """[(flag, value)] of FLAG=VALUE,VALUE. Raises InputError for anything else."""
    name, equals, values = text.removeprefix("--").partition("=")
    chosen = values.split(",")
    if not name or not equals or "" in chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"--set takes FLAG=VALUE,VALUE with each value once, got {text!r}: for example peak_lr=0.05,0.1")
    return [(name.replace("_", "-"), value) for value in chosen]


def point_of(options: Options, arch: str, setting: dict[str, str], seed: int) -> Point:
    """One training of the grid. Raises InputError for flags that are the sweep's own."""
    given = [*split_flags(options.flags), *(part for name, value in setting.items() for part in (f"--{name}", *value.split()))]
    for flag in given:
        if flag.split("=")[0].replace("_", "-") in OWN_FLAGS:
            raise InputError(f"{flag.split('=')[0]} is the sweep's to set: give it to the sweep itself")
    epochs = ("--epochs", str(options.epochs)) if options.epochs else ()
    own = (
        "--arch",
        arch,
        "--seed",
        str(seed),
        "--data",
        str(options.data.resolve()),
        "--plan",
        "default",
        "--no-plots",
        *epochs,
    )
    return Point(
        arch, setting, seed, Job(options.out / "runs", f"{setting_name(arch, setting)}-seed{seed}", latest([*own, *given]))
    )


def setting_name(arch: str, setting: dict[str, str]) -> str:
    """As a folder's name: `se_resnet18-peak_lr=0.1-cutout=8`."""
    parts = [
        arch,
        *(f"{name.replace('-', '_')}={value.replace('/', '_').replace(' ', ',')}" for name, value in setting.items()),
    ]
    return "-".join(parts)


def settings_of(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    """Points by architecture and setting, their seeds together."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(setting_name(point.arch, point.setting), []).append(point)
    return list(groups.items())


def rows_of(sweep: Sweep) -> list[dict[str, Any]]:
    """A row for each setting: mean top-1 of its finished seeds, deviation, 95 % interval of the mean."""
    rows = []
    for name, group in settings_of(sweep.points):
        values = [point.accuracy for point in group if point.state == "done" and point.accuracy is not None]
        interval: tuple[float | None, float | None] = (None, None)
        if len(values) > 1 and stdev(values) > 0:
            interval = tuple(map(float, stats.ttest_1samp(values, 0).confidence_interval()))  # type: ignore[assignment]
        rows.append(
            {
                "name": name,
                "arch": group[0].arch,
                **group[0].setting,
                "seeds": len(group),
                "done": len(values),
                "top1": fmean(values) if values else None,
                "deviation": stdev(values) if len(values) > 1 else None,
                "low": interval[0],
                "high": interval[1],
                "seconds": sum(point.seconds for point in group),
            }
        )
    return rows


def save(sweep: Sweep) -> None:
    """Write sweep.json and sweep.csv."""
    rows = rows_of(sweep)
    points = [
        {
            "name": point.job.name, "arch": point.arch, "setting": point.setting, "seed": point.seed, "state": point.state,
            "epochs": point.epochs, "top1": point.accuracy, "seconds": point.seconds,
            "error": point.told if point.state == "failed" else "",
        }
        for point in sweep.points
    ]  # fmt: skip
    files.write_json(sweep.options.out / "sweep.json", {"settings": rows, "points": points})
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_bytes(sweep.options.out / "sweep.csv", text.getvalue().encode())


def summary_table(sweep: Sweep) -> Table:
    """Of all settings: mean, deviation and interval over their seeds."""
    columns = (Column(name, justify="right") for name in ("seeds", "top-1", "deviation", "95 % interval"))
    table = Table("setting", *columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in sorted(rows_of(sweep), key=lambda row: -(row["top1"] or 0)):
        deviation = "" if row["deviation"] is None else f"{row['deviation']:.2%}"
        interval = "" if row["low"] is None else f"{row['low']:.2%} to {row['high']:.2%}"
        mean = "" if row["top1"] is None else f"{row['top1']:.2%}"
        table.add_row(Text(row["name"]), f"{row['done']}/{row['seeds']}", mean, deviation, interval)
    return table


if __name__ == "__main__":
    run_command(main)
