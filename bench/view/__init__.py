"""Results enter; what their report says, section by section, leaves (`model.Report`)."""

from typing import Any

from bench.figures import Figures, all_figures, check, finished, target_top1, worked
from bench.intervals import MIN_ROUNDS, change_in_turns
from bench.schema import Results
from bench.view.bars import ablation_bars, ladder_bars, peer_bars, peer_change
from bench.view.charts import NARROW, WIDE, learning_curves, scatter
from bench.view.model import Bars, Report
from bench.view.tables import table_notes, variant_tables
from bench.view.wording import count, factor, factor_detail, percent, significant, size, span

TITLE = "fastcifar benchmark"


def build_report(results: Results) -> Report:
    """Compute everything the templates lay out. Raises InputError for figures that no measurement gives."""
    check(results)
    rows = all_figures(results)
    target = target_top1(results, rows)
    failures = [(cell.key, cell.error or "no epoch was finished") for cell in results.cells if not finished(cell)]
    return Report(
        title=f"{TITLE}: {results.environment.get('hardware') or 'unnamed hardware'}",
        lead=lead(results, rows, len(failures)),
        warnings=warnings(results.data),
        headlines=headlines(rows, results),
        scatters=[scatter(rows, size) for size in (WIDE, NARROW)] if rows else [],
        scatter_note=scatter_note(rows),
        tables=variant_tables(rows, target),
        table_notes=table_notes(rows, target),
        curves=learning_curves(rows) if any(len(cell.epochs) > 1 for row in rows for cell in row.cells) else [],
        curves_note=curves_note(rows),
        bars=all_bars(results),
        failures=failures,
        method=method(results, rows),
        environment=environment(results),
    )


def lead(results: Results, rows: list[Figures], failed: int) -> list[str]:
    """What was measured, on what, on which data."""
    data, sentences = results.data, []
    cells = [cell for row in rows for cell in row.cells]
    hardware = results.environment.get("hardware") or "hardware that was not recorded"
    if cells:
        seeds = span([len(row.cells) for row in rows])
        epochs = span([len(cell.epochs) for cell in cells])
        images = span([cell.images_per_epoch for cell in cells])
        sentences.append(
            f"{count(len(rows), 'variant')} trained with {_plural(seeds, 'seed')} each for {_plural(epochs, 'epoch')} of "
            f"{images} images, on {hardware}."
        )
    elif failed:
        sentences.append(f"No training was finished on {hardware}, so there is no table of variants.")
    else:
        sentences.append(f"Measured on {hardware}; no variant was trained for a table.")
    tested = sorted({cell.test_images for cell in cells})
    on = f"Accuracy is measured on {_plural(span(tested), 'image')} of the test set of " if tested else "The data is "
    sentences.append(f"{on}{source_of(data)}.")
    if failed:
        sentences.append(f"{count(failed, 'run')} failed and {'is' if failed == 1 else 'are'} named below.")
    return sentences


def source_of(data: dict[str, Any]) -> str:
    """The data set's name, and whether it is the official one."""
    name = str(data.get("name") or "a data set without a name")
    if data.get("synthetic"):
        return "a synthetic stand-in"
    if data.get("official") is None:
        return f"{name}, of which it was not recorded whether it is the official archive"
    if data["official"]:
        return f"{name}, the official archive"
    return name if "official" in name else f"{name}, which is not the official archive"


def warnings(data: dict[str, Any]) -> list[str]:
    """What must be read before any figure."""
    if data.get("synthetic"):
        return ["Synthetic stand-in: accuracy means nothing here. The images were drawn by a program; only speeds can be read."]
    if data.get("official") is False:
        return ["Not the official archive: accuracies compare among themselves only, not with published ones."]
    return []


