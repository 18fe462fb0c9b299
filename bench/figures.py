"""Results enter; for each variant its rates, accuracies, times and costs leave as numbers with their repetitions."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median

from bench.intervals import Mean, Median, describe_mean, describe_median
from bench.schema import Cell, Peer, Results, Rung, Variant, read_results
from fastcifar.errors import InputError

EPOCH_IMAGES = 50_000  # CIFAR's training set: epochs per second always mean so many images
TARGET_STEP = 0.05  # a target accuracy nobody stated is a multiple of this
LEFT_OUT = ("not applicable", "left out")  # how bench/ladder.py and bench/peers.py begin an error that is none


@dataclass(frozen=True)
class Figures:
    """One architecture with one set of levers: its finished cells and what they amount to."""

    label: str
    cells: list[Cell]  # finished ones, at least one
    variant: Variant | None
    images_per_second: Median  # over the steady epochs of all cells
    train_seconds: Median  # per steady epoch
    eval_seconds: Median
    final: Mean  # top-1 of the last epoch, over seeds
    flip: Mean
    best: Mean

    @property
    def epochs_per_second(self) -> float:
        return self.images_per_second.median / EPOCH_IMAGES

    @property
    def first_step_seconds(self) -> float:
        return median(cell.first_step_seconds for cell in self.cells)

    @property
    def compile_seconds(self) -> float:
        return median(cell.compile_seconds for cell in self.cells)

    @property
    def peak_memory(self) -> int | None:
        return max((cell.peak_memory for cell in self.cells if cell.peak_memory is not None), default=None)

    @property
    def epoch_joules(self) -> float | None:
        """Energy of `EPOCH_IMAGES` training images, mean over the cells that counted it."""
        counted = [
            cell.energy_joules / (cell.images_per_epoch * len(cell.epochs)) * EPOCH_IMAGES
            for cell in self.cells
            if cell.energy_joules is not None
        ]
        return fmean(counted) if counted else None

    @property
    def roofline_share(self) -> float | None:
        ceiling = self.variant.roofline_images_per_second if self.variant else None
        return self.images_per_second.median / ceiling if ceiling else None

    def seconds_to(self, target: float) -> list[float | None]:
        """Training seconds of each cell up to the end of the first epoch whose test top-1 is `target`; None: never."""
        return [
            next((s for s, e in zip(elapsed(cell), cell.epochs, strict=True) if e.test_top1 >= target), None)
            for cell in self.cells
        ]


def load_results(path: Path) -> tuple[Path, Results]:
    """Read and check `path`, a results.json or its folder; return the file's path too. Raises InputError."""
    file = path / "results.json" if path.is_dir() else path
    results = read_results(file)
    check(results, str(file))
    return file, results


def check(results: Results, where: str = "results") -> None:
    """Refuse figures that no measurement gives, such as a rate of zero. Raises InputError naming the first."""

    def sound(what: str, values: Iterable[float], low: float, high: float = math.inf, *, above: bool = False) -> None:
        for value in values:
            if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
                raise InputError(f"{where}: {what} is {value}: run the benchmark again")

    for cell in results.cells:
        sound(f"{cell.key}: a training time", [epoch.train_seconds for epoch in cell.epochs], 0, above=True)
        sound(f"{cell.key}: a time", [cell.first_step_seconds, *(epoch.eval_seconds for epoch in cell.epochs)], 0)
        sound(f"{cell.key}: compile_seconds", [cell.compile_seconds], -math.inf)
        sound(f"{cell.key}: an accuracy", [cell.final_top1, cell.final_flip_top1, cell.best_top1], 0, 1)
        sound(f"{cell.key}: an accuracy", [top1 for e in cell.epochs for top1 in (e.train_top1, e.test_top1)], 0, 1)
        sound(f"{cell.key}: a count", [cell.energy_joules or 0, cell.peak_memory or 0], 0)
        if cell.epochs and not cell.error:
            sound(f"{cell.key}: images_per_epoch", [cell.images_per_epoch], 1)
    for variant in results.variants:
        sound(f"{variant.arch}: a count", [variant.parameters, variant.flops_per_image, variant.bytes_per_image], 0)
        sound(f"{variant.arch}: the roofline", [variant.roofline_images_per_second or 1.0], 0, above=True)
    rungs, peers = results.ladder.rungs if results.ladder else [], results.peers.entries if results.peers else []
    timed: list[Rung | Peer] = [*rungs, *peers]
    for entry in timed:
        sound(f"{entry.name}: a rate", entry.images_per_second, 0, above=True)
    if len({len(rung.images_per_second) for rung in rungs if worked(rung)}) > 1:
        raise InputError(f"{where}: the ladder's rungs had unequal numbers of rounds: run the benchmark again")
    for ablation in results.ablations:
        for arm in ablation.arms:
            sound(f"{ablation.name}, {arm.name}: an accuracy", [top1 for top1 in arm.top1 if top1 is not None], 0, 1)
            if len(arm.top1) != len(ablation.seeds):
                raise InputError(f"{where}: {ablation.name}, {arm.name}: {len(arm.top1)} runs for {len(ablation.seeds)} seeds")


