"""Plans: who chooses how a step runs, where that is kept, and that measuring it changes nothing else."""

import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console

from bench import counting_device
from bench.step_cost import FORMS
from fastcifar import plan as plans
from fastcifar import tune
from fastcifar.checkpoint import load_checkpoint
from fastcifar.command import parse_command
from fastcifar.files import read_json, write_json
from fastcifar.models import ARCHITECTURES
from fastcifar.plan import PLANS, Plan, cache_path, candidates, choose, keep, read_cached, record_of
from fastcifar.recipes import PLANNED, RunOptions, given, run_options_from_dict, to_dict
from fastcifar.train import main, train
from tests.conftest import run_cli

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = ("--arch", "narrow", "--recipe", "se_resnet18", "--limit-train", "32", "--limit-test", "10", "--batch-size", "8")
TWO = {"eager": Plan(), "torch": Plan(kernels="torch")}  # which compile nothing


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Nothing is read from this machine's plans, or written there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    row = replace(ARCHITECTURES["se_resnet18"], widths=(4, 8, 8, 16), blocks=(1, 1, 1, 1))
    monkeypatch.setitem(ARCHITECTURES, "narrow", row)


@pytest.fixture
def lines():
    return []


def chosen(lines, *arguments, images=50_000, size=(32, 32)):
    return choose(parse_command(list(arguments)), images, CPU, lines.append, size=size)


def record(name="eager", **key):
    return record_of(name, "measured", PLANS["cpu"][name], CPU) | {"key": key}


# Which plans there are


def test_a_plan_has_the_options_that_it_decides():
    assert tuple(field.name for field in fields(Plan)) == PLANNED
    assert FORMS["combo"] == {"kernels": "torch", "compile": True, "compile_mode": "combo", "capture": "off", "threads": 0}


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ({}, list(PLANS["cuda"])),
        ({"kernels": "triton"}, ["triton", "triton-tuned"]),
        ({"compile": False}, ["eager"]),
        ({"compile": True, "compile_mode": "tuned"}, ["tuned", "fusable-tuned", "triton-tuned"]),
        ({"compile": False, "kernels": "triton"}, ["as given"]),
        ({"capture": "off"}, list(PLANS["cuda"])),
    ],
)
def test_what_the_user_says_is_in_every_candidate(said, names):
    found = candidates(RunOptions(**said), CUDA)
    assert list(found) == names
    assert all(asdict(plan) | said == asdict(plan) for plan in found.values())


def test_the_command_line_tells_what_is_given():
    asked = ([], ["--compile"], ["--no-compile"], ["--kernels", "residual_tail/relu", "fusable", "*", "torch", "--compile"])
    kinds = {"compile": True, "kernels": {"residual_tail/relu": "fusable", "*": "torch"}}
    expected = [{}, {"compile": True}, {"compile": False}, kinds]
    assert [given(parse_command(arguments).run) for arguments in asked] == expected


def test_threads_are_candidates_only_where_they_are_left_open(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    names = list(candidates(RunOptions(), CPU, threads=5))
    assert names[:4] == ["eager", "eager, threads: 1", "eager, threads: 2", "eager, threads: 4"]
    assert {plan.threads for plan in candidates(RunOptions(threads=3), CPU, threads=5).values()} == {3}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert set(candidates(RunOptions(), CPU)) == set(PLANS["cpu"])


def test_under_load_threads_are_limited_to_idle_cores(monkeypatch, lines):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (6.0, 1.0, 1.0))
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 75.0)
    assert chosen(lines, "--epochs", "1", images=10).run.threads == 2
    assert re.match("threads limited to 2 of 8", lines.pop())
    for left_alone in (("--threads", "4"), ("--plan", "default")):
        assert chosen(lines, *left_alone).run.threads == int(left_alone[1].replace("default", "0"))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 1.0, 1.0))
    assert chosen(lines).run.threads == 0
    assert not lines


# When it is measured


def test_a_short_run_takes_the_default_at_once_and_a_long_one_a_share_of_its_time(lines):
    short = chosen(lines, "--epochs", "1", images=5_000)
    assert (short.seconds, short.record["chosen"], short.run.compile) == (0, "default", False)
    assert 5 < chosen(lines, "--epochs", "3").seconds < 60
    assert chosen(lines).seconds == 60
    assert chosen(lines, "--plan-seconds", "7", images=100).seconds == 7
    assert chosen(lines, "--plan-seconds", "0").seconds == 0
    assert not lines


