"""Measure on this machine which plan trains fastest, and keep the answer for runs to come.

python -m fastcifar.tune --archs se_resnet18 mish_se_resnet18 --seconds 600
python -m fastcifar.tune --archs se_resnet18 --batch-size 512 --out plans.json    # then: fastcifar.train --plan plans.json

Plans take turns in training a network that is thrown away, on the run's own images; after each stage the slower half goes. A
plan replaces the default only where the interval of the ratio of their times says that it is faster.
"""

import gc
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from fastcifar.arguments import parse_arguments
from fastcifar.command import Command, load_data
from fastcifar.dataset import Splits
from fastcifar.device import choose_device, generator_states, set_generators, set_up_process, synchronise
from fastcifar.errors import is_out_of_memory, require, run_command, shortened
from fastcifar.evaluate import warn_synthetic
from fastcifar.files import write_json
from fastcifar.models import ARCHITECTURES, architecture
from fastcifar.models.layers import form_of
from fastcifar.optimization import epoch_momenta
from fastcifar.plan import FORMAT, Choice, Plan, Say, cache_path, candidates, decided, default_choice, keep, record_of
from fastcifar.recipes import RunOptions, reported
from fastcifar.state import build_state, build_step

# What a plan's first step changes in the weights is compared with PyTorch's operations, uncompiled, in float32. Its error may
# be TOLERANCE times that of these operations in the run's own precision, or LEAST.
TOLERANCE, LEAST = 2.0, 0.01
ROUNDS, FINAL = 3, 8  # turns of each plan in a stage, and of the last two
CONFIDENCE = 0.95
TURN, MOST = 0.05, 20  # seconds of a turn at least, since a GPU's host waits once a turn; steps of a turn at most
COMPILING = {"cpu": 60.0, "cuda": 40.0}  # seconds that the first compiled plan is taken to need
# What a single kind of tail may change to after the plans; the other kinds have no fusable form.
FORMS = {"cuda": ("torch", "triton", "fusable"), "cpu": ("auto", "fusable")}


