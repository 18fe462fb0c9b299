#!/usr/bin/env python3
"""Two benchmarks' results enter; the change of every cell with its interval leaves, and exit code 1 when something got worse.

python bench/compare.py bench/results/before bench/results/after --threshold 5

Cells belong together by architecture and levers; an architecture with one set of levers on each side is compared whatever they
are, after a warning. What A has and B has not is a warning; exit code 2 says that nothing of A could be compared.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.figures import finished, grouped, load_results, steady_rates, worked
from bench.intervals import change_apart, welch
from bench.schema import Cell, Ladder, Results
from bench.view.wording import percent, significant
from fastcifar.errors import InputError, require, run_command

SPEED, ACCURACY = "images/s", "top-1"
# One seed a side does not tell how far seeds lie apart: only a fall of this many thresholds is taken for more than that.
ALONE = 5
Key = tuple[str, tuple[str, ...]]  # architecture and levers


@dataclass(frozen=True)
class Options:
    """Compare two results of bench/run.py; exit code 1 when B is slower or less accurate beyond a threshold."""

    a: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="A")]]  # results.json before, or its folder
    b: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="B")]]  # results.json after, or its folder
    threshold: float = 5.0  # percent of throughput that may be lost
    accuracy_threshold: float = 1.0  # points of top-1 that may be lost; 5 times as many where one seed a side has no interval

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
    change: float | None  # None: gone or failed in B
    low: float | None = None  # None: too few repetitions for an interval
    high: float | None = None
    repetitions: str = ""

    def worse(self, options: Options) -> bool:
        """Whether it lost more than the threshold and its interval excludes no change; top-1 without one, `ALONE` times it."""
        if self.change is None:
            return True
        allowed = (options.threshold if self.what == SPEED else options.accuracy_threshold) / 100
        if self.high is None:
            return self.what == ACCURACY and self.change < -ALONE * allowed
        return self.high < 0 and self.change < -allowed

    def judged(self, options: Options) -> bool:
        """Whether the verdict says anything: no interval, no verdict, but for what is worse beyond doubt."""
        return self.high is not None or self.worse(options)

    def verdict(self, options: Options) -> str:
        """The last column."""
        if self.worse(options):
            return "WORSE" if self.change is not None else "FAILED"
        if self.low is None or self.high is None:  # not self.judged(options), as the type checker understands it
            return "no interval: not judged"
        if self.low <= 0 <= self.high:
            return "no change shown"
        return "better" if self.low > 0 else "worse, within the threshold"


def main() -> None:
    """Read both, print warnings and the table, end with exit code 1 when something got worse."""
    options = tyro.cli(Options, prog="python bench/compare.py")
    (before_path, before), (after_path, after) = load_results(options.a), load_results(options.b)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in warnings(before, after):
        console.print(f"warning: {plain(line)}")
    rows = list(compare(before, after))
    console.print(f"A = {before_path}, B = {after_path}")
    if not rows:
        raise InputError(f"nothing of {before_path} could be compared: {after_path} has none of its cells and rungs")
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table(rows, options))
    alone, unjudged = ALONE * options.accuracy_threshold, sum(not row.judged(options) for row in rows)
    console.print(
        "Rates are geometric means. Intervals are 95 %, over runs where there are several, else over the epochs or rounds "
        "within one; they do not know how a machine's speed differs between two days, and one row in twenty excludes no "
        f"change by chance. Without an interval a fall of top-1 by more than {alone:g} points counts as worse "
        f"({ALONE} times the threshold) and nothing else is judged: {unjudged} of {len(rows)} rows were not."
    )
    lost = [row for row in rows if row.worse(options)]
    if lost:
        console.print(f"{len(lost)} worse than A: " + plain(", ".join(f"{row.name} ({row.what})" for row in lost)))
        sys.exit(1)


def compare(before: Results, after: Results) -> Iterator[Row]:
    """Every variant's throughput and accuracy and every rung of the ladder that A has, where B tried the same."""
    cells_a, cells_b = grouped(before.cells), grouped(after.cells)
    failed = {(cell.arch, tuple(cell.levers), cell.seed) for cell in after.cells if not finished(cell)}
    for key, other in partners(before, after).items():
        if other is None:
            continue
        name = label(key) if sum(arch == key[0] for arch, _ in cells_a) > 1 else key[0]
        old, new = cells_a[key], cells_b.get(other, [])
        if new:
            yield throughput(name, old, new)
            if recipe_of(old) == recipe_of(new):
                yield accuracy(name, old, new)
        for cell in old:
            if (*other, cell.seed) in failed:
                yield Row(f"{name}, seed {cell.seed}", SPEED, significant(median(steady_rates(cell))), "failed", None)
    if before.ladder and after.ladder and same_ladder(before.ladder, after.ladder):
        yield from rungs(before.ladder, after.ladder)


