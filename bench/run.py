#!/usr/bin/env python3
"""Epochs per second beside accuracy for every variant, each optimization's gain, and other training loops beside ours.

python bench/run.py                       # all architectures, three seeds: look at the plan it prints first
python bench/run.py --quick               # the same in small, within ten minutes on two CPU cores
python bench/run.py --archs se_resnet18 --epochs 30 --seeds 0 1 2 3 4 --out runs/bench-se

Every training is `python -m fastcifar.train` in a process of its own and a run folder in OUT/runs (with its checkpoints). The
same command again repeats no finished one, goes on with an interrupted one from its last epoch, and tries again what failed.
`results.json`, `report.md` and `report.html` in OUT always show what is there (bench/results.py).
"""

import argparse
import contextlib
import math
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bench.results import Comparison, Results, Run, Variant, environment, load, read_results, read_run, write_results
from bench.roofline import Rates, cost_of_arch, measure_rates
from fastcifar.arguments import parse_arguments, split_flags
from fastcifar.beton import SIDE
from fastcifar.dataset import Splits, load_splits
from fastcifar.device import choose_device, device_name, set_up_process
from fastcifar.errors import InputError, require, run_command, unknown
from fastcifar.evaluate import warn_synthetic
from fastcifar.launch import Event, Job, latest, opened
from fastcifar.models import ARCHITECTURES, architecture
from fastcifar.models.summary import training_flops
from fastcifar.recipes import reported
from fastcifar.reporting import clock
from fastcifar.train import steps_per_epoch

PROGRAM = "python bench/run.py"
RENAMED = {  # names of the release before; to be dropped in the next
    "--ladder": "--optimizations", "--no-ladder": "--no-optimizations", "--peers": "--baselines",
    "--no-peers": "--no-baselines", "--peer": "--baseline", "--peer-arch": "--baseline-arch",
}  # fmt: skip
LEVERS = ("resident", "channels_last", "bf16", "compile", "kernels")  # what --levers took
KINDS = {"speeds": "architecture", "optimizations": "optimization step", "baselines": "baseline"}  # of what takes turns
OWN_FLAGS = ("--out", "--resume", "--seed", "--stop-after", "--data")  # of training, which only a benchmark itself sets
# What training reaches of its roofline (se_resnet18 on two cores: 360 of 1,036 img/s), and seconds to start a process. Guesses
# for the plan only.
SHARE, START_SECONDS = {"cpu": 0.35, "cuda": 0.5}, 10.0


@dataclass(frozen=True)
class Common:
    """What bench/run.py and bench/ablate.py share."""

    epochs: int = 10  # of each training that its arm says nothing else of; every report's schedule is stretched to them
    seeds: tuple[int, ...] = (0, 1, 2)  # one training of each configuration for each seed
    flags: str = ""  # of `python -m fastcifar.train`, for every training: --flags='--no-compile --precision fp32'
    data: Path = Path("data/beton")  # folder with train.beton and test.beton
    out: Path | None = None  # folder of the results; default: runs/bench, runs/bench-quick or runs/ablate
    limit_train: int = 0  # use only the first so many training images, 0 = all
    limit_test: int = 0  # use only the first so many test images, 0 = all
    batch_size: int = 0  # images per step, 0 = each recipe's own
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    # where trainings run: none: here, one after the other; auto or HOST:PORT: a Ray cluster of machines like this one
    on: str = "none"

    def __post_init__(self) -> None:
        require(self, bool(self.seeds) and all(0 <= seed < 2**63 for seed in self.seeds), "seeds", "at least one, 0..2^63-1")
        require(self, self.epochs >= 1, "epochs", "at least 1")
        require(self, self.batch_size == 0 or self.batch_size >= 2, "batch_size", "0 or at least 2")
        for name in ("limit_train", "limit_test"):
            require(self, getattr(self, name) >= 0, name, "0 or more")


