#!/usr/bin/env python3
"""Architectures, seeds and betons enter; epochs per second beside accuracy leave, for every variant, with ladder and peers.

python bench/run.py                       # all architectures, three seeds: look at the plan it prints first
python bench/run.py --quick               # the same in small, within ten minutes on two CPU cores
python bench/run.py --archs se_resnet18 --epochs 30 --seeds 0 1 2 3 4 --out runs/bench-se

Each training is a cell, runs in a process of its own and is saved when it is finished; the same command again does what is
left, and what failed: the whole ladder for one of its rungs, all loops of the peers for one of them, an outside script for
itself. `results.json`, `report.md` and `report.html` in the folder always show what is there; seconds to an accuracy in them
are to `--target`, which may be given or changed at any time without another training.
"""

import sys
from dataclasses import asdict, dataclass, replace
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench.cells import START_SECONDS, estimate, finished, run_jobs, settle
from bench.collect import collect, open_header, read_part
from bench.figures import broke
from bench.ladder import climb
from bench.levers import LEVERS, chosen_levers, why_not
from bench.loops import Task
from bench.peers import PROTOCOL, meet, outside_scripts
from bench.roofline import Rates
from bench.schema import Ladder, Peer, Peers, Rung
from bench.train_cell import Job
from fastcifar import files
from fastcifar.dataset import Splits, load_splits
from fastcifar.device import choose_device, device_name, set_up_process
from fastcifar.errors import require, run_command
from fastcifar.models import ARCHITECTURES, architecture
from fastcifar.progress import clock
from fastcifar.recipes import reported
from fastcifar.summary import warn_synthetic
from fastcifar.train import steps_per_epoch

PROGRAM = "python bench/run.py"


@dataclass(frozen=True)
class Options:
    """Measure speed and accuracy of architectures on this machine; the same command again goes on where it stood.

    The defaults shown are those of --quick where it is given: a real but small version, within ten minutes on two CPU cores.
    """

    archs: tuple[str, ...] = tuple(ARCHITECTURES)  # architectures; `python -m fastcifar.models` lists them
    epochs: int = 10  # of each training; every report's schedule is stretched to them
    seeds: tuple[int, ...] = (0, 1, 2)  # one training of each architecture for each seed
    levers: tuple[str, ...] | None = None  # what is switched on (bench/levers.py); default: all that pay on this device
    data: Path = Path("data/beton")  # folder with train.beton and test.beton
    out: Path | None = None  # folder of the results; default: runs/bench, or runs/bench-quick
    quick: bool = False  # the small version
    limit_train: int = 0  # use only the first so many training images, 0 = all
    limit_test: int = 0  # use only the first so many test images, 0 = all
    batch_size: int = 0  # images per step, 0 = each recipe's own
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    target: float = 0.0  # top-1 in percent to which the report counts seconds; 0 = the most that half of the variants reach
    ladder: bool = True  # time the levers one after the other
    peers: bool = True  # time other training loops beside ours
    peer_arch: str = "se_resnet18"  # the architecture of ladder and peers
    rounds: int = 12  # timed turns of each rung and peer
    steps: int = 0  # training steps of a turn, 0 = 4 on a CPU, 50 on CUDA
    # NAME=PATH of an outside script to time beside ours, described above
    peer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    peer_images: int = 0  # images an outside script trains on in all, if it prints no rate; 0 = epochs x training images

    def __post_init__(self) -> None:
        for arch in (*self.archs, self.peer_arch):
            architecture(arch)
        require(self, bool(self.archs), "archs", "at least one")
        require(self, bool(self.seeds) and all(0 <= seed < 2**63 for seed in self.seeds), "seeds", "at least one, 0..2^63-1")
        require(self, self.epochs >= 1, "epochs", "at least 1")
        require(self, self.rounds >= 2, "rounds", "at least 2")
        require(self, 0 <= self.target < 100, "target", "0 to below 100 percent")
        require(self, self.batch_size == 0 or self.batch_size >= 2, "batch_size", "0 or at least 2")
        for name in ("limit_train", "limit_test", "steps", "peer_images"):
            require(self, getattr(self, name) >= 0, name, "0 or more")


# One image of every architecture costs 15.2 GFLOP, forward and backward, and two cores train at about 300 GFLOP/s. So 3 x 1,024
# training images and 5 x 500 test images, at a third each, are 3,900 x 15.2 / 300 = 200 s; nine starts of a process another
# 60 s; ladder and peers, 5 + 4 loops of 128 images for 6 + 2 turns, about 60 s with FFCV's JIT.
QUICK = Options(epochs=3, seeds=(0,), limit_train=1024, limit_test=500, batch_size=64, rounds=6, steps=2, quick=True)


