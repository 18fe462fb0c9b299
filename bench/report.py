#!/usr/bin/env python3
"""A benchmark's page, `report.html`, one file that needs no network, and `report.md` of the same figures beside it.

python bench/report.py runs/bench
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bench import stats
from bench.results import EPOCH_IMAGES, Ablation, Comparison, Results, Run, Timing, Variant, check, read_results
from bench.stats import Estimate
from fastcifar.errors import run_command
from fastcifar.files import write_bytes
from fastcifar.plots import COLOURS, STYLE

SVG: Any = {"svg.fonttype": "none", "text.parse_math": False}  # text stays text, and a $ in a name a $
WIDTH = 4.6  # inches of a chart, 331 units of its SVG: as wide as a phone's page, so that its text is as large as drawn
LEVEL = 0.05  # of a claimed difference, after Holm's correction
NONE = "–"
# What Markdown would take for markup in running text. An underscore within a word is none.
MARKUP = re.compile(r"([\\`*~|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=\])\()")


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str
    detail: str = ""  # interval, spread, number of repetitions
    sort: float | str | None = None  # None: no figure, last in every order


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it. In a table the first column names the row."""

    title: str
    text: str = ""
    charts: list[str] = field(default_factory=list)  # SVG
    columns: list[str] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sortable(self) -> bool:
        return bool(self.rows) and self.rows[0][0].sort is not None

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-") or "section"


@dataclass(frozen=True)
class Report:
    """A whole page."""

    title: str
    banners: list[str]  # what must be read before any figure
    lead: str
    headlines: list[tuple[str, str, str]]  # what, figure, detail
    sections: list[Section]


@dataclass(frozen=True)
class Row:
    """A variant with what was measured of it."""

    arch: str
    variant: Variant | None
    runs: list[Run]
    speed: Estimate | None  # images per second
    accuracy: Estimate | None  # top-1 of the last epoch: over seeds, or of one seed's test images


@dataclass(frozen=True)
class Options:
    """Write report.html and report.md beside a results.json."""

    results: tyro.conf.Positional[Path]  # results.json, or the folder it is in


def main() -> None:
    """Read, write, name what was written."""
    file, results = read_results(tyro.cli(Options, prog="python bench/report.py").results)
    for path in write_reports(file.parent, results):
        print(path)


def write_reports(folder: Path, results: Results) -> list[Path]:
    """Write both reports into `folder`; return their paths. Raises InputError for figures that no measurement gives."""
    report = build_report(results)
    pages = {"report.html": render_html(report), "report.md": render_markdown(report)}
    for name, page in pages.items():
        write_bytes(folder / name, page.encode())
    return [folder / name for name in pages]


def build_report(results: Results) -> Report:
    """Compute everything the page lays out."""
    check(results)
    rows = variant_rows(results)
    failed = [[Cell(run.name), Cell(run.error)] for run in results.runs if run.error]
    for what, comparison in results.comparisons().items():
        failed += [[Cell(f"{what}: {timing.title}"), Cell(timing.error)] for timing in comparison.timings if timing.failed]
    facts = [[Cell(name), Cell(value)] for name, value in environment(results)]
    sections = [
        scatter(rows),
        *variant_tables(rows, results),
        learning_curves(rows),
        optimizations(results.optimizations),
        baselines(results.baselines),
        *(ablation(each, results) for each in results.ablations),
        Section("Failed", columns=["What", "Its last line"], rows=failed) if failed else None,
        Section("Environment", columns=["Fact", "Value"], rows=facts) if facts else None,
    ]
    return Report(
        title=f"fastcifar benchmark: {results.environment.get('hardware') or 'unnamed hardware'}",
        banners=banners(results),
        lead=lead(results, rows),
        headlines=headlines(rows, results),
        sections=[section for section in sections if section is not None],
    )