def worked(entry: Rung | Peer) -> bool:
    """Whether a rung or a peer was measured."""
    return entry.error is None and bool(entry.images_per_second)


def broke(entry: Rung | Peer) -> bool:
    """Whether a rung or a peer failed; what a device does not have, or a run does without, did not."""
    return entry.error is not None and not entry.error.startswith(LEFT_OUT)


def in_turns(ours: Peer, peer: Peer) -> bool:
    """Whether two peers' rates belong together round by round; those of an outside script do not."""
    return not (ours.apart or peer.apart) and len(ours.images_per_second) == len(peer.images_per_second)


def finished(cell: Cell) -> bool:
    """Whether a cell has figures."""
    return cell.error is None and bool(cell.epochs)


def steady_rates(cell: Cell) -> list[float]:
    """Images per second of each epoch but the first, which holds compiling and warming up (unless it is the only one)."""
    return [cell.images_per_epoch / epoch.train_seconds for epoch in cell.epochs[1:] or cell.epochs]


def elapsed(cell: Cell) -> list[float]:
    """Training seconds up to each epoch's end; evaluation is not counted."""
    return list(accumulate(epoch.train_seconds for epoch in cell.epochs))


def all_figures(results: Results) -> list[Figures]:
    """Figures of every architecture and set of levers that has a finished cell, in the order of the variants."""
    groups = grouped(results.cells)
    several = {arch for arch, _ in groups if sum(other == arch for other, _ in groups) > 1}
    variants = {variant.arch: variant for variant in results.variants}
    order = {arch: place for place, arch in enumerate(variants)}
    rows = []
    for (arch, levers), cells in sorted(groups.items(), key=lambda item: order.get(item[0][0], len(order))):
        steady = [epoch for cell in cells for epoch in cell.epochs[1:] or cell.epochs]
        rows.append(
            Figures(
                label=f"{arch} ({' + '.join(levers) or 'no levers'})" if arch in several else arch,
                cells=cells,
                variant=variants.get(arch),
                images_per_second=describe_median([rate for cell in cells for rate in steady_rates(cell)]),
                train_seconds=describe_median([epoch.train_seconds for epoch in steady]),
                eval_seconds=describe_median([epoch.eval_seconds for epoch in steady]),
                final=describe_mean([cell.final_top1 for cell in cells]),
                flip=describe_mean([cell.final_flip_top1 for cell in cells]),
                best=describe_mean([cell.best_top1 for cell in cells]),
            )
        )
    return rows


def grouped(cells: list[Cell]) -> dict[tuple[str, tuple[str, ...]], list[Cell]]:
    """Finished cells by architecture and levers, in order of seed."""
    groups: dict[tuple[str, tuple[str, ...]], list[Cell]] = {}
    for cell in sorted(filter(finished, cells), key=lambda cell: cell.seed):
        groups.setdefault((cell.arch, tuple(cell.levers)), []).append(cell)
    return groups


def target_top1(results: Results, rows: list[Figures]) -> float | None:
    """The accuracy to which seconds are counted: the one stated in the settings, else the highest multiple of 5 % that every
    cell of at least half of the variants reaches; None when that is chance.
    """
    stated = results.settings.get("target_top1")
    if isinstance(stated, (int, float)) and 0 < stated < 1:
        return float(stated)
    reached = sorted(min(max(epoch.test_top1 for epoch in cell.epochs) for cell in row.cells) for row in rows)
    if not reached:
        return None
    target = math.floor(reached[len(reached) // 2] / TARGET_STEP + 1e-9) * TARGET_STEP
    return round(target, 2) if target > 0.1 else None
