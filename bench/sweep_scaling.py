"""How long a sweep of many runs takes on many devices: arithmetic, checked by a simulation that replays measured runs.

python -m bench.sweep_scaling sweeps/mine --runs 1000 --devices 8 64 512

A run's length is from the start of its process to its last evaluation. Devices take the next run as soon as they are free, as
Ray's workers do; a node's devices begin when the data has travelled to it, one node after another from the driver.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from fastcifar.arguments import parse_arguments
from fastcifar.errors import InputError, require, run_command
from fastcifar.run_folder import RunFolder

DRAWS = 200  # simulated sweeps, whose median and 5 to 95 % are shown


@dataclass(frozen=True)
class Options:
    """Calculate and simulate how long a sweep takes, from the run folders of a smaller one."""

    measured: tyro.conf.Positional[Path]  # folder with finished run folders, at any depth
    runs: int = 1000  # of the large sweep
    devices: tuple[int, ...] = (8, 64, 512)  # GPUs, or cores
    per_node: int = 8  # devices of a node
    node_seconds: float = 0.0  # for the data to reach a node
    hours: float = 0.0  # mean length of a run, with the measured spread; 0 = as measured

    def __post_init__(self) -> None:
        require(self, self.runs >= 1, "runs", "1 or more")
        require(self, bool(self.devices) and min(self.devices) >= 1, "devices", "1 or more each")
        require(self, self.per_node >= 1, "per_node", "1 or more")
        require(self, self.node_seconds >= 0, "node_seconds", "0 or more")
        require(self, self.hours >= 0, "hours", "0 or more")


def main() -> None:
    """Print the table."""
    options = parse_arguments(Options, "python -m bench.sweep_scaling")
    lengths = measured_lengths(options.measured)
    if options.hours:
        lengths = lengths * (3600 * options.hours / lengths.mean())
    console = Console(soft_wrap=True, highlight=False, markup=False)
    spread = f"{lengths.mean():.1f} s on average, {lengths.min():.1f} to {lengths.max():.1f}"
    console.print(f"{len(lengths)} measured runs: {spread}; {options.runs:,} of them, drawn with replacement")
    console.print(table_of(options, lengths))


def measured_lengths(folder: Path) -> np.ndarray:
    """Seconds of every finished run below `folder`. Raises InputError when there is none."""
    folders = [RunFolder(path.parent) for path in sorted(folder.rglob("summary.json"))]
    if not folders:
        raise InputError(f"{folder} holds no finished run: name the --out of a sweep")
    return np.array([length_of(run) for run in folders])


def length_of(folder: RunFolder) -> float:
    """Seconds of a run that was not interrupted: the start, the epochs, the evaluations."""
    rows = folder.read_metrics()
    return rows[0]["first_step_seconds"] + sum(row["train_seconds"] + (row["eval_seconds"] or 0.0) for row in rows)


def ready_times(devices: int, per_node: int, node_seconds: float) -> list[float]:
    """When each device can begin."""
    return [(device // per_node + 1) * node_seconds for device in range(devices)]


def simulated(lengths: Sequence[float], ready: Sequence[float]) -> float:
    """Seconds until the last run ends, where each goes to the device that is free first."""
    free = list(ready)
    heapq.heapify(free)
    end = 0.0
    for length in lengths:
        done = heapq.heappop(free) + length
        end = max(end, done)
        heapq.heappush(free, done)
    return end


def bounds(lengths: Sequence[float], ready: Sequence[float]) -> tuple[float, float]:
    """The least and the most that any order of the runs can take (Graham, SIAM J. Appl. Math. 17, 1969).

    least = max(total / D, longest),   most = last ready + total / D + (1 - 1 / D) longest
    """
    total, longest, devices = sum(lengths), max(lengths), len(ready)
    return max(total / devices, longest), max(ready) + total / devices + (1 - 1 / devices) * longest


def table_of(options: Options, lengths: np.ndarray) -> Table:
    """A row for each number of devices."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("devices", "total / devices", "simulated", "5 to 95 %", "at most", "devices busy"):
        table.add_column(heading, justify="right", no_wrap=True)
    generator = np.random.default_rng(0)
    for devices in options.devices:
        ready = ready_times(devices, options.per_node, options.node_seconds)
        draws = [generator.choice(lengths, options.runs).tolist() for _ in range(DRAWS)]
        ends = np.array([simulated(draw, ready) for draw in draws])
        most = max(bounds(draw, ready)[1] for draw in draws)
        ideal = options.runs * lengths.mean() / devices
        low, middle, high = np.percentile(ends, (5, 50, 95))
        cells = (clock(ideal), clock(middle), f"{clock(low)} to {clock(high)}", clock(most), f"{ideal / middle:.0%}")
        table.add_row(str(devices), *cells)
    return table


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


if __name__ == "__main__":
    run_command(main)
