#!/usr/bin/env python3
"""What changed between two benchmarks, figure by figure with intervals; exit code 1 when something got worse.

python bench/compare.py bench/results/before bench/results/after --threshold 5

What A has and B has not is a warning; exit code 2 says that nothing of A could be compared.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bench import stats
from bench.report import between, points, significant
from bench.results import Results, Run, read_results
from bench.stats import Estimate
from fastcifar.arguments import parse_arguments
from fastcifar.errors import InputError, require, run_command

SPEED, ACCURACY = "images/s", "top-1"
# Few repetitions give an interval so wide that it shows nothing. A fall of more than so many thresholds needs no interval of
# repetitions, if every repetition of B lies below every one of A.
LARGE = 5


@dataclass(frozen=True)
class Options:
    """Compare two results of bench/run.py; exit code 1 when B is slower or less accurate beyond a threshold."""

    a: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="A")]]  # results.json before, or its folder
    b: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="B")]]  # results.json after, or its folder
    threshold: float = 5.0  # percent of throughput that may be lost
    accuracy_threshold: float = 1.0  # points of top-1 that may be lost

    def __post_init__(self) -> None:
        require(self, 0 <= self.threshold < 100, "threshold", "0 to below 100 percent")
        require(self, 0 <= self.accuracy_threshold <= 100, "accuracy_threshold", "0 to 100 points")


@dataclass(frozen=True)
class Row:
    """One figure in both results. change: of the rate as a share (-0.1: ten percent less), or of top-1 in shares."""

    name: str
    what: str
    before: str
    after: str
    change: Estimate | None  # None: failed in B
    repetitions: str = ""
    below: bool = False  # every repetition of B lies below every one of A
    chance: bool = False  # sampling the test images alone can explain the change

    def verdict(self, options: Options) -> str:
        """The last column: WORSE or FAILED, which decide the exit code, or what else can be said."""
        if self.change is None:
            return "FAILED"
        allowed = (options.threshold if self.what == SPEED else options.accuracy_threshold) / 100
        change, shown = self.change.estimate, self.change.excludes(0)
        if not self.chance and ((shown and change < -allowed) or (self.below and change < -LARGE * allowed)):
            return "WORSE"
        if not self.change.interval:
            return "no interval: not judged"
        if not shown or self.chance:
            return "no change shown"
        return "better" if change > 0 else "worse, within the threshold"

    def worse(self, options: Options) -> bool:
        return self.verdict(options) in ("WORSE", "FAILED")


def main() -> None:
    """Read both, print warnings and the table, end with exit code 1 when something got worse."""
    options = parse_arguments(Options, "python bench/compare.py")
    (before_path, before), (after_path, after) = read_results(options.a), read_results(options.b)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in warnings(before, after):
        console.print(f"warning: {plain(line)}")
    rows = list(compare(before, after))
    console.print(f"A = {before_path}, B = {after_path}")
    if not rows:
        raise InputError(f"nothing of {before_path} could be compared: {after_path} has none of its runs and timings")
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table(rows, options))
    console.print(
        "Rates are geometric means. Intervals are 95 %: of rates Welch's of the logarithms over blocks of rounds or epochs, of "
        "accuracies over seeds, with one seed the binomial one of the test images. They do not know how a machine's speed "
        "differs between two days, and one row in twenty excludes no change by chance. Without an interval that shows it, a "
        f"fall of more than {LARGE} thresholds counts as worse where all repetitions of B lie below all of A."
    )
    lost = [row for row in rows if row.worse(options)]
    if lost:
        console.print(f"{len(lost)} worse than A: " + plain(", ".join(f"{row.name} ({row.what})" for row in lost)))
        sys.exit(1)


def compare(before: Results, after: Results) -> Iterator[Row]:
    """Every variant's speed and accuracy, every optimization and every arm of an ablation in A, where B tried the same."""
    timed = set()
    for what, old in before.comparisons().items():
        new = after.comparisons().get(what)
        if new is None or what == "baselines" or old.settings.get("arch") != new.settings.get("arch"):
            continue
        found = {timing.name: timing.images_per_second for timing in new.timings}
        for timing in (timing for timing in old.measured() if timing.name in found):
            timed.add(timing.name)
            name = timing.name if what == "speeds" else f"{what}: {timing.title}"
            yield speed(name, timing.images_per_second, found[timing.name], "rounds")
    groups, failed = after.groups(), {run.name for run in after.runs if run.error}
    for name, runs in before.groups().items():
        others = groups.get(name, [])
        if others and name not in timed and "/" not in name:
            rates, other_rates = ([rate for run in side for rate in run.rates] for side in (runs, others))
            yield speed(name, rates, other_rates, "epochs")
        if others and recipe_of(runs) == recipe_of(others):
            yield accuracy(name, runs, others)
        for run in runs:
            if run.name in failed:
                yield Row(run.name, ACCURACY, f"{run.top1:.2%}", "failed", None)