def headlines(rows: list[Figures], results: Results) -> list[tuple[str, str, str]]:
    """At most four figures to remember."""
    ladder, peers, lines = results.ladder, results.peers, []
    if rows:
        fastest = max(rows, key=lambda row: row.epochs_per_second)
        best = max(rows, key=lambda row: row.final.mean)
        rate = f"{significant(fastest.images_per_second.median)} images/s"
        lines.append(("Fastest", f"{significant(fastest.epochs_per_second)} epochs/s", f"{fastest.label}, {rate}"))
        if not results.data.get("synthetic"):
            lines.append(("Highest mean accuracy", percent(best.final.mean), f"{best.label}, {count(best.final.n, 'seed')}"))
    rungs = [rung for rung in ladder.rungs if worked(rung)] if ladder else []
    if ladder and len(rungs) > 1:
        change = change_in_turns(rungs[-1].images_per_second, rungs[0].images_per_second)
        lines.append(("Ladder, last rung against first", factor(change), f"{ladder.arch}, {factor_detail(change)}"))
    loops = [peer for peer in peers.entries if worked(peer)] if peers else []
    if peers and len(loops) > 1 and loops[0] is peers.entries[0]:
        change = peer_change(loops[0], loops[1])
        lines.append((f"Against {loops[1].name}", factor(change), f"{peers.arch}, {factor_detail(change)}"))
    return lines


def scatter_note(rows: list[Figures]) -> str:
    seeds = span([len(row.cells) for row in rows]) if rows else "1"
    vertical = f"Vertical bars: lowest to highest of {seeds} seeds. " if seeds != "1" else "One seed each: no vertical bars. "
    return (
        f"Filled, in bold: no other variant here is both faster and more accurate (Pareto front, the line). {vertical}"
        "Horizontal bars: 10th to 90th percentile of epochs."
        + (" The 95 % intervals stand in the table." if seeds != "1" else "")
    )


def curves_note(rows: list[Figures]) -> str:
    several = any(len(row.cells) > 1 for row in rows)
    band = "the line is the mean over seeds, the band from the lowest to the highest; " if several else "one seed each; "
    return f"Test accuracy in percent: {band}in grey all the other variants, on the same axes."


def all_bars(results: Results) -> list[Bars]:
    """Ladder, peers and ablations, as far as there are any."""
    charts = [ladder_bars(results.ladder) if results.ladder else None, peer_bars(results.peers) if results.peers else None]
    charts += [ablation_bars(ablation, f"ablation-{number}") for number, ablation in enumerate(results.ablations, start=1)]
    return [chart for chart in charts if chart is not None]


def method(results: Results, rows: list[Figures]) -> list[str]:
    """How the figures came about, for those who would repeat or doubt them."""
    lines = []
    if rows:
        lines.append(
            "Rates are of training only, over all epochs of all seeds but each run's first, which holds compiling and warming "
            "up; median, and 10th to 90th percentile as the spread."
        )
        lines.append(f"Levers that were on: {levers_of(rows)}.")
        batches = span([cell.batch_size for row in rows for cell in row.cells])
        lines.append(f"Batch size: {batches}.")
        lines.append(
            "Best top-1 is the best epoch chosen on the test set itself, as the reports did: it is optimistic. The last "
            "epoch's is not chosen."
        )
    if results.ladder or results.peers:
        lines.append(
            "Ratios: measured in turns in one process, taken within each round; 95 % percentile bootstrap interval of "
            "the median. In simulated comparisons of equal peers it claims a difference in 5 to 9 % of cases; with fewer than "
            f"{MIN_ROUNDS} rounds none is claimed."
        )
    return lines


def levers_of(rows: list[Figures]) -> str:
    """The levers, with the variants that had them where not all had the same."""
    sets: dict[str, list[str]] = {}
    for row in rows:
        sets.setdefault(" + ".join(row.cells[0].levers) or "none", []).append(row.label)
    if len(sets) == 1:
        return next(iter(sets))
    return "; ".join(f"{levers} ({', '.join(labels)})" for levers, labels in sets.items())


def environment(results: Results) -> list[tuple[str, str]]:
    """Everything recorded about machine, software, data and command, one line a fact."""
    sizes = {key: size(value) for key, value in results.environment.items() if "memory" in key and isinstance(value, int)}
    facts = results.environment | sizes | {f"data, {key}": value for key, value in results.data.items()}
    facts |= {f"setting, {key}": value for key, value in results.settings.items()}
    return [(key.replace("_", " "), _text(value)) for key, value in facts.items() if value not in (None, "", [], {})]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_text(entry)}" for key, entry in value.items() if entry is not None)
    if isinstance(value, list):
        return ", ".join(_text(entry) for entry in value)
    return str(value)


def _plural(number: str, noun: str) -> str:
    return f"{number} {noun}{'' if number == '1' else 's'}"