def variant_rows(results: Results) -> list[Row]:
    """Every architecture that was timed or trained, in the order of the variants: no ranking."""
    timed = {timing.name: timing.images_per_second for timing in results.speeds.measured()} if results.speeds else {}
    trained, costs = results.of_variants(), {variant.arch: variant for variant in results.variants}
    rows = []
    for arch in dict.fromkeys([*costs, *timed, *trained]):
        runs = trained.get(arch, [])
        rates = timed.get(arch) or [rate for run in runs for rate in run.rates]
        if rates:
            rows.append(Row(arch, costs.get(arch), runs, stats.rate(rates), accuracy(runs) if runs else None))
    return rows


def accuracy(runs: Sequence[Run]) -> Estimate:
    """Top-1 over seeds; of one seed by Wilson's binomial interval of its test images."""
    if len(runs) == 1:
        return stats.proportion(runs[0].hits, runs[0].test_images)
    mean = stats.mean([run.top1 for run in runs])
    if mean.low is None or mean.high is None:
        return mean
    return replace(mean, low=max(mean.low, 0.0), high=min(mean.high, 1.0))  # whatever t says


def banners(results: Results) -> list[str]:
    """Data that makes accuracies mean nothing, and a machine too busy for its speeds to be believed."""
    said, data = [], results.data
    if data.get("synthetic"):
        said.append(
            "Synthetic dataset: accuracy means nothing here. The images were drawn by a program; only speeds can be read."
        )
    elif data.get("official") is False:
        said.append("Not the official archive: accuracies compare among themselves only, not with published ones.")
    loads, cores = results.environment.get("load"), results.environment.get("cores")
    if isinstance(loads, dict) and isinstance(cores, int):
        busy = {when: load for when, load in loads.items() if isinstance(load, int | float) and load > cores + 0.5}
        if busy:  # half a core is what an idle machine's own chores and this benchmark's previous minute can add
            told = ", ".join(f"{load:g} {when}" for when, load in busy.items())
            said.append(
                f"Busy machine: its load was {told}, on {count(cores, 'core')}. Speeds here are those of a share of it."
            )
    return said


def lead(results: Results, rows: list[Row]) -> str:
    """What was measured, on what, on which data."""
    runs, hardware = [run for row in rows for run in row.runs], results.environment.get("hardware") or "unnamed hardware"
    data = results.data.get("name") or "a data set without a name"
    if not runs:
        return f"Measured on {hardware}; no variant was trained. The data is {data}."
    seeds, epochs = (
        span([len(x) for x in many]) for many in ([r.runs for r in rows if r.runs], [r.train_seconds for r in runs])
    )
    return (
        f"{count(sum(bool(row.runs) for row in rows), 'variant')} trained with {plural(seeds, 'seed')} each for "
        f"{plural(epochs, 'epoch')} of {span([run.images_per_epoch for run in runs])} images of {data} on {hardware}; accuracy "
        f"is measured on {plural(span([run.test_images for run in runs]), 'image')} of the test set."
    )


def headlines(rows: list[Row], results: Results) -> list[tuple[str, str, str]]:
    """At most four figures to remember; nothing is called first whose interval overlaps another's."""
    lines = []
    fastest = first([(row.arch, row.speed) for row in rows])
    if fastest:
        arch, speed = fastest
        lines.append(
            ("Fastest", f"{significant(minutes(speed.estimate))} min/epoch", f"{arch}, {significant(speed.estimate)} images/s")
        )
    best = first([(row.arch, row.accuracy) for row in rows])
    if best and not results.data.get("synthetic"):
        lines.append(("Highest accuracy", f"{100 * best[1].estimate:.2f} %", f"{best[0]}, {between(best[1], share)}"))
    steps = results.optimizations.measured() if results.optimizations else []
    if len(steps) > 1:
        gain = stats.ratio(steps[-1].images_per_second, steps[0].images_per_second)
        lines.append(
            (
                "All optimizations together",
                f"{gain.estimate:.2f}×",
                f"against {steps[0].title} {between(gain, '{:.2f}'.format)}",
            )
        )
    loops = results.baselines.measured() if results.baselines else []
    if results.baselines and len(loops) > 1 and loops[0] is results.baselines.timings[0]:
        gain = against(loops[0], loops[1])
        lines.append((f"Against {loops[1].title}", f"{gain.estimate:.2f}×", between(gain, "{:.2f}".format)))
    return lines