def partners(before: Results, after: Results) -> dict[Key, Key | None]:
    """For every key of A that has finished cells, the key in B (finished or not) to compare it with; None: there is none."""
    keys_a, keys_b = list(grouped(before.cells)), {(cell.arch, tuple(cell.levers)) for cell in after.cells}
    found: dict[Key, Key | None] = {}
    for key in keys_a:
        there = [other for other in keys_b if other[0] == key[0]]
        alone = len(there) == 1 and sum(arch == key[0] for arch, _ in keys_a) == 1
        found[key] = key if key in keys_b else there[0] if alone else None
    return found


def label(key: Key) -> str:
    return f"{key[0]} ({' + '.join(key[1]) or 'no levers'})"


def throughput(name: str, old: list[Cell], new: list[Cell]) -> Row:
    """Images per second: a run is one repetition where both sides have several, else an epoch is."""
    if len(old) > 1 and len(new) > 1:
        before, after = ([median(steady_rates(cell)) for cell in cells] for cells in (old, new))
        unit = "runs"
    else:
        before, after = ([rate for cell in cells for rate in steady_rates(cell)] for cells in (old, new))
        unit = "epochs"
    return _speed_row(name, before, after, unit)


def accuracy(name: str, old: list[Cell], new: list[Cell]) -> Row:
    """Top-1 of the last epoch over seeds, by Welch's test: other code makes the same seed another run."""
    before, after = ([cell.final_top1 for cell in cells] for cells in (old, new))
    difference = welch(after, before)
    low, high = difference.interval or (None, None)
    repetitions = f"{len(before)}, {len(after)} seeds"
    return Row(name, ACCURACY, percent(fmean(before)), percent(fmean(after)), difference.mean, low, high, repetitions)


def rungs(old: Ladder, new: Ladder) -> Iterator[Row]:
    """Images per second of each rung that worked in A."""
    found = {rung.name: rung for rung in new.rungs}
    for rung in old.rungs:
        name = f"ladder: {rung.name}"
        if not worked(rung) or rung.name not in found:
            continue
        other = found[rung.name]
        if worked(other):
            yield _speed_row(name, rung.images_per_second, other.images_per_second, "rounds")
        else:
            yield Row(name, SPEED, significant(geometric_mean(rung.images_per_second)), "failed", None)


def recipe_of(cells: list[Cell]) -> set[tuple[int, int, int, int]]:
    """What accuracies must share to be compared: epochs, batch size, training images, test images."""
    return {(len(cell.epochs), cell.batch_size, cell.images_per_epoch, cell.test_images) for cell in cells}


def same_ladder(old: Ladder, new: Ladder) -> bool:
    return (old.arch, old.batch_size) == (new.arch, new.batch_size)


def warnings(before: Results, after: Results) -> Iterator[str]:
    """What else differs between the two, one line each."""
    for name, old, new in [
        ("hardware", before.environment.get("hardware"), after.environment.get("hardware")),
        ("data", _data(before), _data(after)),
    ]:
        if old != new:
            yield f"{name} differs: {old} in A, {new} in B"
    versions = [results.environment.get("versions") or {} for results in (before, after)]
    if all(isinstance(side, dict) for side in versions):
        old, new = versions
        changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if changed:
            yield "versions differ: " + ", ".join(f"{name} {old.get(name)} in A, {new.get(name)} in B" for name in changed)
    if before.ladder and after.ladder and not same_ladder(before.ladder, after.ladder):
        yield "the ladders are of other models or batch sizes: not compared"
    yield from unequal_cells(before, after)
    yield from missing_parts(before, after)


