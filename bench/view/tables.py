"""Figures of variants enter; the two sortable tables leave: speed beside accuracy, and what each variant costs."""

from collections.abc import Callable
from statistics import fmean, median

from bench.figures import Figures
from bench.intervals import Mean, Median
from bench.view.model import Column, Table, Value
from bench.view.wording import (
    NONE,
    count,
    millions,
    over_seeds,
    percent,
    seconds,
    seeds_detail,
    significant,
    size,
    span,
    spread,
)

Entry = Callable[[Figures], Value]
MISSING = Value(NONE)


def variant_tables(rows: list[Figures], target: float | None) -> list[Table]:
    """Speed and accuracy, then time and cost; a column that no variant fills is left out."""
    accuracy: list[tuple[Column, Entry]] = [
        (Column("Variant", "architecture, report, runs", numeric=False), name),
        (Column("Epochs/s", "50,000 training images each; 10th to 90th percentile"), epochs_per_second),
        (Column("Images/s", "in training; 10th to 90th percentile"), images_per_second),
        (Column("Top-1, %", "test accuracy after the last epoch"), lambda row: seeds_mean(row.final)),
        (Column("With flip, %", "the same with the mirror image averaged in"), lambda row: seeds_mean(row.flip)),
        (Column("Best, %", "the best epoch, chosen on the test set: optimistic"), lambda row: seeds_mean(row.best)),
    ]
    if target is not None:
        title = f"To {100 * target:g} %"
        accuracy.append((Column(title, "training time until the test accuracy was reached"), lambda row: time_to(row, target)))
    accuracy.append((Column("Report claims", "on its own data or split, after its whole recipe", numeric=False), claim))
    cost: list[tuple[Column, Entry]] = [
        (Column("Variant", "architecture", numeric=False), lambda row: Value(row.label, "", row.label)),
        (Column("Training", "time of an epoch as trained here"), lambda row: epoch_time(row.train_seconds)),
        (Column("Evaluation", "time of a pass over the test images"), lambda row: epoch_time(row.eval_seconds)),
        (Column("First step", "from the start of the run to the end of its first step"), first_step),
        (Column("Compile", "the first step's time less a later step's"), compile_time),
        (Column("Peak memory", "of the device; of the process on a CPU"), memory),
        (Column("Parameters"), parameters),
        (Column("FLOPs/image", "forward and backward, two per multiply-add"), flops),
        (Column("Of roofline", "images/s over the device's ceiling for this variant"), roofline),
        (Column("Energy/epoch", "of 50,000 training images"), energy),
    ]
    tables = [_table("Speed and accuracy", accuracy, rows), _table("Time and cost", cost, rows)]
    return [table for table in tables if table.rows]


def name(row: Figures) -> Value:
    report = row.variant.report if row.variant else ""
    source = {"": "", "-": "baseline, "}.get(report, f"report {report}, ")
    lengths = [len(cell.epochs) for cell in row.cells]
    epochs = count(lengths[0], "epoch") if len(set(lengths)) == 1 else f"{span(lengths)} epochs"
    return Value(row.label, f"{source}{count(len(row.cells), 'seed')} × {epochs}", row.label)


def epochs_per_second(row: Figures) -> Value:
    scale = row.epochs_per_second / row.images_per_second.median
    low, high = row.images_per_second.p10 * scale, row.images_per_second.p90 * scale
    return Value(significant(row.epochs_per_second), spread(low, high, significant), row.epochs_per_second)


def images_per_second(row: Figures) -> Value:
    rates = row.images_per_second
    return Value(significant(rates.median), spread(rates.p10, rates.p90, significant), rates.median)


def seeds_mean(mean: Mean) -> Value:
    return Value(over_seeds(mean), seeds_detail(mean), mean.mean)


def time_to(row: Figures, target: float) -> Value:
    reached = [value for value in row.seconds_to(target) if value is not None]
    if not reached:
        return Value("not reached")
    detail = spread(min(reached), max(reached), seconds)
    if len(reached) < len(row.cells):
        detail = ", ".join(filter(None, [detail, f"{len(reached)} of {count(len(row.cells), 'seed')}"]))
    return Value(seconds(fmean(reached)), detail, fmean(reached))