def first(named: list[tuple[str, Estimate | None]]) -> tuple[str, Estimate] | None:
    """The one whose interval lies above all others'; None where intervals leave that open, or there is only one."""
    known = sorted(((name, value) for name, value in named if value), key=lambda pair: -pair[1].estimate)
    return known[0] if len(known) > 1 and all(known[0][1].apart(other) for _, other in known[1:]) else None


# ---- charts


def draw_svg(name: str, height: float, draw: Callable[[Axes], None]) -> str:
    """A chart as an SVG element whose text is text. name: makes its ids its own."""
    with mpl.rc_context({**STYLE, **SVG, "svg.hashsalt": name}):
        figure, axes = plt.subplots(figsize=(WIDTH, height))
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        plt.close(figure)
    return re.sub(r"\s*<metadata>.*?</metadata>", "", buffer.getvalue()[buffer.getvalue().index("<svg") :], flags=re.DOTALL)


def looks(number: int) -> Any:
    """A colour, and from the eighth on another marker."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": "os^D"[number // len(COLOURS) % 4]}


def reach(value: Estimate) -> Any:
    """How far the interval goes below and above the figure, [2, 1], as Matplotlib takes it."""
    low, high = ends(value)
    return np.array([[value.estimate - low], [high - value.estimate]])


def logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis in plain digits, also between powers of ten where it has few of those."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}" if max(values) < 10 * min(values) else "")
    axes.tick_params(axis="x", which="both", labelsize=8, rotation=45)


def legend(axes: Axes) -> None:
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize=9)


def scatter(rows: list[Row]) -> Section | None:
    """Speed against accuracy, with the Pareto front where the intervals show one."""
    points = [(row, row.speed, row.accuracy) for row in rows if row.speed and row.accuracy]
    if not points:
        return None
    front = [points[place] for place in stats.pareto_front([(x, y) for _, x, y in points])]

    def draw(axes: Axes) -> None:
        for number, (row, x, y) in enumerate(points):
            axes.errorbar(
                x.estimate, 100 * y.estimate, xerr=reach(x), yerr=100 * reach(y), label=short(row.arch), capsize=2, ls="",
                **looks(number),
            )  # fmt: skip
        if len(front) > 1:
            xs, ys = zip(*sorted((x.estimate, 100 * y.estimate) for _, x, y in front), strict=True)
            axes.step(xs, ys, where="pre", color="#888888", ls="--", zorder=0)
        axes.set(xlabel="images/s in training, logarithmic", ylabel="top-1, %")
        logarithmic(axes, [x.estimate for _, x, _ in points])
        legend(axes)

    note = "Bars: 95 % intervals. "
    note += (
        f"Dashed: the Pareto front, {', '.join(row.arch for row, _, _ in front)}; every pair on it has intervals apart."
        if len(front) > 1
        else "No Pareto front is drawn: there are variants whose intervals overlap, so that their order could be chance."
    )
    return Section("Speed against accuracy", charts=[draw_svg("scatter", 4.8, draw)], notes=[note])


def learning_curves(rows: list[Row]) -> Section | None:
    """Test accuracy against epochs, and against minutes of training."""
    curves: list[Any] = []
    for number, row in enumerate(rows):
        length = min((len(run.epoch_top1) for run in row.runs), default=0)
        tops = [[run.epoch_top1[epoch] for run in row.runs] for epoch in range(length)]
        elapsed = [list(accumulate(run.train_seconds)) for run in row.runs]
        done = [epoch for epoch, top1 in enumerate(tops) if None not in top1]
        if done:
            lines = [[100 * f(t for t in tops[epoch] if t is not None) for epoch in done] for f in (fmean, min, max)]
            curves.append(
                (row, looks(number)["color"], [e + 1 for e in done], [fmean(s[e] for s in elapsed) / 60 for e in done], lines)
            )
    if not any(len(epochs) > 1 for _, _, epochs, _, _ in curves):
        return None

    def draw(axes: Axes, label: str, at: int) -> None:
        for row, colour, *xs, (middle, low, high) in curves:
            axes.plot(xs[at], middle, color=colour, label=short(row.arch), ls="-" if rows.index(row) < len(COLOURS) else "--")
            axes.fill_between(xs[at], low, high, color=colour, alpha=0.15, lw=0)
        axes.set(xlabel=label, ylabel="top-1, %")
        if at:
            logarithmic(axes, [x for _, _, *xs, _ in curves for x in xs[at]])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes)

    charts = [
        draw_svg("epochs", 4.4, lambda axes: draw(axes, "epoch", 0)),
        draw_svg("minutes", 4.4, lambda axes: draw(axes, "minutes of training, logarithmic", 1)),
    ]
    notes = ["Mean over seeds, shaded from the lowest to the highest."] if any(len(row.runs) > 1 for row in rows) else []
    return Section("Learning curves", "Test accuracy after each epoch.", charts, notes=notes)


def rate_bars(name: str, timings: list[Timing]) -> str:
    rates = [stats.rate(timing.images_per_second) for timing in timings]

    def draw(axes: Axes) -> None:
        labels, errors = [short(timing.title) for timing in timings], np.hstack([reach(rate) for rate in rates])
        axes.barh(labels, [rate.estimate for rate in rates], xerr=errors, color="#7db7d9", capsize=2)
        axes.invert_yaxis()
        axes.set_xlabel("images/s")

    return draw_svg(name, 0.8 + 0.32 * len(timings), draw)


# ---- sections


def variant_tables(rows: list[Row], results: Results) -> list[Section]:
    """Speed and accuracy, then time and cost; a column that no variant fills is left out."""
    if not rows:
        return []
    target = target_top1(results, rows)
    what: list[tuple[str, Callable[[Row], Cell]]] = [
        ("Variant", variant_name),
        ("Min/epoch", lambda row: speed_cell(row, minutes)),
        ("Top-1, %", lambda row: share_cell(row.accuracy)),
        ("Images/s", lambda row: speed_cell(row, float)),
        ("Epochs/s", lambda row: speed_cell(row, lambda rate: rate / EPOCH_IMAGES)),
        ("With flip, %", lambda row: share_cell(stats.mean([run.flip_top1 for run in row.runs]) if row.runs else None)),
        ("Best, %", lambda row: share_cell(stats.mean([run.best_top1 for run in row.runs]) if row.runs else None)),
        (f"To {100 * (target or 0):g} %", lambda row: time_to(row, target)),
        ("Report claims", lambda row: Cell(row.variant.claim) if row.variant and row.variant.claim else Cell(NONE)),
    ]
    cost: list[tuple[str, Callable[[Row], Cell]]] = [
        ("Variant", lambda row: Cell(row.arch, sort=row.arch)),
        ("Training", lambda row: spread([s for run in row.runs for s in run.train_seconds[1:] or run.train_seconds], seconds)),
        ("Evaluation", lambda row: spread([s for run in row.runs for s in run.eval_seconds if s is not None], seconds)),
        ("First step", lambda row: spread([run.first_step_seconds for run in row.runs], seconds)),
        ("Compile", lambda row: spread([run.compile_seconds for run in row.runs if run.compile_seconds is not None], seconds)),
        ("Peak memory", lambda row: spread([run.peak_memory_bytes for run in row.runs if run.peak_memory_bytes], size)),
        ("Parameters", lambda row: spread([row.variant.parameters] if row.variant else [], lambda v: f"{v:,.0f}")),
        (
            "FLOPs/image",
            lambda row: spread([row.variant.flops_per_image] if row.variant else [], lambda v: f"{v / 1e6:,.0f} M"),
        ),
        ("Of roofline", lambda row: spread([part] if (part := of_roofline(row)) else [], lambda v: f"{100 * v:.0f} %")),
        ("Energy/epoch", lambda row: spread(epoch_joules(row), lambda v: f"{significant(v / 1000)} kJ")),
    ]
    return [
        table("Variants: speed and accuracy", what, rows, variant_notes(rows, results, target)),
        table("Variants: time and cost", cost, rows, cost_notes(rows)),
    ]


def table(title: str, columns: list[tuple[str, Callable[[Row], Cell]]], rows: list[Row], notes: list[str]) -> Section:
    return Section(
        title, **filled([name for name, _ in columns], [[entry(row) for _, entry in columns] for row in rows]), notes=notes
    )


def filled(columns: list[str], rows: list[list[Cell]]) -> Any:
    """Both without the columns that no row fills, as fields of a section."""
    kept = [place for place in range(len(columns)) if any(row[place].text != NONE or row[place].detail for row in rows)]
    return {"columns": [columns[place] for place in kept], "rows": [[row[place] for place in kept] for row in rows]}


def variant_name(row: Row) -> Cell:
    report = {None: "", "-": "baseline"}.get(
        row.variant.report if row.variant else None, f"report {row.variant.report if row.variant else ''}"
    )
    epochs = span([len(run.train_seconds) for run in row.runs]) if row.runs else ""
    trained = f"{count(len(row.runs), 'seed')} × {plural(epochs, 'epoch')}" if row.runs else "not trained"
    return Cell(row.arch, ", ".join(filter(None, [report, trained])), row.arch)


def speed_cell(row: Row, of: Callable[[float], float]) -> Cell:
    """A speed with its interval; `of` makes the figure shown of images per second."""
    assert row.speed is not None
    bounds = sorted(map(of, ends(row.speed)))
    figure = Estimate(
        of(row.speed.estimate), bounds[0] if row.speed.low else None, bounds[1] if row.speed.high else None, row.speed.n
    )
    return Cell(significant(figure.estimate), between(figure, significant), figure.estimate)


def share_cell(value: Estimate | None) -> Cell:
    """Mean and standard deviation in percent, in the detail the interval."""
    if value is None:
        return Cell(NONE)
    text = f"{100 * value.estimate:.2f}" + (
        "" if value.deviation is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{100 * value.deviation:.2f}"
    )
    return Cell(text, between(value, share), value.estimate)


def time_to(row: Row, target: float | None) -> Cell:
    reached = [s for run in row.runs if target is not None and (s := run.seconds_to(target)) is not None]
    if not reached:
        return Cell("not reached" if target is not None and row.runs else NONE)
    some = f"{len(reached)} of {count(len(row.runs), 'seed')}" if len(reached) < len(row.runs) else ""
    return Cell(seconds(fmean(reached)), some, fmean(reached))


def of_roofline(row: Row) -> float | None:
    return row.speed.estimate / row.variant.roofline_images_per_second if row.variant and row.speed else None


def epoch_joules(row: Row) -> list[float]:
    """Energy of an epoch of 50,000 images in each run that counted it."""
    counted = [(run.energy_joules, run.images_per_epoch * len(run.train_seconds)) for run in row.runs]
    return [joules / images * EPOCH_IMAGES for joules, images in counted if joules is not None]


def target_top1(results: Results, rows: list[Row]) -> float | None:
    """The accuracy to which seconds are counted: the one stated, else the highest multiple of 5 % that every run of at least
    half of the variants reaches; None when that is chance."""
    stated = results.settings.get("target_top1")
    if isinstance(stated, int | float) and 0 < stated < 1:
        return float(stated)
    reached = sorted(
        min(max((t for t in run.epoch_top1 if t is not None), default=0) for run in row.runs) for row in rows if row.runs
    )
    target = math.floor(reached[len(reached) // 2] / 0.05 + 1e-9) * 0.05 if reached else 0.0
    return round(target, 2) if target > 0.1 else None


def variant_notes(rows: list[Row], results: Results, target: float | None) -> list[str]:
    """What a reader of the first table has to know."""
    notes = ["Not sorted by speed or accuracy: where intervals overlap, the order could be chance. A heading sorts the table."]
    seeds = {len(row.runs) for row in rows}
    if results.speeds and results.speeds.measured():
        timed = results.speeds
        notes.append(
            f"Speeds: training steps of all variants timed in turns in one process, {timed.settings.get('rounds')} rounds of "
            f"{timed.settings.get('images')} images in an order drawn anew; geometric mean and 95 % t interval over blocks of "
            "rounds. An epoch is 50,000 images."
        )
    else:
        notes.append(
            "Speeds are those of the trainings, one variant after the other and not in turns, all epochs but the first; 95 % t "
            "interval over blocks of epochs. An epoch is 50,000 images."
        )
    if seeds & set(range(2, 1000)):
        notes.append("Accuracy: mean ± standard deviation over seeds, in brackets the 95 % t interval of the mean.")
    if 1 in seeds:
        notes.append("One seed: no interval over seeds; in brackets the binomial one of its test images (Wilson's).")
    if any(row.runs for row in rows):
        notes.append("Best: the best epoch, chosen on the test set itself as the reports did, which is optimistic.")
    if target is not None:
        notes.append(f"To {100 * target:g} %: mean over seeds of the training time, evaluation not counted.")
    notes.append(
        "What a report claims is its own claim, after its whole recipe and on its own validation split or the class "
        "competition's harder test set (Kaggle): not comparable with shorter runs on other data."
    )
    return notes


def cost_notes(rows: list[Row]) -> list[str]:
    notes = [
        "Times: median, under it lowest to highest; training and evaluation of an epoch as trained here. First step: from the "
        "start of the process; compile: the first step less a later one. FLOPs: forward and backward, two per multiply-add."
    ]
    if any((of_roofline(row) or 0) > 1 for row in rows):
        notes.append(
            "More than 100 % of the roofline: the ceiling is made of rates measured once, and this machine's speed wanders."
        )
    return notes


def optimizations(comparison: Comparison | None) -> Section | None:
    """Each optimization against those before it that worked, and against none."""
    measured = comparison.measured() if comparison else []
    if comparison is None or not measured:
        return None
    rows: list[list[Cell]] = []
    before: Timing | None = None
    for timing in comparison.timings:
        cells = [Cell(timing.title, timing.note)]
        if timing not in measured:
            rows.append([*cells, Cell("failed" if timing.failed else NONE, timing.error), Cell(NONE), Cell(NONE)])
            continue
        cells.append(rate_cell(timing))
        cells += [gain(timing, other) if other else Cell(NONE) for other in (before, measured[0] if before else None)]
        rows.append(cells)
        before = timing
    text = f"Training of {comparison.settings.get('arch')}: each row adds one optimization to all those above it."
    columns = ["Optimization", "Images/s", "Against the row above", "Against the first"]
    notes = [turns_note(measured)]
    return Section("Optimizations", text, [rate_bars("optimizations", measured)], columns, rows, notes)


def baselines(comparison: Comparison | None) -> Section | None:
    """Our training loop, the first, against others for the same model."""
    measured = comparison.measured() if comparison else []
    if comparison is None or not measured:
        return None
    ours, rows = comparison.timings[0], []
    for timing in comparison.timings:
        rate = rate_cell(timing) if timing in measured else Cell("failed" if timing.failed else NONE, timing.error)
        gained = gain(ours, timing) if timing is not ours and timing in measured and ours in measured else Cell(NONE)
        stated = Cell(NONE if timing.top1 is None else f"{100 * timing.top1:.2f}")
        time = Cell(NONE if timing.seconds_to_accuracy is None else seconds(timing.seconds_to_accuracy))
        rows.append([Cell(timing.title, timing.note), rate, gained, stated, time])
    notes = [turns_note([timing for timing in measured if timing.in_turns])]
    scripts = [timing.title for timing in comparison.timings if not timing.in_turns]
    if scripts:
        notes.append(
            f"Not timed in turns: {', '.join(scripts)}. Outside scripts ran in processes of their own at another time, when "
            "the machine may have been faster or slower; their ratios' intervals (Welch's) cannot know that."
        )
    text = f"Whole training loops of {comparison.settings.get('arch')} on the same data and device."
    columns = ["Training loop", "Images/s", f"{ours.title} against it", "Top-1 it states, %", "To its target"]
    return Section("Other training loops", text, [rate_bars("baselines", measured)], **filled(columns, rows), notes=notes)


def turns_note(timings: list[Timing]) -> str:
    rounds = len(timings[0].images_per_second) if timings else 0
    return (
        f"Timed in turns in one process, {count(rounds, 'round')} in an order drawn anew. Rates, and ratios within a round, "
        "are geometric means; in brackets 95 % t intervals of the logarithm over blocks of rounds. A ratio is called faster "
        "or slower where its interval excludes 1."
    )


def against(ours: Timing, other: Timing) -> stats.Ratio:
    """Ours over the other: by rounds where both took turns."""
    compare = stats.ratio if ours.in_turns and other.in_turns else stats.ratio_apart
    return compare(ours.images_per_second, other.images_per_second)


def rate_cell(timing: Timing) -> Cell:
    rate = stats.rate(timing.images_per_second)
    return Cell(significant(rate.estimate), between(rate, significant), rate.estimate)


def gain(timing: Timing, other: Timing) -> Cell:
    ratio = against(timing, other)
    if ratio.low is None:
        return Cell(f"{ratio.estimate:.2f}×", f"{count(ratio.n, 'round')}: no interval", ratio.estimate)
    words = ("▲ faster" if ratio.estimate > 1 else "▼ slower") if ratio.excludes(1) else "no difference shown"
    return Cell(f"{ratio.estimate:.2f}×", f"{between(ratio, '{:.2f}'.format)} {words}", ratio.estimate)


def ablation(given: Ablation, results: Results) -> Section | None:
    """Accuracy of each arm over seeds, and its paired difference from the first arm with p values by Holm."""
    runs = {run.name: run for run in results.runs if not run.error}
    tops = [[runs[name].top1 if name in runs else None for name in arm.runs] for arm in given.arms]
    if not any(top1 is not None for top in tops for top1 in top):
        return None
    differences: list[Estimate | None] = []
    for top in tops:
        pairs = [(a, b) for a, b in zip(top, tops[0], strict=True) if a is not None and b is not None]
        differences.append(stats.paired(*zip(*pairs, strict=True)) if pairs and top is not tops[0] else None)
    corrected = stats.holm([difference.p if difference else None for difference in differences])
    rows = []
    for arm, top, difference, p in zip(given.arms, tops, differences, corrected, strict=True):
        done = [top1 for top1 in top if top1 is not None]
        cells = [Cell(arm.name, arm.flags), share_cell(stats.mean(done)) if done else Cell("no run finished")]
        rows.append([*cells, difference_cell(difference, p), Cell(arm.claim or NONE)])
    shown = [(arm.name, d) for arm, d in zip(given.arms, differences, strict=True) if d]

    def draw(axes: Axes) -> None:
        for name, d in shown:
            axes.errorbar(100 * d.estimate, short(name), xerr=100 * reach(d), fmt="o", color=COLOURS[0], capsize=3)
        axes.axvline(0, color="#555555", lw=1)
        most = max(400 * max(abs(d.estimate) for _, d in shown), 0.01)  # an interval far wider than any difference is cut off
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, -most), min(right, most))
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel(f"top-1 against {short(given.arms[0].name)}, points")

    trained = [run for arm in given.arms for name in arm.runs if (run := runs.get(name))]
    notes = [
        "Mean ± standard deviation over seeds, in brackets 95 % t intervals. All other arms are compared with the first, "
        "seed by seed (paired t test); p values are corrected for the number of comparisons by Holm's method, and one is "
        f"called shown below {LEVEL}. Its interval is the uncorrected one."
        if any(p is not None for p in corrected)
        else "Too few seeds for intervals and tests: differences are those of single runs."
    ]
    text = (
        f"{given.arch}, {count(given.epochs, 'epoch')} of {span([run.images_per_epoch for run in trained])} images, "
        f"{count(len(given.seeds), 'seed')}; final accuracy on {span([run.test_images for run in trained])} test images."
    )
    charts = [draw_svg(f"ablation {given.name}", 0.9 + 0.35 * len(shown), draw)] if shown else []
    columns = ["Arm", "Top-1, %", f"Against {given.arms[0].name}, points", "Report's"]
    return Section(f"Ablation: {given.title}", text, charts, **filled(columns, rows), notes=notes)


def difference_cell(difference: Estimate | None, p: float | None) -> Cell:
    if difference is None:
        return Cell(NONE)
    text = points(difference.estimate)
    if p is None:
        return Cell(text, count(difference.n, "pair"), difference.estimate)
    words = ("▲ better" if difference.estimate > 0 else "▼ worse") if p < LEVEL else "no difference shown"
    told = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return Cell(text, f"{between(difference, points)}, {count(difference.n, 'pair')}, {told}, {words}", difference.estimate)


def environment(results: Results) -> list[tuple[str, str]]:
    """Everything recorded about machine, software, data and command, one line a fact."""
    sizes = {key: size(value) for key, value in results.environment.items() if "memory" in key and isinstance(value, int)}
    facts = results.environment | sizes | {f"data, {key}": value for key, value in results.data.items()}
    facts |= {f"setting, {key}": value for key, value in results.settings.items()}
    return [(key.replace("_", " "), fact(value)) for key, value in facts.items() if value not in (None, "", [], (), {})]


def fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {fact(entry)}" for key, entry in value.items() if entry is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(fact, value))
    return (
        {True: "yes", False: "no"}[value]
        if isinstance(value, bool)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )


# ---- words and digits


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent, thousands set apart: 0.00776, 6.41, 12,300."""
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{round(value, decimals):,.{max(decimals, 0)}f}".replace("-", "−")