def recipe_of(runs: list[Run]) -> set[tuple[int, ...]]:
    """What accuracies must share to be compared: epochs, batch size, training images, test images."""
    return {(len(run.train_seconds), run.batch_size, run.images_per_epoch, run.test_images) for run in runs}


def speed(name: str, before: Sequence[float], after: Sequence[float], unit: str) -> Row:
    if not after:
        return Row(name, SPEED, significant(geometric_mean(before)), "failed", None)
    change = stats.ratio_apart(after, before).through(lambda ratio: ratio - 1)
    old, new = (significant(geometric_mean(side)) for side in (before, after))
    repetitions = f"{len(before)}, {len(after)} {unit}"
    return Row(name, SPEED, old, new, change, repetitions, below=max(after) < min(before))


def accuracy(name: str, before: Sequence[Run], after: Sequence[Run]) -> Row:
    """Top-1 of the last epoch: over seeds by Welch's test, since with other code the same seed is another run; and not beyond
    what drawing other test images could do."""
    tops = [[run.top1 for run in side] for side in (before, after)]
    images = [stats.proportion(sum(run.hits for run in side), sum(run.test_images for run in side)) for side in (before, after)]
    binomial, seeds = stats.proportion_difference(images[1], images[0]), stats.difference(tops[1], tops[0])
    shown = seeds if seeds.low is not None else binomial
    old, new = (f"{fmean(side):.2%}" for side in tops)
    repetitions, below = f"{len(before)}, {len(after)} seeds", max(tops[1]) < min(tops[0])
    return Row(name, ACCURACY, old, new, shown, repetitions, below, chance=not binomial.excludes(0))


def warnings(before: Results, after: Results) -> Iterator[str]:
    """What else differs between the two, and what B lacks, one line each."""
    for name in ("hardware", "versions"):
        old, new = before.environment.get(name), after.environment.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
            old, new = ({key: side.get(key) for key in changed} for side in (old, new))
        if old != new:
            yield f"{name} differ: {old} in A, {new} in B"
    names = [(side.data.get("name"), side.data.get("sha256")) for side in (before, after)]
    if names[0] != names[1]:
        yield f"data differ: {names[0]} in A, {names[1]} in B"
    groups_a, groups_b = before.groups(), after.groups()
    for name in sorted(groups_a.keys() & groups_b.keys()):
        seeds = [", ".join(str(run.seed) for run in groups[name]) for groups in (groups_a, groups_b)]
        if seeds[0] != seeds[1]:
            yield f"{name}: finished seeds differ: {seeds[0]} in A, {seeds[1]} in B"
        if recipe_of(groups_a[name]) != recipe_of(groups_b[name]):
            yield f"{name} was trained differently (epochs, batch or images): its accuracy is not compared"
    lacking = sorted(groups_a.keys() - groups_b.keys())
    for what, old in before.comparisons().items():
        other = after.comparisons().get(what)
        there = {timing.name for timing in other.timings} if other else set()
        lacking += [f"{what}: {timing.title}" for timing in old.measured() if timing.name not in there]
        if other and other.settings.get("arch") != old.settings.get("arch"):
            yield f"{what} are of other models: not compared"
    if lacking:
        yield f"only in A: {', '.join(lacking)}"


def table(rows: list[Row], options: Options) -> Table:
    """All rows for people; as Text, in which nothing is markup."""
    titles = ("what", "", "A", "B", "change", "95 % interval", "n", "verdict")
    right = ("A", "B", "change")
    columns = (Column(each, justify="right" if each in right else "left", overflow="fold") for each in titles)
    shown = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        verdict, change, interval = row.verdict(options), "", ""
        if row.change is not None:
            change = f"{points(row.change.estimate)} {'%' if row.what == SPEED else 'points'}"
            interval = between(row.change, points)
        style = {"WORSE": "bold red", "FAILED": "bold red", "better": "green"}.get(verdict, "")
        texts: list[Any] = [row.name, row.what, row.before, row.after, change, interval, row.repetitions, verdict]
        shown.add_row(*(Text(plain(text)) for text in texts), style=style)
    return shown


def plain(text: str) -> str:
    """The text of a strange file without what would steer the terminal."""
    return "".join(c if c.isprintable() or c == "\N{NO-BREAK SPACE}" else "?" for c in text)


if __name__ == "__main__":
    run_command(main)