@dataclass(frozen=True)
class Options(Common):
    """Measure speed and accuracy of architectures on this machine; the same command again goes on where it stood.

    The defaults shown are those of --quick where it is given: a real but small version, within ten minutes on two CPU cores.
    """

    archs: tuple[str, ...] = tuple(ARCHITECTURES)  # architectures; `python -m fastcifar.models` lists them
    quick: bool = False  # the small version
    target: float = 0.0  # top-1 in percent to which the report counts seconds; 0 = the most that half of the variants reach
    speeds: bool = True  # time all architectures' training steps in turns
    optimizations: bool = True  # time our training step with one optimization after the other
    baselines: bool = True  # time other training loops beside ours
    baseline_arch: str = "se_resnet18"  # the architecture of those two
    rounds: int = 12  # timed turns of whatever is timed in turns
    steps: int = 0  # training steps of a turn, 0 = 4 on a CPU, 50 on CUDA
    # 'NAME=PATH ARGUMENTS' of an outside script to run beside ours: bench/outside.py; of airbench's: bench/airbench.py
    baseline: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    baseline_hours: float = 2.0  # an outside script that takes longer is ended

    def __post_init__(self) -> None:
        super().__post_init__()
        for arch in (*self.archs, self.baseline_arch):
            architecture(arch)
        require(self, bool(self.archs), "archs", "at least one")
        require(self, self.rounds >= 2, "rounds", "at least 2")
        require(self, 0 <= self.target < 100, "target", "0 to below 100 percent")
        require(self, self.steps >= 0, "steps", "0 or more")
        require(self, 0 < self.baseline_hours < math.inf, "baseline_hours", "above 0")


# One image of every architecture costs 19.7 GFLOP, forward and backward, and two cores train at about 300 GFLOP/s. So 3 x 1,024
# training images and 5 x 500 test images, at a third each, are 3,900 x 19.7 / 300 = 257 s; thirteen starts of a process another
# 130 s; 8 turns of 128 images of every architecture 50 s; optimizations and baselines, 5 + 4 loops of 8 turns, about 60 s.
QUICK = Options(epochs=3, seeds=(0,), limit_train=1024, limit_test=500, batch_size=64, rounds=6, steps=2, quick=True)


