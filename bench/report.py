#!/usr/bin/env python3
"""A benchmark's page, `report.html`, one file that needs no network, and `report.md` of the same figures beside it.

python bench/report.py runs/bench
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench import stats
from bench.results import EPOCH_IMAGES, Ablation, Comparison, Results, Run, Timing, Variant, check, read_results, total
from bench.stats import Estimate
from fastcifar.arguments import parse_arguments
from fastcifar.errors import run_command
from fastcifar.files import write_bytes
from fastcifar.plots import COLOURS, STYLE

SVG: Any = {"svg.fonttype": "none", "text.parse_math": False}  # text stays text, and a $ in a name a $
WIDTH = 4.6  # inches of a chart, 331 units of its SVG: as wide as a phone's page, so that its text is as large as drawn
LEVEL = 0.05  # of a claimed difference, after Holm's correction
NONE = "–"
PAGES = ("report.html", "report.md")  # and their templates
# What Markdown would take for markup in running text. An underscore within a word is none.
MARKUP = re.compile(r"([\\`*~|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=\])\()")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Entry:
    """One figure or text in a table."""

    text: str
    detail: str = ""  # interval, spread, number of repetitions
    sort: float | str | None = None  # None: no figure, last in every order


NOTHING = Entry(NONE)


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it. In a table the first column names the row."""

    title: str
    text: str = ""
    charts: list[str] = field(default_factory=list)  # SVG
    columns: list[str] = field(default_factory=list)
    rows: list[list[Entry]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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

    variant: Variant
    runs: list[Run]
    speed: Estimate  # images per second
    accuracy: Estimate | None  # top-1 of the last epoch: over seeds, or of one seed's test images

    @property
    def arch(self) -> str:
        return self.variant.arch

    @property
    def of_roofline(self) -> float | None:
        ceiling = self.variant.roofline_images_per_second
        return self.speed.estimate / ceiling if ceiling else None


@dataclass(frozen=True)
class Group:
    """Trainings that differ in their seed alone."""

    name: str  # of a variant, or of the outside script that states them
    runs: list[Run]
    outside: bool = False

    def to(self, target: float, costs: Callable[[Run], Sequence[float | None]]) -> list[float]:
        """What each run spent up to the first epoch at `target` or above; those that never were, or were not counted, are left
        out."""
        spent = [total(costs(run)[:epochs]) for run in self.runs if (epochs := run.epochs_to(target))]
        return [cost for cost in spent if cost is not None]


@dataclass(frozen=True)
class Options:
    """Write report.html and report.md beside a results.json."""

    results: tyro.conf.Positional[Path]  # results.json, or the folder it is in


def main() -> None:
    """Read, write, name what was written."""
    file, results = read_results(parse_arguments(Options, "python bench/report.py").results)
    for path in write_reports(file.parent, results):
        print(path)


def write_reports(folder: Path, results: Results) -> list[Path]:
    """Write both reports into `folder`; return their paths. Raises InputError for figures that no measurement gives."""
    report = build_report(results)
    for name in PAGES:
        write_bytes(folder / name, render(report, name).encode())
    return [folder / name for name in PAGES]


def render(report: Report, template: str) -> str:
    """A whole report by its template, which shows every text as it is: report.html with style and script inside, or
    report.md, the same figures without the charts."""
    return templates(template).render(report=report)


def render_section(section: Section) -> str:
    """A section as it stands in report.md."""
    return templates("section.md").render(section=section)


def templates(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=name.endswith(".html"),
        finalize=escape if name.endswith(".md") else None,
    )  # fmt: skip
    environment.filters["anchor"] = lambda title: re.sub(r"\W+", "-", title.lower()).strip("-") or "section"
    return environment.get_template(name)


def escape(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKUP.sub(r"\\\1", text)


def build_report(results: Results) -> Report:
    """Compute everything the page lays out."""
    check(results)
    rows = variant_rows(results)
    groups = trained_groups(results, rows)
    failed = [(run.name, run.error) for run in results.runs if run.error]
    for what, comparison in results.comparisons().items():
        failed += [(f"{what}: {timing.title}", timing.error) for timing in comparison.timings if timing.failed]
    sections = [
        scatter(rows),
        *variant_tables(rows, results),
        time_to_accuracy(groups, target_top1(results, rows)),
        learning_curves(groups),
        optimizations(results.optimizations),
        baselines(results.baselines),
        *(ablation(each, results) for each in results.ablations),
        plain_table("Failed", ["What", "Its last line"], failed),
        plain_table("Environment", ["Fact", "Value"], environment(results)),
    ]
    return Report(
        title=f"fastcifar benchmark: {hardware(results)}",
        banners=banners(results),
        lead=lead(results, rows),
        headlines=headlines(rows, results),
        sections=[section for section in sections if section is not None],
    )


def hardware(results: Results) -> str:
    return results.environment.get("hardware") or "unnamed hardware"


def variant_rows(results: Results) -> list[Row]:
    """Every architecture that was timed or trained, in the order of the variants: no ranking."""
    timed = {timing.name: timing.images_per_second for timing in results.speeds.measured()} if results.speeds else {}
    trained = {arch: runs for arch, runs in results.groups().items() if "/" not in runs[0].name}
    costs = {variant.arch: variant for variant in results.variants}
    rows = []
    for arch in dict.fromkeys([*costs, *timed, *trained]):
        runs = trained.get(arch, [])
        rates = timed.get(arch) or [rate for run in runs for rate in run.rates]
        if rates:
            variant = costs.get(arch) or Variant(arch, "", 0, 0, "", 0.0)  # of unknown cost
            rows.append(Row(variant, runs, stats.rate(rates), accuracy(runs) if runs else None))
    return rows


def trained_groups(results: Results, rows: list[Row]) -> list[Group]:
    """The variants' trainings, then those that outside scripts state."""
    stated = results.baselines.timings if results.baselines else []
    ours = [Group(row.arch, row.runs) for row in rows if row.runs]
    return ours + [Group(timing.title, timing.runs, outside=True) for timing in stated if timing.runs]


def accuracy(runs: Sequence[Run], share: Callable[[Run], float] = lambda run: run.top1) -> Estimate:
    """Top-1 over seeds; of one seed by Wilson's binomial interval of its test images."""
    if len(runs) == 1:
        images = runs[0].test_images
        return stats.proportion(round(share(runs[0]) * images), images)
    return stats.mean_share(list(map(share, runs)))


def banners(results: Results) -> list[str]:
    """Data that makes accuracies mean nothing, and a machine too busy for its speeds to be believed."""
    said, data = [], results.data
    if data.get("synthetic"):
        said.append(
            "Synthetic dataset: accuracy means nothing here. The images were drawn by a program; only speeds can be read."
        )
    elif data.get("official") is False:
        said.append("Not the official archive: accuracies compare among themselves only, not with published ones.")
    loads, cores = results.environment.get("load", {}), results.environment.get("cores", 0)
    # Half a core is what an idle machine's own chores and this benchmark's previous minute can add.
    busy = [f"{load:g} {when}" for when, load in loads.items() if cores and load > cores + 0.5]
    if busy:
        told = f"its load was {', '.join(busy)}, on {count(cores, 'core')}"
        said.append(f"Busy machine: {told}. Speeds here are those of a share of it.")
    return said


def lead(results: Results, rows: list[Row]) -> str:
    """What was measured, on what, on which data."""
    trained = [row.runs for row in rows if row.runs]
    runs = [run for each in trained for run in each]
    data = results.data.get("name") or "a data set without a name"
    if not runs:
        return f"Measured on {hardware(results)}; no variant was trained. The data is {data}."
    return (
        f"{count(len(trained), 'variant')} trained with {count(list(map(len, trained)), 'seed')} each for "
        f"{count([len(run.train_seconds) for run in runs], 'epoch')} of {span([run.images_per_epoch for run in runs])} images "
        f"of {data} on {hardware(results)}; accuracy is measured on {count([run.test_images for run in runs], 'image')} of the "
        "test set."
    )


def headlines(rows: list[Row], results: Results) -> list[tuple[str, str, str]]:
    """At most four figures to remember; nothing is called first whose interval overlaps another's."""
    lines = []
    if fastest := first([(row.arch, row.speed) for row in rows]):
        arch, rate = fastest[0], fastest[1].estimate
        lines.append(("Fastest", f"{significant(minutes(rate))} min/epoch", f"{arch}, {significant(rate)} images/s"))
    best = first([(row.arch, row.accuracy) for row in rows])
    if best and not results.data.get("synthetic"):
        lines.append(("Highest accuracy", f"{100 * best[1].estimate:.2f} %", f"{best[0]}, {between(best[1], percent)}"))
    steps = results.optimizations.measured() if results.optimizations else []
    if len(steps) > 1:
        gained = gain(steps[-1], steps[0])
        lines.append(("All optimizations together", gained.text, f"against {steps[0].title} {gained.detail}"))
    loops = results.baselines.measured() if results.baselines else []
    if results.baselines and len(loops) > 1 and loops[0] is results.baselines.timings[0] and loops[0].in_turns:
        gained = gain(loops[0], loops[1])
        lines.append((f"Against {loops[1].title}", gained.text, gained.detail))
    return lines


def first(named: list[tuple[str, Estimate | None]]) -> tuple[str, Estimate] | None:
    """The one whose interval lies above all others'; None where intervals leave that open, or there is only one."""
    known = sorted(((name, value) for name, value in named if value), key=lambda pair: -pair[1].estimate)
    return known[0] if len(known) > 1 and all(known[0][1].apart(other) for _, other in known[1:]) else None


# ---- charts


def draw_svg(name: str, height: float, draw: Callable[[Axes], None]) -> str:
    """A chart as an SVG element whose text is text. name: makes its ids its own."""
    with mpl.rc_context({**STYLE, **SVG, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height))
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return re.sub(r"\s*<metadata>.*?</metadata>", "", buffer.getvalue()[buffer.getvalue().index("<svg") :], flags=re.DOTALL)


def looks(number: int) -> Any:
    """A colour, and from the eighth on another marker."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": "os^D"[number // len(COLOURS) % 4]}


def reach(value: Estimate) -> Any:
    """How far the interval goes below and above the figure, [2, 1], as Matplotlib takes it."""
    low, high = value.interval or (value.estimate, value.estimate)
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
    points = [(row, row.speed, row.accuracy) for row in rows if row.accuracy]
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

    if len(front) > 1:
        note = f"Dashed: the Pareto front, {', '.join(row.arch for row, _, _ in front)}; every pair on it has intervals apart."
    else:
        note = "No Pareto front is drawn: there are variants whose intervals overlap, so that their order could be chance."
    charts = [draw_svg("scatter", 4.8, draw)]
    return Section("Speed against accuracy", charts=charts, notes=[f"Bars: 95 % intervals. {note}"])


def learning_curves(groups: list[Group]) -> Section | None:
    """Test accuracy against epochs, minutes of training, and FLOPs."""
    curves = []
    for number, group in enumerate(groups):
        length = min(len(run.epoch_top1) for run in group.runs)
        tops = 100 * np.array(
            [run.epoch_top1[:length] for run in group.runs], dtype=float
        )  # [seeds, epochs], NaN: not measured
        done = ~np.isnan(tops).any(axis=0)
        if length and done.any():
            minutes = np.cumsum([run.train_seconds[:length] for run in group.runs], axis=1).mean(axis=0) / 60
            counted = all(len(run.epoch_flops) >= length and None not in run.epoch_flops for run in group.runs)
            flops = np.cumsum([run.epoch_flops[:length] for run in group.runs], axis=1).mean(axis=0) / 1e12 if counted else None
            spent = {"epoch": np.arange(length) + 1, "minutes of training": minutes, "TFLOP of training": flops}
            costs = {name: cost[done] for name, cost in spent.items() if cost is not None}
            curves.append((number, short(group.name), tops[:, done], costs))
    if not any(tops.shape[1] > 1 for _, _, tops, _ in curves):
        return None

    def draw(axes: Axes, what: str) -> None:
        drawn = [(number, name, tops, costs[what]) for number, name, tops, costs in curves if what in costs]
        for number, name, tops, x in drawn:
            colour = looks(number)["color"]
            axes.plot(x, tops.mean(axis=0), color=colour, label=name, ls="-" if number < len(COLOURS) else "--")
            axes.fill_between(x, tops.min(axis=0), tops.max(axis=0), color=colour, alpha=0.15, lw=0)
        axes.set(xlabel=what if what == "epoch" else f"{what}, logarithmic", ylabel="top-1, %")
        if what == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            logarithmic(axes, np.concatenate([x for *_, x in drawn]).tolist())
        legend(axes)

    shown = dict.fromkeys(what for *_, costs in curves for what in costs)
    charts = [draw_svg(f"curves {what}", 4.4, partial(draw, what=what)) for what in shown]
    notes = ["Mean over seeds, shaded from the lowest to the highest."] if any(len(group.runs) > 1 for group in groups) else []
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


def table(
    title: str, items: Sequence[Item], columns: Mapping[str, Callable[[Item], Entry]], notes: list[str], **given: Any
) -> Section:
    """A row for each item, an entry for each column; a column that no row fills and an empty note are left out."""
    entries = {name: [make(item) for item in items] for name, make in columns.items()}
    kept = {name: column for name, column in entries.items() if any(e.text != NONE or e.detail for e in column)}
    rows = [list(row) for row in zip(*kept.values(), strict=True)]
    return Section(title, columns=list(kept), rows=rows, notes=list(filter(None, notes)), **given)


def plain_table(title: str, columns: list[str], pairs: list[tuple[str, str]]) -> Section | None:
    return Section(title, columns=columns, rows=[list(map(Entry, pair)) for pair in pairs]) if pairs else None


def variant_tables(rows: list[Row], results: Results) -> list[Section]:
    """Speed and accuracy, then time and cost."""
    if not rows:
        return []

    def over_runs(form: Callable[[float], str], figures: Callable[[Run], Iterable[float | None]]) -> Callable[[Row], Entry]:
        return lambda row: spread((figure for run in row.runs for figure in figures(run)), form)

    speed: dict[str, Callable[[Row], Entry]] = {
        "Variant": variant_name,
        "Min/epoch": lambda row: entry(row.speed.through(minutes)),
        "Top-1, %": lambda row: share_entry(row.accuracy) if row.accuracy else NOTHING,
        "Images/s": lambda row: entry(row.speed),
        "Epochs/s": lambda row: entry(row.speed.through(lambda rate: rate / EPOCH_IMAGES)),
        "With flip, %": lambda row: shares_entry([run.flip_top1 for run in row.runs]),
        "Best, %": lambda row: shares_entry([run.best_top1 for run in row.runs]),
        "Report claims": lambda row: Entry(row.variant.claim or NONE),
    }
    cost: dict[str, Callable[[Row], Entry]] = {
        "Variant": lambda row: Entry(row.arch, sort=row.arch),
        "Training": over_runs(seconds, lambda run: run.steady_seconds),
        "Evaluation": over_runs(seconds, lambda run: run.eval_seconds),
        "First step": over_runs(seconds, lambda run: [run.first_step_seconds]),
        "Compile": over_runs(seconds, lambda run: [run.compile_seconds]),
        "Peak memory": over_runs(size, lambda run: [run.peak_memory_bytes]),
        "Parameters": lambda row: spread([row.variant.parameters or None], "{:,.0f}".format),
        "FLOPs/image": lambda row: spread([row.variant.flops_per_image / 1e6 or None], "{:,.0f} M".format),
        "Of roofline": lambda row: spread([row.of_roofline], lambda part: f"{100 * part:.0f} %"),
        "Energy/epoch": over_runs(lambda joules: f"{significant(joules / 1000)} kJ", lambda run: [epoch_joules(run)]),
    }
    cost_notes = [
        "Times: median, under it lowest to highest; training and evaluation of an epoch as trained here. First step: from the "
        "start of the process; compile: the first step less a later one. FLOPs: forward and backward, two per multiply-add.",
        "More than 100 % of the roofline: the ceiling is made of rates measured once, and this machine's speed wanders."
        if any((row.of_roofline or 0) > 1 for row in rows)
        else "",
    ]
    return [
        table("Variants: speed and accuracy", rows, speed, variant_notes(rows, results)),
        table("Variants: time and cost", rows, cost, cost_notes),
    ]


def variant_name(row: Row) -> Entry:
    report = row.variant.report
    kind = "baseline, " if report == "-" else f"report {report}, " if report else ""
    return Entry(row.arch, kind + (seeds_and_epochs(row.runs) if row.runs else "not trained"), row.arch)


def seeds_and_epochs(runs: list[Run]) -> str:
    return f"{count(len(runs), 'seed')} × {count([len(run.train_seconds) for run in runs], 'epoch')}"


def entry(value: Estimate) -> Entry:
    """A figure with its interval."""
    return Entry(significant(value.estimate), between(value, significant), value.estimate)


def shares_entry(shares: list[float], absent: str = NONE) -> Entry:
    return share_entry(stats.mean_share(shares)) if shares else Entry(absent)


def share_entry(value: Estimate) -> Entry:
    """Mean and standard deviation in percent, in the detail the interval."""
    deviation = "" if value.deviation is None else f" ± {100 * value.deviation:.2f}".replace(" ", "\N{NO-BREAK SPACE}")
    return Entry(f"{100 * value.estimate:.2f}{deviation}", between(value, percent), value.estimate)


def epoch_joules(run: Run) -> float | None:
    """Energy of an epoch of 50,000 images."""
    images = run.images_per_epoch * len(run.train_seconds)
    return None if run.energy_joules is None else run.energy_joules / images * EPOCH_IMAGES


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


def variant_notes(rows: list[Row], results: Results) -> list[str]:
    """What a reader of the first table has to know."""
    seeds = {len(row.runs) for row in rows}
    if results.speeds and results.speeds.measured():
        timed = results.speeds.settings
        speeds = (
            f"Speeds: training steps of all variants timed in turns in one process, {timed.get('rounds')} rounds of "
            f"{timed.get('images')} images in an order drawn anew; geometric mean and 95 % t interval over blocks of rounds."
        )
    else:
        speeds = (
            "Speeds are those of the trainings, one variant after the other and not in turns, all epochs but the first; 95 % t "
            "interval over blocks of epochs."
        )
    return [
        "Not sorted by speed or accuracy: where intervals overlap, the order could be chance. A heading sorts the table.",
        f"{speeds} An epoch is 50,000 images.",
        "Accuracy: mean ± standard deviation over seeds, in brackets the 95 % t interval of the mean."
        if max(seeds) > 1
        else "",
        "One seed: no interval over seeds; in brackets the binomial one of its test images (Wilson's)." if 1 in seeds else "",
        "Best: the best epoch, chosen on the test set itself as the reports did, which is optimistic." if max(seeds) else "",
        "What a report claims is its own claim, after its whole recipe and on its own validation split or the class "
        "competition's harder test set (Kaggle): not comparable with shorter runs on other data.",
    ]


def time_to_accuracy(groups: list[Group], target: float | None) -> Section | None:
    """What it takes to the first evaluation at the target, and whether the last one's mean over seeds lies above it."""
    if target is None or not groups:
        return None
    reference = next((group for group in groups if group.outside), groups[0])

    def mean_to(
        costs: Callable[[Run], Sequence[float | None]], form: Callable[[float], str], absent: str = NONE
    ) -> Callable[[Group], Entry]:
        return lambda group: mean_entry(group.to(target, costs), len(group.runs), form, absent)

    def speed_of(group: Group) -> Timing:
        spent = group.to(target, lambda run: run.train_seconds)
        whole = len(spent) == len(group.runs)  # else only the lucky runs would be compared
        return Timing(group.name, group.name, "", [1 / cost for cost in spent] if whole else [], in_turns=False)

    speeds = {group.name: speed_of(group) for group in groups}
    columns: dict[str, Callable[[Group], Entry]] = {
        "Trained": lambda group: Entry(group.name, seeds_and_epochs(group.runs), group.name),
        "Last epoch, %": lambda group: last_entry(group.runs, target),
        "Seconds": mean_to(lambda run: run.train_seconds, seconds, "not reached"),
        "TFLOP": mean_to(lambda run: [flops and flops / 1e12 for flops in run.epoch_flops], significant),
        "Energy": mean_to(lambda run: run.epoch_joules, lambda joules: f"{significant(joules / 1000)} kJ"),
        f"Speed against {reference.name}": lambda group: gain(speeds[group.name], speeds[reference.name]),
    }
    notes = [
        "Mean over seeds, in brackets the 95 % t interval. Accuracy is that of the evaluation after each epoch, as the recipe "
        "or the script evaluates; its time is not counted. Above or below: on that side of the target lies the whole interval.",
        "Speeds are ratios of geometric means of the seconds (Welch's interval of the logarithm), where every seed reached the "
        "target. The trainings ran one after the other, not in turns."
        if len(groups) > 1
        else "",
    ]
    name = f"{100 * target:g} %"
    return table(f"To {name}", groups, columns, notes, text=f"Training up to the first epoch whose top-1 is {name} or more.")


def mean_entry(values: list[float], runs: int, form: Callable[[float], str], absent: str) -> Entry:
    """The mean with its interval, and how many of the runs it is of."""
    if not values:
        return Entry(absent)
    value, some = stats.mean(values), f"{len(values)} of {count(runs, 'seed')}" if len(values) < runs else ""
    return Entry(form(value.estimate), f"{between(value, form)} {some}".strip(), value.estimate)


def last_entry(runs: list[Run], target: float) -> Entry:
    """Top-1 of the last evaluation, and on which side of the target its mean is."""
    value = accuracy(runs, lambda run: run.last_top1)
    told = share_entry(value)
    side = "▲ above" if value.estimate > target else "▼ below"
    return replace(told, detail=f"{told.detail} {side if value.excludes(target) else 'neither side shown'}".strip())


def optimizations(comparison: Comparison | None) -> Section | None:
    """Each optimization against those before it that worked, and against none."""
    if not (comparison and comparison.measured()):
        return None
    timings, measured = comparison.timings, comparison.measured()

    def before(timing: Timing) -> Timing:
        return next((other for other in reversed(timings[: timings.index(timing)]) if other in measured), timing)

    text = f"Training of {comparison.settings.get('arch')}: each row adds one optimization to all those above it."
    columns: dict[str, Callable[[Timing], Entry]] = {
        "Against the row above": lambda timing: gain(timing, before(timing)),
        "Against the first": lambda timing: gain(timing, measured[0]),
    }
    return timings_table("Optimizations", "Optimization", comparison, columns, text=text)


def baselines(comparison: Comparison | None) -> Section | None:
    """Our training loop, the first, against others for the same model."""
    if not (comparison and comparison.measured()):
        return None
    ours, scripts = comparison.timings[0], [timing.title for timing in comparison.timings if not timing.in_turns]
    columns: dict[str, Callable[[Timing], Entry]] = {
        f"{ours.title} against it": lambda timing: gain(ours, timing) if ours.in_turns else NOTHING,
        "Top-1 it states, %": lambda timing: Entry(NONE if timing.top1 is None else f"{100 * timing.top1:.2f}"),
        "To its target": lambda timing: spread([timing.seconds_to_accuracy], seconds),
    }
    note = (
        f"Not timed in turns: {', '.join(scripts)}. Outside scripts ran in processes of their own at another time, when "
        "the machine may have been faster or slower; their ratios' intervals (Welch's) cannot know that."
    )
    what = f" of {comparison.settings['arch']}" if "arch" in comparison.settings else ""
    text = f"Whole training loops{what} on the same data and device."
    return timings_table("Other training loops", "Training loop", comparison, columns, note if scripts else "", text=text)


def timings_table(
    title: str, what: str, comparison: Comparison, columns: dict[str, Callable[[Timing], Entry]], note: str = "", *, text: str
) -> Section:
    """Loops with their rates, as bars too, and the columns given."""
    measured = comparison.measured()
    rounds = count([len(timing.images_per_second) for timing in measured if timing.in_turns], "round")
    shared = {what: lambda timing: Entry(timing.title, timing.note), "Images/s": rate_entry}
    notes = [
        f"Timed in turns in one process, {rounds} in an order drawn anew. Rates, and ratios within a round, "
        "are geometric means; in brackets 95 % t intervals of the logarithm over blocks of rounds. A ratio is called faster "
        "or slower where its interval excludes 1."
        if any(timing.in_turns for timing in measured)
        else "",
        note,
    ]
    return table(title, comparison.timings, shared | columns, notes, text=text, charts=[rate_bars(title.lower(), measured)])


def rate_entry(timing: Timing) -> Entry:
    if not timing.images_per_second:
        return Entry("failed" if timing.failed else NONE, timing.error)
    return entry(stats.rate(timing.images_per_second))


def gain(timing: Timing, other: Timing) -> Entry:
    """How many times as fast the one is as the other, by rounds where both took turns."""
    if timing is other or not timing.images_per_second or not other.images_per_second:
        return NOTHING
    compare = stats.ratio if timing.in_turns and other.in_turns else stats.ratio_apart
    ratio = compare(timing.images_per_second, other.images_per_second)
    words = ("▲ faster" if ratio.estimate > 1 else "▼ slower") if ratio.excludes(1) else "no difference shown"
    detail = f"{between(ratio, '{:.2f}'.format)} {words}" if ratio.interval else f"{count(ratio.n, 'round')}: no interval"
    return Entry(f"{ratio.estimate:.2f}×", detail, ratio.estimate)


def ablation(given: Ablation, results: Results) -> Section | None:
    """Accuracy of each arm over seeds, and its paired difference from the first arm with p values by Holm."""
    runs = {run.name: run for run in results.runs if not run.error}
    trained = {arm.name: [runs.get(name) for name in arm.runs] for arm in given.arms}
    done = [run for each in trained.values() for run in each if run]
    if not done:
        return None
    control = given.arms[0].name
    pairs = {arm: [(a.last_top1, b.last_top1) for a, b in zip(each, trained[control], strict=True) if a and b]
             for arm, each in trained.items() if arm != control}  # fmt: skip
    differences = {arm: stats.paired(*zip(*each, strict=True)) for arm, each in pairs.items() if each}
    corrected = dict(zip(differences, stats.holm([each.p for each in differences.values()]), strict=True))

    def draw(axes: Axes) -> None:
        for arm, d in differences.items():
            axes.errorbar(100 * d.estimate, short(arm), xerr=100 * reach(d), fmt="o", color=COLOURS[0], capsize=3)
        axes.axvline(0, color="#555555", lw=1)
        # An interval far wider than any difference is cut off.
        most = max(400 * max(abs(d.estimate) for d in differences.values()), 0.01)
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, -most), min(right, most))
        axes.set_ylim(len(differences) - 0.5, -0.5)
        axes.set_xlabel(f"top-1 against {short(control)}, points")

    columns: dict[str, Callable[[Any], Entry]] = {
        "Arm": lambda arm: Entry(arm.name, arm.flags),
        "Top-1, %": lambda arm: shares_entry([run.last_top1 for run in trained[arm.name] if run], "no run finished"),
        f"Against {control}, points": lambda arm: difference_entry(differences.get(arm.name), corrected.get(arm.name)),
        "TFLOP": lambda arm: spread([tera(run.epoch_flops) for run in trained[arm.name] if run], significant),
        "Training": lambda arm: spread([sum(run.train_seconds) for run in trained[arm.name] if run], seconds),
        "Report's": lambda arm: Entry(arm.claim or NONE),
    }
    notes = [
        "Mean ± standard deviation over seeds, in brackets 95 % t intervals. All other arms are compared with the first, "
        "seed by seed (paired t test); p values are corrected for the number of comparisons by Holm's method, and one is "
        f"called shown below {LEVEL}. Its interval is the uncorrected one."
        if any(p is not None for p in corrected.values())
        else "Too few seeds for intervals and tests: differences are those of single runs."
    ]
    text = (
        f"{given.arch}, {count([len(run.train_seconds) for run in done], 'epoch')} of "
        f"{span([run.images_per_epoch for run in done])} images, {count(len(given.seeds), 'seed')}; "
        f"accuracy after the last epoch on {span([run.test_images for run in done])} test images."
        + (f" All arms that say nothing else: {given.flags}." if given.flags else "")
    )
    charts = [draw_svg(f"ablation {given.name}", 0.9 + 0.35 * len(differences), draw)] if differences else []
    return table(f"Ablation: {given.title}", given.arms, columns, notes, text=text, charts=charts)