@dataclass(frozen=True)
class Bench:
    """What a run works with."""

    options: Options
    out: Path
    device: torch.device
    data: Splits
    jobs: list[Job]
    rates: Rates  # the device's
    seconds: dict[str, float]  # what each job is expected to take
    scripts: dict[str, Path]
    console: Console

    @property
    def task(self) -> Task:
        """What ladder and peers train."""
        recipe = reported(self.options.peer_arch).recipe
        recipe = replace(recipe, batch_size=self.options.batch_size or recipe.batch_size)
        steps = self.options.steps or (50 if self.device.type == "cuda" else 4)
        steps = min(steps, steps_per_epoch(self.data, recipe.batch_size))
        return Task(self.options.peer_arch, recipe, self.data, self.options.data, steps)


def main() -> None:
    """Parse, plan, measure."""
    default = QUICK if "--quick" in sys.argv[1:] else Options()
    described = f"{getdoc(Options)}\n\nLevers: {', '.join(LEVERS)}.\n\n{PROTOCOL}"
    options = tyro.cli(Options, prog=PROGRAM, default=default, description=described)
    bench = prepare(options, Console(soft_wrap=True, highlight=False, markup=False))
    show_plan(bench)
    try:
        failures = measure(bench)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is in {bench.out}; the same command goes on") from None
    bench.console.print(f"results and report: {bench.out}")
    if failures:
        named = f"{len(failures)} failed ({', '.join(failures)}), see above"
        bench.console.print(f"{named}; the same command tries them again", style="yellow")
        sys.exit(1)


def prepare(options: Options, console: Console) -> Bench:
    """Check everything that can be checked beforehand and open the folder. Raises InputError."""
    scripts = outside_scripts(options.peer)
    device = choose_device(options.device)
    set_up_process(device, deterministic=True)
    data = load_splits(
        options.data,
        device,
        limit_train=options.limit_train,
        limit_test=options.limit_test,
        val_fraction=0.0,
        seed=0,
        verify=True,
    )
    warn_synthetic(console, data.manifest.synthetic, data.manifest.name)
    jobs = [
        make_job(options, arch, seed, device) for arch in dict.fromkeys(options.archs) for seed in dict.fromkeys(options.seeds)
    ]
    for job in jobs:
        steps_per_epoch(data, job.recipe.batch_size)
    if options.ladder or options.peers:
        steps_per_epoch(data, options.batch_size or reported(options.peer_arch).recipe.batch_size)
    out = options.out or Path("runs") / ("bench-quick" if options.quick else "bench")
    settle(out / "settings.json", defining(options, device, data))
    header = open_header(out, device, data, list(dict.fromkeys(options.archs)), _plain(options))
    rates = Rates(**header.environment["rates"])
    seconds = {job.key: estimate(job, rates, device, len(data.train), len(data.test)) for job in jobs}
    return Bench(options, out, device, data, jobs, rates, seconds, scripts, console)


def make_job(options: Options, arch: str, seed: int, device: torch.device) -> Job:
    """The job of one cell. Raises InputError for a lever that is unknown, or that the device lacks."""
    levers = chosen_levers(options.levers, arch, device)
    return Job(
        key=f"{arch}-seed{seed}-{'+'.join(levers)}",
        arch=arch,
        seed=seed,
        levers=levers,
        epochs=options.epochs,
        data=str(options.data.resolve()),
        limit_train=options.limit_train,
        limit_test=options.limit_test,
        device=device.type,
        overrides={"batch_size": options.batch_size} if options.batch_size else {},
    )


def defining(options: Options, device: torch.device, data: Splits) -> dict[str, Any]:
    """What all figures of a folder have in common; a restart with anything else is refused."""
    timed = {"arch": options.peer_arch, "rounds": options.rounds, "steps": options.steps}
    met = {"scripts": list(options.peer), "images": options.peer_images}
    met["levers"] = chosen_levers(options.levers, options.peer_arch, device)
    return {
        "hardware": device_name(device),
        "torch": torch.__version__,
        "data": list(data.sha256),
        **{name: getattr(options, name) for name in ("epochs", "limit_train", "limit_test", "batch_size")},
        **({"ladder": timed} if options.ladder else {}),
        **({"peers": timed | met} if options.peers else {}),
    }


def _plain(options: Options) -> dict[str, Any]:
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    return plain | {"target_top1": round(options.target / 100, 6) or None}  # a share, as bench/figures.py reads it