@dataclass
class Bench:
    """A folder of results while it is filled."""

    out: Path
    device: torch.device
    data: Splits
    results: Results
    console: Console
    betons: Path
    on: str = "none"

    def save(self, **changes: Any) -> None:
        """Write results.json and the reports of all that is finished. A broken run is left out, with a line."""
        self.results = replace(self.results, runs=gather(self.out / "runs", self.console), **changes)
        write_results(self.out, self.results)
        from bench.report import write_reports  # here, since matplotlib takes a second to import

        try:
            write_reports(self.out, self.results)
        except Exception as error:  # whatever a report cannot show must not end hours of measuring
            self.console.print(f"no report: {type(error).__name__}: {error}; results.json is complete", style="yellow")

    def left(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that are not finished. Raises InputError for one begun otherwise."""
        return [job for job in jobs if not job.finished(device_name(self.device), self.data.sha256)]

    def show_plan(self, groups: Mapping[str, Sequence[Job]], what: str, flags: str) -> None:
        """Print what is to train, what is trained, and what the rest may take. Raises InputError for what cannot be trained."""
        jobs = list(chain.from_iterable(groups.values()))
        for job in jobs:
            steps_per_epoch(self.data, job.command.settings.batch_size)
        left = self.left(jobs)
        lengths = sorted({job.command.settings.epochs for job in jobs})
        epochs = f"{' to '.join(map(str, lengths[:1] + lengths[1:][-1:]))} epochs of {len(self.data.train):,} images"
        told = [epochs, f"{len(self.data.test):,} test images", device_name(self.device) + (f"; {flags}" if flags else "")]
        self.console.print(", ".join(told))
        right = (Column(heading, justify="right") for heading in ("trainings", "done", "each about"))
        table = Table(what, *right, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name, group in groups.items():
            done = sum(job not in left for job in group)
            table.add_row(Text(name), str(len(group)), str(done), clock(self.seconds(group[0])))
        self.console.print(table)
        total, guess = clock(sum(map(self.seconds, left))), "guessed from FLOPs, bytes and this device's rates"
        self.console.print(f"trainings: in all about {total}, {guess}; into {self.out}")

    def seconds(self, job: Job) -> float:
        """What a training is expected to take: its epochs, an evaluation after each, and the last with horizontal flip."""
        train, test = len(self.data.train), len(self.data.test)
        recipe, rates = job.command.settings, Rates(**self.results.environment["rates"])
        trained = train * sum(recipe.phase(epoch).size ** 2 for epoch in range(recipe.epochs)) / SIDE**2
        images = trained + (recipe.epochs + 2) * test / 3  # a forward pass is a third of a step
        return START_SECONDS + images / (SHARE[self.device.type] * cost_of_arch(job.command.arch).images_per_second(rates))

    def train(self, jobs: Iterable[Job]) -> list[str]:
        """Train what is not finished; return the names of those that failed."""
        left, failed, done = deque(self.left(jobs)), [], 0
        if not left:
            return []
        total = len(left)
        with opened(self.on, self.betons, 0, 1, self.console) as workers, self.console.status("") as status:
            for event in workers.events(left):
                title = f"[{done + 1}/{total}] {event.job.name}: "
                status.update(Text(title + event.line))
                if event.ended:
                    done += 1
                    failed += self.take(event, title)
        return failed

    def take(self, event: Event, title: str) -> list[str]:
        """Take the results of a training that has ended and say so; return its name if it failed."""
        self.save()
        if event.error:
            self.console.print(f"{title}failed: {event.error}", style="yellow")
            return [event.job.name]
        run = next(run for run in self.results.runs if run.name == event.job.name)
        rate, took = median(run.rates), clock(sum(run.train_seconds))
        self.console.print(f"{title}top-1 {run.top1:.2%}, {rate:,.0f} img/s, {took}")
        return []


def gather(runs: Path, console: Console) -> list[Run]:
    """All trainings in OUT/runs that have ended, in the order of the architectures and seeds."""
    ended = {*(path.parent for path in runs.rglob("summary.json")), *(path.with_suffix("") for path in runs.rglob("*.log"))}
    found = []
    for path in ended:
        try:
            found.append(read_run(runs, str(path.relative_to(runs))))
        except InputError as error:
            console.print(f"left out: {error}", style="yellow")
    order = {arch: place for place, arch in enumerate(ARCHITECTURES)}
    return sorted(
        filter(None, found), key=lambda run: (run.name.count("/"), order.get(run.arch, len(order)), run.seed, run.name)
    )


def open_bench(options: Common, out: Path, archs: Sequence[str], settings: dict[str, Any], console: Console) -> Bench:
    """Read the data, measure the device's two rates, and open the folder. InputError for one of other data or hardware."""
    device = choose_device(options.device)
    set_up_process(device, deterministic=True)
    data = load_splits(
        options.data, device, limit_train=options.limit_train, limit_test=options.limit_test, val_fraction=0.0, seed=0,
        verify=True,
    )  # fmt: skip
    warn_synthetic(console, data.manifest.synthetic, data.manifest.name)
    now = environment(device)
    manifest, sha256 = data.manifest, dict(zip(("train", "test"), data.sha256, strict=True))
    about = {"name": manifest.name, "official": manifest.official, "synthetic": manifest.synthetic, "sha256": sha256}
    before = read_results(out)[1] if (out / "results.json").exists() else Results(now, about, {})
    for name, then, found in (
        ("hardware", before.environment["hardware"], now["hardware"]),
        ("torch", before.environment["versions"]["torch"], now["versions"]["torch"]),
        ("data", before.data, about),
    ):
        if then != found:
            raise InputError(f"{out} was begun with other {name} ({then} before, {found} now): choose another --out")
    rates = asdict(measure_rates(device))
    for name, rate in before.environment.get("rates", {}).items():
        rates[name] = max(rates[name], rate)  # a ceiling is the most ever seen: at another time the machine may be busier
    facts = before.environment | {"rates": rates}
    for name in ("command", "commit"):  # a folder may be filled by several commands
        known = [*(before.environment.get(name) or "").split(" && "), now[name]]
        facts[name] = " && ".join(dict.fromkeys(filter(None, known))) or None
    shown = {variant.arch for variant in before.variants} | set(archs)
    ceilings = {arch: cost_of_arch(arch).images_per_second(Rates(**rates)) for arch in shown}
    variants = [
        Variant(arch, row.report, row.parameters, training_flops(arch), reported(arch).claim, ceilings[arch])
        for arch, row in ARCHITECTURES.items()
        if arch in shown
    ]
    results = replace(before, environment=facts, settings=before.settings | settings, variants=variants)
    return Bench(out, device, data, results, console, options.data, options.on)


def training(
    options: Common, out: Path, name: str, arch: str, seed: int, device: torch.device, flags: Sequence[str] = ()
) -> Job:
    """One training; `flags` are its own, which count instead of those given to all. Raises InputError for what it refuses."""
    given = split_flags(options.flags)
    require_free(given, "--epochs")
    own = [*given, *flags]
    require_free(own, *OWN_FLAGS, "--device")
    job = Job(out / "runs", name, latest((
        "--arch", arch,
        "--seed", str(seed), "--epochs", str(options.epochs), "--data", str(options.data.resolve()),
        "--device", device.type, "--limit-train", str(options.limit_train), "--limit-test", str(options.limit_test),
        "--max-parameters", "0", "--no-plots", "--plan", "default",  # which is the same in every run
        "--held-out", "0",  # every variant trains on all images and is measured on the test set after each epoch
        *(("--batch-size", str(options.batch_size)) if options.batch_size else ()), *own,
    )))  # fmt: skip
    assert job.command.run.seed == seed  # its flags are checked before anything is trained
    return job


def require_free(flags: Sequence[str], *own: str) -> None:
    """Raise InputError for flags of training that a benchmark sets itself."""
    for name in (flag.split("=")[0].replace("_", "-") for flag in flags):
        if name in own:
            raise InputError(f"{name} is the benchmark's to set: give it to the benchmark itself")


def main() -> None:
    """Parse, plan, measure."""
    default = QUICK if "--quick" in sys.argv[1:] else Options()
    options = parse_arguments(Options, PROGRAM, current_names(sys.argv[1:]), default=default, repeatable="--baseline")
    out = options.out or Path("runs") / ("bench-quick" if options.quick else "bench")
    with resumable(out):
        finish(out, measure(options, out, new_console()))


def new_console() -> Console:
    return Console(soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Ctrl-C says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is in {out}; the same command goes on") from None


def finish(out: Path, failures: list[str]) -> None:
    """The last lines, and exit code 1 when something failed."""
    print(f"results and report: {out}")
    if failures:
        print(f"{len(failures)} failed ({', '.join(failures)}), see above; the same command tries them again")
        sys.exit(1)


def current_names(arguments: list[str]) -> list[str]:
    """The command line in today's names, with a line on standard error for each that was renamed."""
    old = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--levers", "--peer-images"):
        old.add_argument(flag, nargs="*")
    dropped, current = old.parse_known_args(arguments)
    for place, argument in enumerate(current):
        name, equals, value = argument.partition("=")
        if name in RENAMED:
            print(f"{name} is now {RENAMED[name]}", file=sys.stderr)
            current[place] = RENAMED[name] + equals + value
    if dropped.peer_images is not None:
        print("--peer-images is gone: an outside script states how many images it trained on", file=sys.stderr)
    if dropped.levers is not None:
        for name in dropped.levers:
            if name not in LEVERS:
                raise unknown("lever", name, LEVERS)
        bf16, compiled, kernels = (name in dropped.levers for name in ("bf16", "compile", "kernels"))
        flags = f"--flags=--precision {'bf16' if bf16 else 'fp32'} {'--compile' if compiled else '--no-compile'}"
        current.append(f"{flags} --kernels {'auto' if kernels else 'torch'}")
        print(f"--levers is now {shlex.quote(current[-1])}", file=sys.stderr)
    return current


def measure(options: Options, out: Path, console: Console) -> list[str]:
    """Do all that is not done or failed before; return what failed now."""
    from bench import baselines, outside  # here, since --help needs no FFCV

    scripts = outside.outside_scripts(options.baseline)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    settings["target_top1"] = round(options.target / 100, 6)
    bench = open_bench(options, out, (*options.archs, options.baseline_arch), settings, console)
    archs = list(dict.fromkeys(options.archs))
    groups = {
        arch: [training(options, out, f"{arch}-seed{seed}", arch, seed, bench.device) for seed in dict.fromkeys(options.seeds)]
        for arch in archs
    }
    jobs = list(chain.from_iterable(groups.values()))
    bench.show_plan(groups, "arch", options.flags)
    for name in KINDS:
        state = "not wanted" if not getattr(options, name) else "done" if getattr(bench.results, name) else "to be timed"
        console.print(f"{name}: {state}, {options.rounds} rounds")
    bench.save()

    recipe = reported(options.baseline_arch).recipe
    recipe = replace(recipe, batch_size=options.batch_size or recipe.batch_size)
    steps = min(options.steps or (50 if bench.device.type == "cuda" else 4), steps_per_epoch(bench.data, recipe.batch_size))
    task = baselines.Task(options.baseline_arch, recipe, bench.data, options.data, steps)
    timed = {"arch": task.arch, "batch_size": recipe.batch_size, "steps": steps, "rounds": options.rounds}
    # Compiling for a CPU takes a minute and gains nothing there (LOG.md): not in the small version.
    left_out = ["compile"] if options.quick and bench.device.type == "cpu" else []

    failed: list[str] = []
    if options.speeds:
        before = bench.results.speeds.settings["archs"] if bench.results.speeds else []  # a command for fewer drops none
        archs = [arch for arch in ARCHITECTURES if arch in (*archs, *before)]
        size = {"images": steps * (options.batch_size or 256), "batch_size": options.batch_size}
        given = {"archs": archs, "rounds": options.rounds, **size, "flags": options.flags}
        failed += compare(bench, "speeds", given, lambda: baselines.architectures(
            archs, options.data, **size, device=bench.device, options=jobs[0].command.run
        ))  # fmt: skip
    failed += bench.train(jobs)
    if options.optimizations:
        failed += compare(bench, "optimizations", timed | {"left_out": left_out}, lambda: baselines.ladder(task, left_out))
    if options.baselines:
        failed += compare(bench, "baselines", timed, lambda: baselines.baselines(task))
    for name, script in scripts.items():
        failed += run_outside(bench, name, partial(
            outside.run_script, name, script, task, epochs=options.epochs, logs=out / "scripts", target=options.target / 100,
            hours=options.baseline_hours,
        ))  # fmt: skip
    return failed


def compare(bench: Bench, what: str, settings: dict[str, Any], loops: Callable[[], list[Any]]) -> list[str]:
    """Time loops in turns, unless that is done with these settings and nothing failed; return what failed.

    Outside scripts, which take no turns, keep what they have.
    """
    from bench import baselines

    known: Comparison = getattr(bench.results, what) or Comparison({})
    timings = [timing for timing in known.timings if timing.in_turns]
    if not timings or known.settings != settings or any(timing.failed for timing in timings):
        bench.results.environment["load"][f"before the {what}"] = load()
        timings = baselines.time_loops(loops(), rounds=settings["rounds"], kind=KINDS[what], say=bench.console.print)
        bench.save(**{what: Comparison(settings, [*timings, *(timing for timing in known.timings if not timing.in_turns)])})
    return [f"{what}: {timing.name}" for timing in timings if timing.failed]


def run_outside(bench: Bench, name: str, run: Callable[[], Any]) -> list[str]:
    """Run an outside script, unless it has a rate already; its failure is its own: nothing else is timed or trained again."""
    baselines = bench.results.baselines or Comparison({})
    known = {timing.name: timing for timing in baselines.timings}
    if name not in known or known[name].failed:
        known[name] = run()
        bench.console.print(f"baseline {name}: {known[name].error or f'{median(known[name].images_per_second):,.0f} img/s'}")
        bench.save(baselines=replace(baselines, timings=list(known.values())))
    return [f"baselines: {name}"] if known[name].failed else []


if __name__ == "__main__":
    run_command(main)