def test_a_kept_plan_is_taken_at_once_where_everything_it_was_measured_for_is_the_same(lines):
    key = chosen(lines).record["key"]
    keep(record("fusable", **key), lines.append)
    again = chosen(lines)
    assert (again.seconds, again.record["chosen"]) == (0, "cached")
    assert (again.run.compile, again.run.kernels) == (True, "fusable")
    assert lines == [f"plan fusable, measured before ({cache_path()})"]
    for other in (
        ("--batch-size", "64"),
        ("--precision", "fp32"),
        ("--kernels", "torch"),
        ("--cutout", "0"),
        ("--threads", "1"),
    ):
        assert chosen(lines, *other).record["chosen"] == "default", other
    assert chosen(lines, "--cutout", "8", "--peak-lr", "0.2").record["chosen"] == "cached"  # the same operations


def test_a_plan_holds_for_images_of_its_size_and_a_network_of_its_stride(lines):
    cifars = chosen(lines).record["key"]
    assert not {"size", "stem_stride"} & cifars.keys()  # as before other sizes came, so that what was kept then is found
    keep(record("fusable", **cifars), lines.append)
    assert chosen(lines).record["chosen"] == "cached"
    others = [((64, 64), ()), ((96, 64), ()), ((64, 64), ("--stem-stride", "4")), ((32, 32), ("--stem-stride", "2"))]
    for size, options in others:
        fresh = chosen(lines, *options, size=size)
        assert fresh.record["chosen"] == "default", (size, options)
        keep(record("numba", **fresh.record["key"]), lines.append)
        assert chosen(lines, *options, size=size).run.kernels == "numba"
    assert chosen(lines).run.kernels == "fusable"


def test_larger_images_take_longer(lines):
    seconds = [chosen(lines, "--epochs", "3", size=size).seconds for size in ((32, 32), (40, 40))]
    assert seconds[1] == pytest.approx(seconds[0] * 25 / 16, rel=0.01)


def test_auto_leaves_the_measuring_alone_until_it_is_wanted(lines, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastcifar.tune")
    chosen(lines)
    assert "fastcifar.tune" not in sys.modules


# Where it is kept


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "utf-8"),
        (b"[]", "list indices"),
        (b"{}", "format"),
        (b'{"format": 99, "plans": {}}', "format 99, not 1"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_foreign_or_corrupt_file_is_ignored_with_a_line_and_rewritten_whole(lines, content, why):
    cache_path().parent.mkdir(parents=True)
    cache_path().write_bytes(content)
    assert read_cached({"a": 1}, lines.append) is None
    assert len(lines) == 1
    assert lines[0].startswith(f"{cache_path()} is ignored: ")
    assert why in lines[0]
    keep(record(a=1), lines.append)
    assert read_cached({"a": 1}, lambda line: pytest.fail(line)) == record(a=1)


@pytest.mark.parametrize("change", [{"plan": {}, "key": {}}, {"plan": {"warp": 1}}, {"name": 3}, {"plan": {"kernels": "x"}}])
def test_a_damaged_record_is_ignored_with_a_line(lines, change):
    keep(record() | change | {"key": {}}, lines.append)
    if change["plan" if "plan" in change else "name"]:
        assert read_cached({}, lines.append) is None
        assert re.search("is ignored: damaged", lines.pop())


def test_all_that_is_kept_at_the_same_time_is_there(lines):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: keep(record(number=number), lines.append), range(24)))
    assert not lines
    assert len(read_json(cache_path(), "")["plans"]) == 24
    assert [path.name for path in cache_path().parent.iterdir()] == ["plans.json"]