def claim(row: Figures) -> Value:
    text = row.variant.claim if row.variant else ""
    return Value(text, "", text) if text else MISSING


def epoch_time(value: Median) -> Value:
    return Value(seconds(value.median), spread(value.p10, value.p90, seconds), value.median)


def first_step(row: Figures) -> Value:
    return _over_cells([cell.first_step_seconds for cell in row.cells])


def compile_time(row: Figures) -> Value:
    return _over_cells([cell.compile_seconds for cell in row.cells])


def memory(row: Figures) -> Value:
    peak = row.peak_memory
    return MISSING if peak is None else Value(size(peak), "", float(peak))


def parameters(row: Figures) -> Value:
    return Value(f"{row.variant.parameters:,}", "", float(row.variant.parameters)) if row.variant else MISSING


def flops(row: Figures) -> Value:
    needed = row.variant.flops_per_image if row.variant else 0
    if not needed:
        return MISSING
    achieved = needed * row.images_per_second.median
    scale, unit = (1e12, "TFLOP/s") if achieved >= 1e12 else (1e9, "GFLOP/s")
    return Value(millions(needed), f"{significant(achieved / scale)} {unit}", float(needed))


def roofline(row: Figures) -> Value:
    share = row.roofline_share
    return MISSING if share is None else Value(percent(share, 0), "", share)


def energy(row: Figures) -> Value:
    joules = row.epoch_joules
    if joules is None:
        return MISSING
    text = f"{significant(joules / 1000)} kJ" if joules >= 1000 else f"{significant(joules)} J"
    return Value(text, "", joules)


def table_notes(rows: list[Figures], target: float | None) -> list[str]:
    """What a reader of the tables has to know."""
    if not rows:
        return []
    images = [cell.images_per_epoch for row in rows for cell in row.cells]
    notes = []
    if set(images) != {50_000}:
        notes.append(f"An epoch here is 50,000 images, whatever was trained on ({span(images)}): images/s divided by 50,000.")
    notes.append(
        "Speeds and times are medians, under them the 10th to 90th percentile, over every run's epochs but its first "
        f"({span([row.images_per_second.n for row in rows])} a variant); first step and compile: lowest to highest seed."
    )
    if any(len(cell.epochs) == 1 for row in rows for cell in row.cells):
        notes.append("Runs of one epoch have no later one: their rates contain compiling and warming up.")
    if target is not None:
        notes.append(
            f"Time to {100 * target:g} %: mean over seeds; training only, evaluation not counted, to the end of the epoch that "
            "reached it."
        )
    seeds = {len(row.cells) for row in rows}
    if max(seeds) > 1:
        wide = "; with two seeds t is 12.7, hence the width" if 2 in seeds else ""
        notes.append(f"Accuracy: mean ± standard deviation over seeds, in brackets the 95 % t interval of the mean{wide}.")
    if any((row.roofline_share or 0) > 1 for row in rows):
        notes.append(
            "More than 100 % of the roofline: the ceiling is made of rates measured once, and this machine's speed wanders."
        )
    notes.append(
        "What a report claims is its own claim, after its whole recipe and on its own validation split or the class "
        "competition's harder test set (Kaggle): not comparable with shorter runs on other data."
    )
    return notes


def _over_cells(values: list[float]) -> Value:
    return Value(seconds(median(values)), spread(min(values), max(values), seconds), median(values))


def _table(title: str, columns: list[tuple[Column, Entry]], rows: list[Figures]) -> Table:
    entries = [[entry(row) for _, entry in columns] for row in sorted(rows, key=lambda row: -row.images_per_second.median)]
    kept = [place for place in range(len(columns)) if any(line[place] != MISSING for line in entries)]
    titles = [columns[place][0] for place in kept]
    sorted_by = next((place for place, column in enumerate(titles) if column.title == "Epochs/s"), None)
    return Table(title, titles, [[line[place] for place in kept] for line in entries], sorted_by)