def unequal_cells(before: Results, after: Results) -> Iterator[str]:
    """Which cells of A are compared with others than their like, or with none."""
    cells_a, cells_b, pairs = grouped(before.cells), grouped(after.cells), partners(before, after)
    for key, other in pairs.items():
        if other is None:
            continue
        old, new = cells_a[key], cells_b.get(other, [])
        if key != other:
            yield f"levers differ: {label(key)} in A is compared with {label(other)} in B"
        seeds = [", ".join(str(cell.seed) for cell in cells) or "none" for cells in (old, new)]
        if seeds[0] != seeds[1]:
            yield f"{label(key)}: finished seeds differ: {seeds[0]} in A, {seeds[1]} in B"
        if new and recipe_of(old) != recipe_of(new):
            yield f"{label(key)} was trained differently (epochs, batch or images): its accuracy is not compared"
    missing = [label(key) for key, other in pairs.items() if other is None]
    if missing:
        yield f"only in A: {', '.join(missing)}"


def missing_parts(before: Results, after: Results) -> Iterator[str]:
    """Ladder, peers and ablations of A that B lacks, whole or in part. (A rung that fails in B is a row of the table.)"""
    if before.ladder:
        there = {rung.name for rung in after.ladder.rungs} if after.ladder else set()
        lost = [rung.name for rung in before.ladder.rungs if worked(rung) and rung.name not in there]
        if lost:
            yield f"only in A's ladder: {', '.join(lost)}" if after.ladder else "only in A: the ladder"
    if before.peers:
        there = {peer.name for peer in after.peers.entries if worked(peer)} if after.peers else set()
        lost = [peer.name for peer in before.peers.entries if worked(peer) and peer.name not in there]
        if lost:
            yield f"only A's peers have a rate of: {', '.join(lost)}" if after.peers else "only in A: the peers"
    ablations = sorted({ablation.name for ablation in before.ablations} - {ablation.name for ablation in after.ablations})
    if ablations:
        yield f"ablations only in A: {', '.join(ablations)}"


def table(rows: list[Row], options: Options) -> Table:
    """All rows for people; as Text, in which nothing is markup."""
    shown = Table(box=None, pad_edge=False)
    for title in ("what", "", "A", "B", "change", "95 % interval", "n", "verdict"):
        shown.add_column(title, justify="right" if title in ("A", "B", "change") else "left", overflow="fold")
    for row in rows:
        style = "bold red" if row.worse(options) else "green" if row.low is not None and row.low > 0 else ""
        interval = between_changes(row)
        texts = [row.name, row.what, row.before, row.after, _change(row), interval, row.repetitions, row.verdict(options)]
        shown.add_row(*(Text(plain(text)) for text in texts), style=style)
    return shown


def plain(text: str) -> str:
    """The text of a strange file without what would steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def between_changes(row: Row) -> str:
    if row.low is None or row.high is None:
        return ""
    return f"[{_form(row, row.low)}, {_form(row, row.high)}]"


def _change(row: Row) -> str:
    return "" if row.change is None else f"{_form(row, row.change)} {'%' if row.what == SPEED else 'points'}"


def _form(row: Row, value: float) -> str:
    return f"{100 * value:+.{1 if row.what == SPEED else 2}f}"


def _speed_row(name: str, before: list[float], after: list[float], unit: str) -> Row:
    change = change_apart(after, before)
    low, high = (bound - 1 for bound in change.interval) if change.interval else (None, None)
    means = [significant(geometric_mean(side)) for side in (before, after)]
    return Row(name, SPEED, means[0], means[1], change.ratio - 1, low, high, f"{len(before)}, {len(after)} {unit}")


def _data(results: Results) -> Any:
    return results.data.get("name"), results.data.get("sha256")


if __name__ == "__main__":
    run_command(main)