def test_where_nothing_can_be_kept_a_line_says_so(lines, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep(record(), lines.append)
    assert re.match("the measured plan is not kept: .*plans.json: Not a directory", lines.pop())


def test_a_plan_comes_from_a_file_of_tune_or_from_a_run(lines, tmp_path):
    kept, path = record("fusable"), tmp_path / "plan.json"
    for content in (kept, {"format": 1, "plans": {"se_resnet18": kept}}, {"run": {}, "plan": kept}):
        write_json(path, content)
        choice = chosen(lines, "--plan", str(path))
        assert (choice.run.kernels, choice.run.compile, choice.record["chosen"]) == ("fusable", True, "file")


REFUSED = {
    "unknown plan for cpu 'compild': did you mean compiled": ("--plan", "compild"),
    "plan_seconds must be 0 or more, got -1": ("--plan-seconds", "-1"),
    "plan fusable has kernels fusable, torch was given: leave one of the two out": ("--plan", "fusable", "--kernels", "torch"),
    r"threads must be 0\.\.\d+ on this machine, got 4096": ("--threads", "4096"),
    "threads must be 0 or more, got -2": ("--threads", "-2"),
    "--kernels 'trition' is not of the form": ("--kernels", "trition"),
    "unknown kind of kernel 'residual_tail/rule': did you mean residual_tail/relu": (
        "--kernels",
        "residual_tail/rule",
        "torch",
    ),
    r"nowhere\.json is missing": ("--plan", "nowhere.json"),
    r"plan\.json was chosen on a GPU, this is .*: leave --plan out": {"device": "a GPU"},
    "a plan of format 0, this version reads 1: measure again": {"format": 0},
    r"plan\.json holds no plan \(KeyError": {"plan": None, "format": None, "run": 1},
    r"plan\.json: no plan for se_resnet18": {"plans": {"resnet42": {}}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_are_one_line(betons, tmp_path, refused, message):
    given = REFUSED[message]
    if isinstance(given, dict):
        content = {name: value for name, value in (record() | given).items() if value is not None}
        (tmp_path / "plan.json").write_text(json.dumps(content))
        given = ("--plan", tmp_path / "plan.json")
    assert re.search(message, refused(main, "--data", betons, "--out", tmp_path / "run", *given))
    assert not (tmp_path / "run").exists()


def test_options_of_earlier_versions_are_read():
    values = to_dict(RunOptions())
    for name in ("plan", "plan_seconds", "threads"):
        del values[name]
    old = run_options_from_dict(values | {"compile": True, "compile_mode": "default"})
    assert (old.compile, old.kernels, old.threads) == (True, "auto", 0)


# How it is measured


@pytest.fixture
def quick(monkeypatch):
    """Two plans, of which the last is taken to be faster, after few turns."""
    monkeypatch.setitem(plans.PLANS, "cpu", TWO)
    monkeypatch.setitem(tune.FORMS, "cpu", ())
    monkeypatch.setattr(tune, "FINAL", 1)
    monkeypatch.setattr(tune, "interval", lambda values: (0.5, 0.9))


def assert_same_weights(*folders):
    one, other = (load_checkpoint(folder.last, CPU).model for folder in folders)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def trained(betons, out, *flags, epochs=1, lines=None):
    console = Console(file=SimpleNamespace(write=(lines if lines is not None else []).append, flush=lambda: None), width=200)
    options = ("--data", str(betons), "--out", str(out), "--no-plots", "--epochs", str(epochs))
    return train(parse_command([*SMALL, *options, *flags]), console)


def test_a_run_that_measured_ends_with_the_weights_of_its_plan_by_name(betons, tmp_path, quick):
    threads = torch.get_num_threads()
    auto = trained(betons, tmp_path / "auto", "--plan-seconds", "100", lines=(said := []))
    assert re.search(r"torch is taken", "".join(said))
    assert torch.get_num_threads() == threads
    config = read_json(auto.path / "config.json", "")
    assert (config["run"]["kernels"], config["run"]["compile"], config["plan"]["chosen"]) == ("torch", False, "measured")
    assert [row["plan"] for row in config["plan"]["timings"]] == ["eager", "torch"]
    named = trained(betons, tmp_path / "named", "--plan", "torch")
    filed = trained(betons, tmp_path / "filed", "--plan", str(auto.path / "config.json"))
    kept = trained(betons, tmp_path / "kept")
    assert read_json(kept.path / "config.json", "")["plan"]["chosen"] == "cached"
    for other in (named, filed, kept):
        assert_same_weights(auto, other)


@pytest.mark.slow
def test_a_resume_takes_the_recorded_plan(betons, tmp_path, monkeypatch):
    flags = ("--plan", "torch")
    monkeypatch.setitem(plans.PLANS, "cpu", TWO)
    whole = trained(betons, tmp_path / "whole", *flags, epochs=2)
    folder = trained(betons, tmp_path / "part", *flags, "--stop-after", "1", epochs=2)
    monkeypatch.setitem(plans.PLANS, "cpu", {"eager": Plan(compile=True)})  # of a later version
    command = parse_command(["--resume", str(folder.path)])
    assert (command.run.kernels, command.run.compile) == ("torch", False)
    train(command, Console(quiet=True))
    assert_same_weights(whole, folder)


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_plan_that_fails_is_left_out_with_a_line(betons, tmp_path, monkeypatch, quick, fault):
    monkeypatch.setitem(plans.PLANS, "cpu", {"eager": Plan(), "bad": Plan(kernels={"*": "torch"})})
    build = tune.build_step

    def faulty(state, recipe, run, data, **more):
        if run.kernels != {"*": "torch"}:
            return build(state, recipe, run, data, **more)
        if fault == "raises":
            raise RuntimeError("no kernel image\nis available")
        filters = [parameter for parameter in state.model.parameters() if parameter.ndim == 4]
        state.optimizer.register_step_pre_hook(lambda *_: [weight.grad.zero_() for weight in filters] and None)
        return build(state, recipe, run, data, **more)

    monkeypatch.setattr(tune, "build_step", faulty)
    folder = trained(betons, tmp_path / "run", "--plan-seconds", "100", lines=(said := []))
    text = "".join(said)
    expected = {"raises": "RuntimeError: no kernel image\n", "is wrong": r"a step's error is \d+.*% of what it changes"}
    assert re.search(f"plan bad is left out: {expected[fault]}", text), text
    rows = read_json(folder.path / "config.json", "")["plan"]["timings"]
    assert [row["plan"] for row in rows] == ["eager", "bad"]
    assert read_json(folder.path / "config.json", "")["plan"]["name"] == "eager"


def test_no_time_left_is_the_default(betons, tmp_path):
    folder = trained(betons, tmp_path / "run", "--plan-seconds", "1e-9")
    config = read_json(folder.path / "config.json", "")
    assert (config["plan"]["name"], config["plan"]["chosen"]) == ("eager", "measured")
    assert {row["note"] for row in config["plan"]["timings"]} == {"no time left for it"}
    assert not cache_path().exists()


def test_half_of_the_plans_go_after_each_stage_and_what_is_not_surely_faster_is_not_taken(monkeypatch):
    def trials(*milliseconds):
        made = [SimpleNamespace(name=str(number), seconds=[]) for number in range(len(milliseconds))]
        for trial, base in zip(made, milliseconds, strict=True):
            trial.turn = lambda steps, trial=trial, base=base: trial.seconds.append(
                base(len(trial.seconds)) if callable(base) else base
            )
        return made

    tuning = SimpleNamespace(left=lambda: 1.0, turn_steps=1)
    made = trials(10, 12, 9, 11, 8, 13)
    assert tune.Tuning.fastest(tuning, made) is made[4]
    turns = [len(trial.seconds) for trial in made]
    assert turns == [17, 3, 9, 6, 17, 3]
    noisy = trials(10, lambda turn: 5 if turn % 2 else 11)
    assert tune.Tuning.fastest(tuning, noisy) is noisy[0]
    tuning.left = lambda: -1.0
    assert tune.Tuning.fastest(tuning, made) is made[0]


def test_single_kinds_are_changed_after_the_plans():
    run, kinds = RunOptions(), ("augment", "residual_tail/relu", "squeeze_excite")
    tuning = SimpleNamespace(command=SimpleNamespace(run=run), device=CUDA, reference=SimpleNamespace(kinds=kinds))
    changes = list(tune.Tuning.changes(tuning, PLANS["cuda"]["compiled"]))
    expected = [{"augment": "triton"}, {"residual_tail/relu": "triton"}, {"residual_tail/relu": "fusable"}]
    assert changes == [*expected, {"squeeze_excite": "triton"}, {"capture": "off"}]
    tuning.command.run = RunOptions(kernels="triton", compile=True)
    assert list(tune.Tuning.changes(tuning, PLANS["cuda"]["triton"])) == [{"capture": "off"}]


def test_the_interval_of_a_median_is_that_of_the_sign_test():
    assert tune.interval([1.0] * 5) is None
    assert tune.interval([3, 1, 2, 8, 5, 4, 7, 6]) == (1, 8)
    assert tune.interval(list(range(1, 21))) == (6, 15)  # as in every table of it


@pytest.mark.slow
def test_tune_writes_a_file_that_a_run_takes(betons, tmp_path, quick, call):
    options = ("--archs", "se_resnet18", "--batch-size", "8", "--data", betons, "--out", tmp_path / "plans.json")
    assert "torch is taken" in call(tune.main, *options)
    own = ("--arch", "se_resnet18", "--limit-train", "32", "--limit-test", "10", "--batch-size", "8", "--epochs", "1")
    where = ("--data", str(betons), "--out", str(tmp_path / "run"), "--no-plots", "--plan", str(tmp_path / "plans.json"))
    folder = train(parse_command([*own, *where]), Console(quiet=True))
    assert read_json(folder.path / "config.json", "")["run"]["kernels"] == "torch"
    assert read_json(cache_path(), "")["format"] == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the counting device is built with g++")
def test_every_plan_of_a_gpu_is_compiled_captured_and_timed(tmp_path):
    """One network, since it takes minutes; `python -m bench.counting_device.plans ARCH OUT` does it for the others."""
    out = tmp_path / "plans.json"
    environment = counting_device.environment() | {"XDG_CACHE_HOME": str(tmp_path)}
    done = run_cli("-m", "bench.counting_device.plans", "se_resnet18", out, env=environment, timeout=3600)
    assert done.returncode == 0, done.stderr
    record = read_json(out, "")["record"]
    rows = {row["plan"]: row for row in record["timings"]}
    assert set(PLANS["cuda"]) < set(rows)  # and single kinds
    assert all(row.get("ms") and row["turns"] >= tune.ROUNDS for row in rows.values()), rows
    assert not any("not captured" in line for line in read_json(out, "")["lines"])
    assert record["name"] in rows