def minutes(rate: float) -> float:
    """Minutes of an epoch of 50,000 images at a rate in images per second."""
    return EPOCH_IMAGES / rate / 60


def seconds(value: float) -> str:
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} s"


def size(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:,.2f} GiB"


def share(value: float) -> str:
    return f"{100 * min(max(value, 0.0), 1.0):.2f}"  # whatever t says, an accuracy lies in 0..1


def points(value: float) -> str:
    return f"{100 * value:+.2f}".replace("-", "−")


def between(value: Estimate, form: Callable[[float], str]) -> str:
    return "" if value.low is None or value.high is None else f"[{form(value.low)},\N{NO-BREAK SPACE}{form(value.high)}]"


def ends(value: Estimate) -> tuple[float, float]:
    return (value.estimate, value.estimate) if value.low is None or value.high is None else (value.low, value.high)


def spread(values: Sequence[float], form: Callable[[float], str]) -> Cell:
    """The median, with lowest to highest where they read differently."""
    if not values:
        return Cell(NONE)
    low, high = form(min(values)), form(max(values))
    unit = f" {high.rpartition(' ')[2]}"
    return Cell(
        form(median(values)),
        "" if low == high else f"{low.removesuffix(unit)} to {high}".replace(" ", "\N{NO-BREAK SPACE}"),
        float(median(values)),
    )


