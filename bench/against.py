#!/usr/bin/env python3
"""Every variant's training step beside another commit's, and beside PyTorch's own optimizations, timed in turns.

python bench/against.py --commit 88fc11f
python bench/against.py --commit HEAD~10 --archs mish_se_resnet18 --rounds 20 --out against.json

    fastcifar   this tree's training, by the variant's own recipe
    commit      the same of another commit, in a process of its own that waits while others have their turn
    torch       this tree's with `--kernels torch`: PyTorch's own operations
    built_in    an ordinary DataLoader loop with every optimization PyTorch has for it

A ratio is seconds of the other over seconds of this tree: above 1, this tree is faster. Intervals: bench/stats.py.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.baselines import LOOPS, Call, Loop, Task, load_all, time_loops
from bench.results import Timing, environment
from bench.stats import rate, ratio
from fastcifar.arguments import parse_arguments
from fastcifar.dataset import Splits
from fastcifar.device import choose_device, set_up_process
from fastcifar.errors import InputError, require, run_command
from fastcifar.files import write_json
from fastcifar.models import ARCHITECTURES, architecture
from fastcifar.recipes import RunOptions, reported

ROOT = Path(__file__).parents[1]
OURS = "fastcifar"


@dataclass(frozen=True)
class Options:
    """Time this tree's training step beside another commit's and beside PyTorch's own optimizations."""

    commit: str  # whatever git calls one
    archs: tuple[str, ...] = tuple(ARCHITECTURES)
    data: Path = Path("data/beton")  # folder with the betons
    loops: tuple[str, ...] = ("torch", "built_in")  # other rows of `LOOPS` in bench/baselines.py
    rounds: int = 12  # every loop has a turn in each
    steps: int = 6  # of training in a turn
    batch_size: int = 128  # images; 0: each recipe's own
    out: Path | None = None  # JSON to write, with every round

    def __post_init__(self) -> None:
        for arch in self.archs:
            architecture(arch)
        require(self, set(self.loops) <= set(LOOPS) - {OURS}, "loops", f"of {', '.join(sorted(set(LOOPS) - {OURS}))}")
        for name in ("rounds", "steps"):
            require(self, getattr(self, name) >= 1, name, "at least 1")
        require(self, self.batch_size == 0 or self.batch_size >= 2, "batch_size", "0, or at least 2")


class Worker:
    """A process that trains as the code in the folder `tree` does, when asked."""

    def __init__(self, tree: Path, options: Options) -> None:
        arguments = [str(options.data.resolve()), str(options.steps), str(options.batch_size)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("against_worker.py")), *arguments],
            cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def build(self, arch: str) -> Call:
        """What trains `arch` once more each time it is called. Raises RuntimeError with the other side's words."""
        self._ask(arch)
        return lambda: self._ask("")

    def _ask(self, line: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline() or '{"error": "its process ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def worker_of(options: Options) -> Iterator[Worker]:
    """A worker of the commit, checked out into a temporary folder. Raises InputError where git has no such commit."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", options.commit], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode:
            raise InputError(f"commit {options.commit} is not in this repository: {archive.stderr.decode().strip()[:200]}")
        subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
        worker = Worker(Path(folder), options)
        try:
            yield worker
        finally:
            worker.close()


def time_arch(arch: str, options: Options, worker: Worker, data: Splits, console: Console) -> list[Timing]:
    """Time an architecture's training in turns: this tree's, the commit's, then `options.loops`."""
    recipe = reported(arch).recipe
    recipe = replace(recipe, batch_size=options.batch_size or recipe.batch_size)
    task = Task(arch, recipe, data, options.data, options.steps)
    run = RunOptions(data=options.data, max_parameters=0)

    def loop(name: str) -> Loop:
        title, note, build = LOOPS[name]
        return Loop(name, title, note, task.images, lambda _: build(task, run))

    commit = Loop("commit", options.commit, "", task.images, lambda _: worker.build(arch))
    rows = [loop(OURS), commit, *map(loop, options.loops)]
    return time_loops(rows, rounds=options.rounds, kind=arch, say=console.print)


def table_of(timed: dict[str, Sequence[Timing]], options: Options) -> Table:
    """A row an architecture: this tree's images a second, and how many times as long the others take."""
    table = Table("variant", "images/s", options.commit, *options.loops, box=None, padding=(0, 2, 0, 0))
    for arch, (ours, *others) in timed.items():
        mine = ours.images_per_second
        ratios = [str(ratio(mine, other.images_per_second)) if mine and not other.error else other.error for other in others]
        table.add_row(arch, f"{rate(mine).estimate:,.0f}" if mine else ours.error, *ratios)
    return table


def main() -> None:
    """Time, print the table, write what was measured."""
    options = parse_arguments(Options, "python bench/against.py")
    device, console = choose_device("auto"), Console(soft_wrap=True, highlight=False)
    set_up_process(device, deterministic=True)
    facts, data = environment(device), load_all(options.data, device)
    timed: dict[str, Sequence[Timing]] = {}
    with worker_of(options) as worker:
        for arch in options.archs:
            timed[arch] = time_arch(arch, options, worker, data, console)
            if options.out is not None:  # after each: the next takes minutes
                rows = {name: [asdict(timing) for timing in timings] for name, timings in timed.items()}
                write_json(options.out, facts | {"commit_compared": options.commit, "timings": rows})
    console.print(table_of(timed, options))


if __name__ == "__main__":
    run_command(main)