def show_plan(bench: Bench) -> None:
    """Print what is to do, what is done, and what it is expected to take."""
    options, console = bench.options, bench.console
    done = {job.key for job in bench.jobs if finished(bench.out, job, Console(quiet=True)) is not None}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("arch", no_wrap=True)
    for heading in ("trainings", "done", "each about"):
        table.add_column(heading, justify="right")
    for arch in dict.fromkeys(options.archs):
        jobs = [job for job in bench.jobs if job.arch == arch]
        finished_here = sum(job.key in done for job in jobs)
        table.add_row(arch, str(len(jobs)), str(finished_here), clock(bench.seconds[jobs[0].key]))
    images = f"{options.epochs} epochs of {len(bench.data.train):,} images, {len(bench.data.test):,} test images"
    console.print(f"{images}, {device_name(bench.device)}; levers: {', '.join(bench.jobs[0].levers)}")
    lacking = [f"{name}: {reason}" for name in LEVERS if (reason := why_not(name, bench.device))]
    console.print("\n".join(f"no lever {line}" for line in lacking))
    console.print(table)
    total = sum(seconds for key, seconds in bench.seconds.items() if key not in done)
    ladder = read_part(bench.out / "ladder.json", Ladder, Console(quiet=True))
    peers = read_part(bench.out / "peers.json", Peers, Console(quiet=True))
    for name, wanted, part in (("ladder", options.ladder, ladder), ("peers", options.peers, peers)):
        failed = failures_of(part)
        state = "not wanted" if not wanted else "done" if part is not None and not failed else ""
        seconds = 0.0 if state else timed_seconds(bench, name)
        total += seconds
        again = f"; again for {', '.join(failed)}" if wanted and failed else ""
        console.print(f"{name} of {options.peer_arch}: {state or f'about {clock(seconds)}'}{again}")
    console.print(f"in all about {clock(total)}, guessed from FLOPs, bytes and this device's rates; into {bench.out}")


def timed_seconds(bench: Bench, part: str) -> float:
    """What ladder or peers are expected to take: their loops, each as many turns, taken to be half as fast as a cell's."""
    job = make_job(replace(bench.options, levers=None), bench.options.peer_arch, 0, bench.device)
    one_image = estimate(replace(job, levers=[], epochs=1), bench.rates, bench.device, 1, 0) - START_SECONDS
    loops = 4 if part == "peers" else 1 + sum(not why_not(name, bench.device) for name in LEVERS)
    compiling = 60.0 * (bench.device.type == "cuda" or (part == "ladder" and not bench.options.quick))
    return compiling + 15.0 + loops * (bench.options.rounds + 2) * bench.task.images * one_image * 2


def failures_of(part: Ladder | Peers | None) -> list[str]:
    """What failed in a ladder or in peers; not what this device lacks or what was left out."""
    if part is None:
        return []
    entries: list[tuple[str, Rung | Peer]]
    if isinstance(part, Ladder):
        entries = [("ladder", rung) for rung in part.rungs]
    else:
        entries = [("peer", peer) for peer in part.entries]
    return [f"{kind}: {entry.name}" for kind, entry in entries if broke(entry)]


def measure(bench: Bench) -> list[str]:
    """Run all that is not finished or failed before; return what failed now: cells, rungs, peers."""
    options, out, console = bench.options, bench.out, bench.console

    def saved() -> None:
        collect(out, console)

    cells = run_jobs(bench.jobs, out, bench.seconds, console, saved)
    failures = [cell.key for cell in cells if cell.error is not None]
    ladder, peers = read_part(out / "ladder.json", Ladder, console), read_part(out / "peers.json", Peers, console)
    if options.ladder and (ladder is None or failures_of(ladder)):
        # Compiling for a CPU takes a minute and gains nothing there (LOG.md): not in the small version.
        left_out = {"compile"} if options.quick and bench.device.type == "cpu" else set()
        ladder = climb(bench.task, rounds=options.rounds, left_out=left_out, say=console.print)
        files.write_json(out / "ladder.json", asdict(ladder))
        saved()
    if options.peers and (peers is None or failures_of(peers)):
        levers = chosen_levers(options.levers, options.peer_arch, bench.device)
        peers = meet(
            bench.task, levers=levers, rounds=options.rounds, scripts=bench.scripts, epochs=options.epochs,
            peer_images=options.peer_images, before=peers, say=console.print,
        )  # fmt: skip
        files.write_json(out / "peers.json", asdict(peers))
    collect(out, console)
    failures += failures_of(ladder) if options.ladder else []
    return failures + (failures_of(peers) if options.peers else [])


if __name__ == "__main__":
    run_command(main)