def tera(flops: Sequence[float | None]) -> float | None:
    whole = total(flops)
    return None if whole is None else whole / 1e12


def difference_entry(difference: Estimate | None, p: float | None) -> Entry:
    if difference is None:
        return NOTHING
    text = points(difference.estimate)
    if p is None:
        return Entry(text, count(difference.n, "pair"), difference.estimate)
    words = ("▲ better" if difference.estimate > 0 else "▼ worse") if p < LEVEL else "no difference shown"
    told = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return Entry(text, f"{between(difference, points)}, {count(difference.n, 'pair')}, {told}, {words}", difference.estimate)


def environment(results: Results) -> list[tuple[str, str]]:
    """Everything recorded about machine, software, data and command, one line a fact."""
    sizes = {key: size(value) for key, value in results.environment.items() if "memory" in key and isinstance(value, int)}
    facts = results.environment | sizes | {f"data, {key}": value for key, value in results.data.items()}
    facts |= {f"setting, {key}": value for key, value in results.settings.items()}
    return [(key.replace("_", " "), fact(value)) for key, value in facts.items() if value not in (None, "", [], (), {})]


def fact(value: Any) -> str:
    match value:
        case dict():
            return ", ".join(f"{key.replace('_', ' ')} {fact(entry)}" for key, entry in value.items() if entry is not None)
        case list() | tuple():
            return ", ".join(map(fact, value))
        case bool():
            return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


def points(value: float) -> str:
    return f"{100 * value:+.2f}".replace("-", "−")


def between(value: Estimate, form: Callable[[float], str]) -> str:
    return f"[{form(value.interval[0])},\N{NO-BREAK SPACE}{form(value.interval[1])}]" if value.interval else ""


def spread(values: Iterable[float | None], form: Callable[[float], str]) -> Entry:
    """The median of those there are, with lowest to highest where they read differently."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return NOTHING
    low, high = form(min(known)), form(max(known))
    unit = f" {high.rpartition(' ')[2]}"
    detail = "" if low == high else f"{low.removesuffix(unit)} to {high}".replace(" ", "\N{NO-BREAK SPACE}")
    return Entry(form(median(known)), detail, median(known))


def short(text: str, most: int = 30) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def count(numbers: int | Sequence[int], noun: str) -> str:
    """1 seed, 12 seeds, or 3 to 12 seeds."""
    text = f"{numbers:,}" if isinstance(numbers, int) else span(numbers)
    return f"{text} {noun}{'' if text == '1' else 's'}"


def span(numbers: Sequence[int]) -> str:
    """12, or 3 to 12."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


if __name__ == "__main__":
    run_command(main)
