"""`python -m fastcifar.models`: the table of architectures, as a table or JSON, or one model layer by layer."""

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from fastcifar.arguments import parse_arguments
from fastcifar.errors import run_command
from fastcifar.models import ARCHITECTURES, BUDGET, build_model, count_parameters
from fastcifar.models.summary import flops_per_image, trace_layers


@dataclass(frozen=True)
class Options:
    """Show every architecture with its parameters and FLOPs, or one of them layer by layer."""

    json: bool = False  # print a list of objects instead of a table
    summary: str | None = None  # an arch: print its layers, output shapes and parameters


def describe(name: str) -> dict[str, Any]:
    """What the table shows of one architecture; parameters and FLOPs are counted on the model, not copied from the row."""
    row, model = ARCHITECTURES[name], build_model(name)
    parameters = count_parameters(model)
    return {
        "arch": name,
        "report": row.report,
        "stages": row.stages,
        "parameters": parameters,
        "budget_share": parameters / BUDGET,
        "flops_per_image": flops_per_image(model),
    }


def architecture_table(rows: list[dict[str, Any]]) -> Table:
    """The table for people; it fits 80 columns."""
    caption = f"from: report A-E; budget {BUDGET:,} parameters; FLOPs of a forward pass, 2 per multiply-add"
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption=caption)
    for heading in ("arch", "from", "channels x blocks"):
        table.add_column(heading, no_wrap=True)
    for heading in ("parameters", "budget", "MFLOP"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        over = "yellow" if row["budget_share"] > 1 else None
        share, flops = f"{row['budget_share']:.1%}", f"{row['flops_per_image'] / 1e6:,.1f}"
        table.add_row(row["arch"], row["report"], row["stages"], f"{row['parameters']:,}", share, flops, style=over)
    return table


def summary_table(name: str) -> Table:
    """One architecture, a line for each layer, as report A shows its own."""
    model = build_model(name)
    layers = trace_layers(model)
    table = Table(title=f"{name}: one image 3x32x32", show_footer=True)
    table.add_column("layer", "total", no_wrap=True)
    table.add_column("type")
    table.add_column("output", justify="right")
    table.add_column("parameters", f"{count_parameters(model):,}", justify="right")
    table.add_column("MFLOP", f"{sum(row.flops for row in layers) / 1e6:,.1f}", justify="right")
    for row in layers:
        shape = "x".join(map(str, row.output))
        table.add_row(row.name, row.kind, shape, f"{row.parameters:,}", f"{row.flops / 1e6:,.2f}")
    return table


def main() -> None:
    """Print what was asked for."""
    options = parse_arguments(Options, "python -m fastcifar.models")
    console = Console()
    if options.summary is not None:
        console.print(summary_table(options.summary))
        return
    rows = [describe(name) for name in ARCHITECTURES]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        console.print(architecture_table(rows))


if __name__ == "__main__":
    run_command(main)
