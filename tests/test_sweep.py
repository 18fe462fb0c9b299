"""Sweeps: the grid, what is left of it, where settings are stopped, and what their seeds say together."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from rich.console import Console
from scipy import stats

from fastcifar.checkpoint import load_checkpoint
from fastcifar.command import parse_command
from fastcifar.device import choose_device
from fastcifar.errors import InputError
from fastcifar.launch import Event
from fastcifar.run_folder import environment_facts
from fastcifar.sweep import Options, Sweep, go_on, points_of, rows_of
from fastcifar.train import train
from tests.bench_results import write_run

QUIET = Console(quiet=True)
TINY = "--limit-train 64 --limit-test 20 --batch-size 32 --held-out 0 --kernels torch"


class MadeUp:
    """Workers that write run folders without training: `accuracy(job, epoch)` in 0..1, `fails` the names that fail."""

    def __init__(self, accuracy=lambda job, epoch: 0.5, fails=()):
        self.accuracy, self.fails, self.trained = accuracy, fails, []

    def events(self, jobs):
        while jobs:
            job = jobs.popleft()
            self.trained.append((job.name, job.stop_after))
            if job.name in self.fails:
                yield Event(job, ended=True, error="ended by SIGKILL (out of memory?)")
                continue
            epochs = job.stop_after or job.command.settings.epochs
            accuracy = self.accuracy(job, epochs)
            write_run(job.path, job.command, [1.0] * epochs, environment_facts(choose_device("cpu")), accuracy)
            yield Event(job, ended=True)


@pytest.fixture
def options(betons, tmp_path):
    return Options(
        archs=("se_resnet18", "resnet42"), seeds=(0, 1, 2), set=("peak_lr=0.05,0.1",), epochs=4, flags=TINY, data=betons,
        out=tmp_path / "sweep", plot=False,
    )  # fmt: skip


def swept(options, workers, monkeypatch):
    """The sweep after `workers` did what is left of it."""
    sweep = Sweep(options, points_of(options))
    monkeypatch.setattr("fastcifar.sweep.opened", lambda *_: nullcontext(workers))
    go_on(sweep, QUIET)
    return sweep


def test_a_grid_is_every_arch_with_every_setting_and_seed(options):
    points = points_of(replace(options, set=("peak_lr=0.05,0.1", "cutout=0,8")))
    assert len(points) == len({point.job.name for point in points}) == 2 * 4 * 3
    settings = points[-1].job.command
    assert (settings.arch, settings.settings.schedule.peak_lr, settings.settings.augmentation.cutout) == ("resnet42", 0.1, 8)
    assert (settings.run.seed, settings.settings.epochs, settings.run.limit_train) == (2, 4, 64)


def test_drawn_settings_are_the_same_every_time_and_others_with_another_seed(options):
    one = replace(options, archs=("se_resnet18",), seeds=(0,))
    grid = replace(one, set=("peak_lr=0.01,0.02,0.03,0.04,0.05", "cutout=0,2,4,6,8"), points=6)
    names = [[point.job.name for point in points_of(each)] for each in (grid, grid, replace(grid, points_seed=1))]
    assert names[0] == names[1] != names[2]
    assert len(names[0]) == 6


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"set": ("peak_lrr=1",)}, "did you mean --peak-lr"),
        ({"set": ("peak_lr=fast",)}, "--peak-lr 'fast' is not a number"),
        ({"set": ("peak_lr",)}, "--set takes FLAG=VALUE,VALUE"),
        ({"set": ("peak_lr=0.1,0.1",)}, "each value once"),
        ({"set": ("seed=1",)}, "--seed is the sweep's to set"),
        ({"flags": "--out x"}, "--out is the sweep's to set"),
        ({"flags": "--std '0.2"}, "no closing quotation: close the quotation"),
        ({"points": 3}, "more than the grid's 2 settings"),
        ({"set": ("epochs=2,4",), "seeds": (0,), "rungs": (2,)}, "rungs must be below the 2 epochs"),
        ({"flags": "--eval-every 2", "seeds": (0,), "rungs": (1,)}, r"rungs must be multiples of eval_every \(2\)"),
    ],
)
def test_mistakes_are_told_before_anything_trains(options, changes, told):
    with pytest.raises(InputError, match=told):
        points_of(replace(options, **changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seeds": (0, 0)}, "seeds must be one or more"),
        ({"archs": ("se_resnet19",)}, "did you mean se_resnet18"),
        ({"per_gpu": 0}, "per_gpu must be at least 1"),
        ({"rungs": (3, 2), "seeds": (0,)}, "rungs must be rising"),
        ({"rungs": (2,)}, "search with one seed"),
        ({"keep": 1.0}, "keep must be above 0, below 1"),
    ],
)
def test_options_out_of_range_are_told(options, changes, told):
    with pytest.raises(InputError, match=told):
        replace(options, **changes)


def test_seeds_of_a_setting_are_summed_up_as_scipy_does(options, monkeypatch):
    workers = MadeUp(lambda job, epoch: 0.5 + 0.01 * job.command.run.seed**2 + job.command.settings.schedule.peak_lr)
    sweep = swept(options, workers, monkeypatch)
    rows = {row["name"]: row for row in rows_of(sweep)}
    values = [0.55, 0.56, 0.59]
    row, half = rows["resnet42-peak_lr=0.05"], stats.t.ppf(0.975, 2) * stdev(values) / math.sqrt(3)
    assert (row["top1"], row["deviation"]) == pytest.approx((fmean(values), stdev(values)))
    assert (row["low"], row["high"]) == pytest.approx((fmean(values) - half, fmean(values) + half))
    saved = json.loads((options.out / "sweep.json").read_text())
    assert [row["name"] for row in saved["settings"]] == list(rows)
    assert (options.out / "sweep.csv").read_text().count("\n") == 5


def test_the_same_command_trains_only_what_is_left(options, monkeypatch):
    failing = "resnet42-peak_lr=0.1-seed2"
    first, second = MadeUp(fails=(failing,)), MadeUp()
    sweep = swept(options, first, monkeypatch)
    assert [point.told for point in sweep.points if point.state == "failed"] == ["ended by SIGKILL (out of memory?)"]
    sweep = swept(replace(options, seeds=(0, 1, 2, 3)), second, monkeypatch)
    assert {name for name, _ in second.trained} == {failing} | {point.job.name for point in sweep.points if point.seed == 3}
    assert {point.state for point in sweep.points} == {"done"}
    with pytest.raises(InputError, match="was begun with other settings"):
        swept(replace(options, epochs=5), MadeUp(), monkeypatch)


def test_at_a_rung_the_better_half_goes_on_and_the_others_stay_stopped(options, monkeypatch):
    search = replace(options, archs=("se_resnet18",), seeds=(0,), set=("peak_lr=0.04,0.03,0.02,0.01",), rungs=(1, 2))
    workers = MadeUp(lambda job, epoch: job.command.settings.schedule.peak_lr)
    sweep = swept(search, workers, monkeypatch)
    states = {point.setting["peak-lr"]: (point.state, point.epochs) for point in sweep.points}
    # Of the first none is known to be better, the second is not in the best half of two; then the best goes on, and so forth.
    assert states == {"0.04": ("done", 4), "0.03": ("stopped", 1), "0.02": ("stopped", 1), "0.01": ("stopped", 1)}
    assert workers.trained.count(("se_resnet18-peak_lr=0.04-seed0", 2)) == 1
    again = MadeUp()
    swept(search, again, monkeypatch)
    assert not again.trained


def test_a_folder_of_something_else_is_refused(options, monkeypatch):
    options.out.mkdir()
    (options.out / "sweep.json").write_text("[]")
    with pytest.raises(InputError, match=r"is not a sweep's: delete it"):
        swept(options, MadeUp(), monkeypatch)


@pytest.mark.slow
def test_a_point_is_the_run_that_training_makes_of_the_same_flags(options, tmp_path, monkeypatch):
    from fastcifar.launch import Alone

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = replace(options, archs=("se_resnet18",), seeds=(1,), set=("peak_lr=0.05",), epochs=1)
    sweep = swept(small, Alone(threads=1), monkeypatch)
    (point,) = sweep.points
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = train(parse_command([*point.job.flags, "--out", str(tmp_path / "alone")]), QUIET)
    finally:
        torch.set_num_threads(threads)
    weights = [load_checkpoint(path / "last.pt", choose_device("cpu")).model for path in (alone.path, point.job.path)]
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in weights), strict=True))
    assert point.accuracy == alone.read_summary()["final"]["top1"]