class Trial:
    """A plan that trains a network of its own, from the run's first weights on. Raises whatever its first steps do.

    threads: where the plan leaves them open.
    """

    def __init__(self, name: str, command: Command, plan: Plan, data: Splits, device: torch.device, threads: int) -> None:
        self.name, self.plan, self.device, self.recipe = name, plan, device, command.settings
        self.seconds: list[float] = []  # of a step, turn by turn
        self.steps, self.threads = len(data.train) // self.recipe.batch_size, plan.threads or threads
        torch.set_num_threads(self.threads)
        run = replace(command.run, **vars(plan))
        state = build_state(command.arch, self.recipe, run, data, device)
        parameters = list(state.model.parameters())
        before = flat(parameters)
        self.step = build_step(state, self.recipe, run, data, say=lambda _: None)
        self._begin()
        self.turn(1)
        self.update = flat(parameters) - before  # what the first step changed

    def _begin(self) -> None:
        schedule, momentum = self.recipe.schedule, self.recipe.momentum
        momenta = epoch_momenta(schedule, momentum, 0, self.steps, self.recipe.epochs)
        self.step.begin(0, [0.1 * schedule.peak_lr] * self.steps, momenta=momenta)

    def turn(self, steps: int) -> float:
        """Train some steps; note and return the seconds of one."""
        torch.set_num_threads(self.threads)
        steps = min(steps, self.steps)
        if self.step.number + steps > self.steps:
            self._begin()
        synchronise(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronise(self.device)
        self.seconds.append((time.perf_counter() - began) / steps)
        return self.seconds[-1]


class Kinds(dict[str, Any]):
    """PyTorch's operations as kernels, which note for which kinds of operation they are asked."""

    def __init__(self) -> None:
        super().__init__({"augment": "auto", "*": "torch"})
        self.asked: dict[str, None] = {}

    def get(self, kind: str, default: Any = None) -> Any:
        if kind != "*":
            self.asked[kind] = None
        return super().get(kind, default)


@dataclass(frozen=True)
class Reference:
    """What PyTorch's operations make of the first step, uncompiled."""

    update: Tensor  # what it changes in the weights, in float32
    tolerance: float  # how far from it a plan may be, of its norm
    kinds: tuple[str, ...]  # of operation that the network has


@dataclass
class Tuning:
    """The measuring of plans for one command, until its seconds are used up."""

    command: Command
    data: Splits
    device: torch.device
    seconds: float
    say: Say
    rows: list[dict[str, Any]] = field(default_factory=list)  # the table
    threads: int = field(default_factory=torch.get_num_threads)
    began: float = field(default_factory=time.perf_counter)
    turn_steps: int = 1

    def __post_init__(self) -> None:
        self.preparing = {True: 0.0, False: 0.0}  # the most seconds a plan has needed, compiled or not
        # Dropout and stochastic depth off: a compiler draws them otherwise, which changes a step as much as an error would.
        quiet = replace(self.command.settings, block_dropout=0.0, head_dropout=0.0, stochastic_depth=0.0)
        self.quiet = replace(self.command, settings=quiet)

    def left(self) -> float:
        """Seconds, negative when they are used up."""
        return self.seconds - (time.perf_counter() - self.began)

    def best(self, plans: dict[str, Plan]) -> tuple[str, Plan]:
        """The fastest of `plans`, or the first, their default, where none is shown to be faster."""
        default, *_ = plans.items()
        trials = [trial for name, plan in plans.items() if (trial := self.prepared(name, plan)) is not None]
        if not trials or trials[0].name != default[0]:
            return default
        self.turn_steps = max(1, min(MOST, math.ceil(TURN / min(trial.seconds[-1] for trial in trials))))
        while (winner := self.fastest(trials)) is not trials[0] and not self.approved(winner):
            trials.remove(winner)
        self.rows = [row_of(trial, trials[0]) for trial in trials] + self.rows
        of_default = 1.0 if winner is trials[0] else median(ratios(winner, trials[0]))
        del trials  # their memory serves the next
        winner = self.refined(winner, of_default)
        return winner.name, winner.plan

    @cached_property
    def reference(self) -> Reference | None:
        """Trained when the first plan is about to be taken; None, with a line, where PyTorch itself cannot."""
        try:
            return self._train_reference()
        except Exception as error:
            self.say(f"plans cannot be checked, so none is taken: {why(error)}")
            return None

    def _train_reference(self) -> Reference:
        kinds = Kinds()
        plan = Plan(kernels=kinds, capture="off")
        exact = replace(self.quiet, run=replace(self.command.run, precision="fp32"))
        update = Trial("in float32", exact, plan, self.data, self.device, self.threads).update
        eager = Trial("reference", self.quiet, plan, self.data, self.device, self.threads).update
        return Reference(update, max(LEAST, TOLERANCE * distance(eager, update)), tuple(kinds.asked))

    def prepared(self, name: str, plan: Plan) -> Trial | None:
        """A plan after its first steps; None, with a line, where it fails, and without one where no time is left for it."""
        expected = self.preparing[plan.compile] or (COMPILING[self.device.type] if plan.compile else 0.0)
        if self.left() < expected:
            self.rows.append({"plan": name, "note": "no time left for it"})
            return None
        began, trial = time.perf_counter(), None
        try:
            trial = Trial(name, self.command, plan, self.data, self.device, self.threads)
            trial.turn(1)
        except Exception as error:  # whatever a compiler or a driver raises
            trial = None
            self.leave_out(name, why(error))
        self.preparing[plan.compile] = max(self.preparing[plan.compile], time.perf_counter() - began)
        return trial

    def approved(self, trial: Trial) -> bool:
        """Whether a plan computes what PyTorch does; a line says why not."""
        if self.reference is None:
            return False
        try:
            if self.quiet != self.command:
                trial = Trial(trial.name, self.quiet, trial.plan, self.data, self.device, self.threads)
            apart = distance(trial.update, self.reference.update)
        except Exception as error:
            self.leave_out(trial.name, why(error))
            return False
        allowed = self.reference.tolerance
        if not apart <= allowed:  # NaN is not
            self.leave_out(trial.name, f"a step's error is {apart:.1%} of what it changes, {allowed:.1%} are allowed")
        return apart <= allowed

    def leave_out(self, name: str, reason: str) -> None:
        """Say and note that a plan is none."""
        self.say(f"plan {name} is left out: {reason}")
        self.rows.append({"plan": name, "note": f"left out: {reason}"})
        release(self.device)

    def fastest(self, trials: Sequence[Trial]) -> Trial:
        """Successive halving: the first, unless the last of the others is shown to be faster than it."""
        default, *others = trials
        for trial in trials:
            trial.seconds.clear()
        while others:
            rounds = FINAL if len(others) == 1 else ROUNDS
            for turn in range(rounds):
                alive = [default, *others]
                for trial in alive[turn % len(alive) :] + alive[: turn % len(alive)]:
                    if self.left() < 0:
                        return default
                    trial.turn(self.turn_steps)
            others.sort(key=lambda trial: median(ratios(trial, default)[-rounds:]))
            if len(others) == 1:
                bounds = interval(ratios(others[0], default)[-rounds:])
                return others[0] if bounds is not None and bounds[1] < 1 else default
            others = others[: (len(others) + 1) // 2]
        return default

    def refined(self, winner: Trial, of_default: float) -> Trial:
        """The winner with what changing one kind of operation, or leaving the capture out, is shown to gain."""
        for change in self.changes(winner.plan):
            values = winner.plan.kernels if isinstance(winner.plan.kernels, dict) else {"*": winner.plan.kernels}
            ((what, value),) = change.items()
            plan = replace(winner.plan, **(change if what == "capture" else {"kernels": values | change}))
            trial = self.prepared(f"{winner.name}, {what}: {value}", plan)
            if trial is None:
                continue
            faster = self.fastest([winner, trial]) is trial
            row = row_of(trial, winner)
            share = row["of_default"] = None if row["of_default"] is None else row["of_default"] * of_default
            self.rows.append(row)
            if faster and share is not None and self.approved(trial):
                winner, of_default = trial, share
        return winner

    def changes(self, plan: Plan) -> Iterator[dict[str, str]]:
        """{kind: another form} of each kind of operation that the network has, then {"capture": "off"}."""
        others = [form for form in FORMS[self.device.type] if form != plan.kernels and (form != "fusable" or plan.compile)]
        reference = self.reference if others and self.command.run.kernels == "auto" else None
        for kind in reference.kinds if reference is not None else ():
            is_tail = kind.startswith("residual_tail")
            for form in others if is_tail or self.device.type == "cuda" else ():
                if form != form_of(plan.kernels, kind) and (form != "fusable" or is_tail):
                    yield {kind: form}
        if self.device.type == "cuda" and plan.capture == "auto":
            yield {"capture": "off"}


def measured(command: Command, choice: Choice, data: Splits, device: torch.device, console: Console) -> Choice:
    """Measure plans for `choice.seconds`, keep and show what came of it; the process is left as it was.

    A plan that has begun to compile is finished, so a little more time may go by.
    """
    plans = candidates(command.run, device, choice.run.threads)
    console.print(f"measuring {len(plans)} plans for {choice.seconds:.0f} seconds at most")
    with untouched(device), recompiling() if any(plan.compile for plan in plans.values()) else nullcontext():
        tuning = Tuning(command, data, device, choice.seconds, console.print)
        name, plan = tuning.best(plans)
    console.print(table_of(command, tuning.rows, name))
    record = record_of(name, "measured", plan, device) | {"key": choice.record["key"], "timings": tuning.rows}
    if any("ms" in row for row in tuning.rows):
        keep(record, console.print)
    return decided(command.run, record, device)


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Leave generators, number of threads, compiler and memory as they were."""
    states, threads = generator_states(device), torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        set_generators(states, device)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # the run's own compile finds Inductor's cache on the disk
        release(device)


@contextmanager
def recompiling() -> Iterator[None]:
    """Let one function be compiled for many plans: PyTorch would run it uncompiled from the ninth on."""
    import torch._dynamo.config as dynamo  # here, since importing the compiler takes a second

    with dynamo.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
        yield


def release(device: torch.device) -> None:
    """Give memory back that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def flat(parameters: Sequence[Tensor]) -> Tensor:
    """All weights in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def distance(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm of `other`; 0 for two zeros."""
    apart, size = (one - other).norm().item(), other.norm().item()
    return apart / size if size else math.inf if apart else 0.0


def ratios(trial: Trial, default: Trial) -> list[float]:
    """Of their seconds, turn by turn, in the turns that both took."""
    return [a / b for a, b in zip(trial.seconds, default.seconds, strict=False)]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Of the median, by order statistics, which suppose nothing of the distribution; None for fewer than six values.

    The median lies outside the k-th smallest and k-th largest of n with probability 2 sum_{i<k} C(n, i) / 2^n.
    """
    n, outside, k = len(values), 0.0, 0
    while k < n and outside + 2 * math.comb(n, k) / 2**n <= 1 - CONFIDENCE:
        outside += 2 * math.comb(n, k) / 2**n
        k += 1
    ordered = sorted(values)
    return (ordered[k - 1], ordered[n - k]) if k else None


def row_of(trial: Trial, default: Trial) -> dict[str, Any]:
    """A line of the table: milliseconds of a step, with their interval, and over the default's."""
    seconds, shares = trial.seconds, ratios(trial, default)
    bounds = interval(seconds)
    return {
        "plan": trial.name,
        "ms": 1e3 * median(seconds) if seconds else None,
        "interval_ms": [1e3 * bound for bound in bounds] if bounds else None,
        "of_default": median(shares) if shares else None,
        "turns": len(seconds),
    }


def table_of(command: Command, rows: list[dict[str, Any]], winner: str) -> Table:
    """What was measured, for people."""
    right = (Column(head, justify="right", no_wrap=True) for head in ("ms a step", "95 % interval", "of default", "turns"))
    title = f"plans for {command.arch}, batch {command.settings.batch_size}: {winner} is taken"
    table = Table(Column("plan"), *right, Column(""), title=title, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        ms, bounds, share = row.get("ms"), row.get("interval_ms"), row.get("of_default")
        table.add_row(
            row["plan"], f"{ms:.2f}" if ms else "-", f"{bounds[0]:.2f} to {bounds[1]:.2f}" if bounds else "-",
            f"{share:.3f}" if share else "-", str(row.get("turns", "-")), row.get("note", ""),
        )  # fmt: skip
    return table


def why(error: BaseException) -> str:
    """An error in a line."""
    if is_out_of_memory(error):
        return "out of memory"
    return shortened(f"{type(error).__name__}: {(str(error).strip() or 'nothing said').splitlines()[0]}", 200)


@dataclass(frozen=True)
class Options:
    """Measure the plans of architectures, each by its own recipe, for runs on this machine to come."""

    archs: tuple[str, ...] = tuple(ARCHITECTURES)  # architectures; `python -m fastcifar.models` lists them
    batch_size: int = 0  # images per step, 0 = each recipe's own
    seconds: float = 600.0  # to measure each architecture in, at most
    data: Path = Path("data/beton")  # folder with train.beton and test.beton
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the device computes in it
    out: Path | None = None  # JSON to write, for `fastcifar.train --plan`

    def __post_init__(self) -> None:
        for arch in self.archs:
            architecture(arch)
        require(self, bool(self.archs), "archs", "at least one")
        require(self, self.batch_size == 0 or self.batch_size >= 2, "batch_size", "0 or at least 2")
        require(self, self.seconds > 0, "seconds", "above 0")

    def command(self, arch: str) -> Command:
        """The training whose plans are measured."""
        recipe = reported(arch).recipe
        recipe = replace(recipe, batch_size=self.batch_size or recipe.batch_size)
        run = RunOptions(data=self.data, device=self.device, precision=self.precision, max_parameters=0)
        return Command(arch, None, recipe, run)


def main() -> None:
    """Measure, print, keep."""
    options = parse_arguments(Options, "python -m fastcifar.tune")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    device = choose_device(options.device)
    records: dict[str, Any] = {}
    for arch in dict.fromkeys(options.archs):
        command = options.command(arch)
        set_up_process(device, deterministic=command.run.deterministic)
        data = load_data(command, device)
        warn_synthetic(console, data.manifest.synthetic, data.manifest.name)
        choice = replace(default_choice(command, device, console.print, data.train.size), seconds=options.seconds)
        records[arch] = measured(command, choice, data, device, console).record
        if options.out is not None:  # after each: the next takes minutes
            write_json(options.out, {"format": FORMAT, "plans": records})
    console.print(f"kept: {cache_path()}{f'; {options.out}' if options.out else ''}")


if __name__ == "__main__":
    run_command(main)