def short(text: str, most: int = 30) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def plural(number: str, noun: str) -> str:
    return f"{number} {noun}{'' if number == '1' else 's'}"


def span(numbers: Sequence[int]) -> str:
    """12, or 3 to 12."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def render_html(report: Report) -> str:
    """The page, with its style and script inside."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(report=report)


def render_markdown(report: Report) -> str:
    """The same figures for README and GitHub, without the charts."""
    lines = [
        f"# {escape(report.title)}",
        "",
        *(f"> **{escape(banner)}**\n" for banner in report.banners),
        escape(report.lead),
        "",
    ]
    lines += [f"- {escape(what)}: **{escape(figure)}** ({escape(detail)})" for what, figure, detail in report.headlines]
    for section in report.sections:
        lines += ["", f"## {escape(section.title)}", "", *([escape(section.text), ""] if section.text else [])]
        if section.rows:
            lines += ["| " + " | ".join(map(escape, section.columns)) + " |", "|" + "---|" * len(section.columns)]
            lines += [
                "| " + " | ".join(escape(f"{cell.text} {cell.detail}".strip()) for cell in row) + " |" for row in section.rows
            ]
            lines.append("")
        lines += [f"- {escape(note)}" for note in section.notes]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKUP.sub(r"\\\1", text)


if __name__ == "__main__":
    run_command(main)
