"""Loops timed in turns: what works has every round, and what fails is one line."""

import json
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bench import baselines, input_pipelines
from bench.baselines import BASELINES, STEPS, Task, architectures, fastcifar_loop, ladder, take_turns, wall_clock, why_not
from fastcifar.dataset import epoch_order, load_splits
from fastcifar.errors import InputError
from fastcifar.recipes import RECIPES, RunOptions, reported
from fastcifar.state import build_state, build_step
from fastcifar.step import TrainStep
from tests.conftest import run_cli

CPU = torch.device("cpu")


def timed(loops, rounds=2, say=lambda line: None):
    return baselines.time_loops(loops, rounds=rounds, kind="kind", say=say)


@pytest.fixture(scope="module")
def task(betons):
    """One step of 8 images."""
    data = load_splits(betons, CPU, limit_train=64, limit_test=20, val_fraction=0.0, seed=0, verify=False)
    return Task("se_resnet18", replace(reported("se_resnet18").recipe, batch_size=8), data, betons, steps=1)


def breaking(turns):
    """A call that works for so many turns and raises then."""
    left = iter(range(turns))

    def call(*_, **__):
        if next(left, None) is None:
            raise RuntimeError("out of\nmemory")
        return 1.0

    return call


def test_turns_come_in_a_changing_order_and_one_that_fails_leaves_the_others_theirs():
    def told(**broken):
        called = []
        clocks = {name: lambda name=name: called.append(name) or 1.0 for name in "abcd"}
        seconds, errors = take_turns(clocks | broken, rounds=8, warmup=1)
        return called, {name: len(each) for name, each in seconds.items()}, list(errors)

    called, rounds, failed = told()
    turns = list(zip(*[iter(called)] * 4, strict=True))
    assert len(turns) == 9
    assert all(sorted(turn) == list("abcd") for turn in turns)
    assert len(set(turns)) > 1
    assert (rounds, failed) == (dict.fromkeys("abcd", 8), [])
    undisturbed = [name for name in called if name != "b"]
    assert told(b=breaking(2)) == (undisturbed, dict.fromkeys("acd", 8), ["b"])


def test_a_clock_tells_what_the_call_took():
    assert 0.02 <= wall_clock(lambda: time.sleep(0.02))() < 5


def test_the_ladder_times_every_step_in_turns_and_names_those_it_lacks(task, monkeypatch):
    built = []

    def broken_bf16(task, run, **form):
        built.append((run.precision, run.kernels, form["channels_last"]))
        if run.precision == "bf16":
            raise RuntimeError("no such\ninstruction")
        return fastcifar_loop(task, run, **form)

    monkeypatch.setattr(baselines, "fastcifar_loop", broken_bf16)
    timings = {timing.name: timing for timing in timed(ladder(task, {"compile"}))}
    assert list(timings) == list(STEPS)
    rounds = {name: len(timing.images_per_second) for name, timing in timings.items() if not timing.error}
    assert rounds == dict.fromkeys(("loader", "resident", "channels_last", "kernels"), 2)
    errors = {name: timing.error for name, timing in timings.items() if timing.error}
    assert errors == {
        "bf16": "RuntimeError: no such instruction" if not why_not("bf16", CPU) else f"not applicable: {why_not('bf16', CPU)}",
        "compile": "left out of this run",
        "tuned": "not applicable: the thresholds are made for a GPU's memory traffic",
        "captured": "not applicable: CUDA graphs need a GPU",
    }
    assert not any(timings[name].images_per_second for name in errors)
    assert built[-1] == ("fp32", "auto", True)  # the step that failed is not in those after it


def test_tuned_compiling_needs_compiling(task):
    with pytest.raises(InputError, match=r"needs torch\.compile"):
        baselines.stepped_loop(task, ["resident", "tuned"])


def test_without_channels_last_the_loop_trains_nchw(task, monkeypatch):
    formats = []

    class Seen(baselines.NchwStep):
        def loss(self, images, *rest):
            weight = self.model.stem[0].weight
            formats.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (images, weight))
            return super().loss(images, *rest)

    monkeypatch.setattr(baselines, "NchwStep", Seen)
    fastcifar_loop(task, RunOptions(kernels="torch", compile=False), channels_last=False)()
    assert formats == [False, False]


def test_a_loop_that_breaks_in_a_timed_round_is_a_line_and_the_others_have_all_rounds(task, monkeypatch):
    monkeypatch.setattr(baselines, "fastcifar_loop", lambda task, run, **form: lambda: None)
    monkeypatch.setattr(baselines, "ffcv_loop", lambda task: lambda: None)
    monkeypatch.setattr(baselines, "ordinary_loop", lambda task, built_in=False: breaking(3))  # ready, warm, one round
    said = []
    steps = timed(ladder(task), 4, said.append)
    assert said[-1] == "kind: eager fp32 NCHW, DataLoader: RuntimeError: out of memory"
    assert (steps[0].error, steps[0].images_per_second) == ("RuntimeError: out of memory", [])
    assert {len(timing.images_per_second) for timing in steps if not timing.error} == {4}
    timings = timed(baselines.baselines(task), 4)
    assert [timing.name for timing in timings] == list(BASELINES)
    assert [timing.error for timing in timings] == ["", *["RuntimeError: out of memory"] * 2, ""]
    assert [len(timing.images_per_second) for timing in timings] == [4, 0, 0, 4]


def test_baselines_are_timed_beside_ours_and_one_that_cannot_be_built_is_a_line(task, monkeypatch):
    def no_ffcv(task):
        raise ImportError("libopencv_core.so.406: cannot open shared object file")

    monkeypatch.setattr(baselines, "ffcv_loop", no_ffcv)
    *timings, ffcv = timed(baselines.baselines(task))
    found = {timing.name: (timing.error, len(timing.images_per_second)) for timing in timings}
    assert found == dict.fromkeys(("fastcifar", "ordinary", "built_in"), ("", 2))
    assert ffcv.error == "ImportError: libopencv_core.so.406: cannot open shared object file"


@pytest.mark.slow
def test_ffcvs_loader_trains_beside_ours_and_leaves_the_threads_alone(task):
    before = torch.get_num_threads()
    assert [timing.error for timing in timed(baselines.baselines(task))] == [""] * 4
    assert torch.get_num_threads() == before


def test_architectures_take_turns_each_by_its_own_recipe(betons, monkeypatch):
    tasks = []
    monkeypatch.setattr(baselines, "fastcifar_loop", lambda task, run: tasks.append((task, run)) or (lambda: None))
    archs, given = ["se_resnet18", "mish_se_resnet18", "se_resnet18"], {"images": 150, "device": CPU}
    timings = timed(architectures(archs, betons, batch_size=0, options=RunOptions(), **given), 3)
    assert [(timing.name, len(timing.images_per_second)) for timing in timings] == [(arch, 3) for arch in archs[:2]]
    assert [(task.steps, task.recipe) for task, _ in tasks] == [(1, reported(arch).recipe) for arch in archs[:2]]
    tasks.clear()
    timed(architectures(archs, betons, batch_size=32, options=RunOptions(precision="fp32", seed=3), **given))
    assert [(task.steps, task.images, run.seed, run.precision) for task, run in tasks] == [(4, 128, 3, "fp32")] * 2


@pytest.mark.parametrize(("batch_size", "error"), [(4, ""), (201, "InputError: 1 batches of 201 are more than 200 images")])
def test_an_architecture_is_really_trained_and_one_that_cannot_be_is_a_line(betons, batch_size, error):
    given = {"images": 1, "batch_size": batch_size, "device": CPU, "options": RunOptions(compile=False)}
    (timing,) = timed(architectures(["light_resnet18"], betons, **given))
    assert (len(timing.images_per_second), timing.error) == (0 if error else 2, error)


@pytest.mark.slow
def test_the_command_writes_what_it_measured(betons, tmp_path, monkeypatch, call):
    out = tmp_path / "pipeline.json"
    monkeypatch.setattr(baselines, "ffcv_loader", lambda task, device: [])
    said = call(
        input_pipelines.main, "--data", betons, "--out", out, "--batch-size", 4, "--rounds", 3, "--starts", 0,
        "--input-batch-size", 2, "--arch", "light_resnet18", "--pipelines", "crop + flip + cutout 8", "report D",
    )  # fmt: skip
    results = json.loads(out.read_text())
    step, pipelines = results["step"], results["input"]
    assert set(step["images_per_second"]) == {"fastcifar", "--kernels torch", "eager fp32 NCHW"}
    assert len(step["seconds"]["fastcifar"]) == 3
    assert step["speedup"].keys() >= {"median", "estimate", "low", "high"}
    assert step["speedup"]["estimate"] > 0
    common = ["fastcifar", "fastcifar.Loader", "fastcifar in PyTorch", "torchvision DataLoader", "torchvision v2 on batches"]
    assert [name for name in pipelines["report D"] if name != "kornia"] == common
    assert set(pipelines["crop + flip + cutout 8"]) - {"kornia"} == {*common, "FFCV"}
    for rows in pipelines.values():
        assert {row["images_per_second"]["rounds"] for row in rows.values()} == {3}
        assert rows["fastcifar"]["times_dataloader"]["median"] > 0
        assert "times_dataloader" not in rows["torchvision DataLoader"]
    assert results["versions"]["torch"]
    assert "img/s" in said


@pytest.mark.parametrize("arch", RECIPES)
def test_every_recipe_has_its_torchvision_transforms(task, arch):
    """One batch of the loader, without workers; what a recipe asks for and torchvision lacks would raise here."""
    recipe = replace(RECIPES[arch].recipe, batch_size=8)
    images, labels = next(iter(baselines.torchvision_loader(replace(task, recipe=recipe), workers=0)))
    assert (images.shape, images.dtype, labels.shape) == ((8, 3, 32, 32), torch.float32, (8,))
    assert images.isfinite().all()


@pytest.mark.slow
def test_the_first_step_of_a_real_training_is_timed(betons):
    options = input_pipelines.Options(data=betons, starts=2, arch="light_resnet18")
    told = input_pipelines.time_to_first_step(options, Console(quiet=True))
    assert len(told["seconds"]) == 2
    assert 0 < min(told["seconds"]) <= told["median"] < 60


def test_the_row_of_training_prepares_just_the_batches_of_training(task, monkeypatch):
    """What is timed is `TrainStep.prepare` as a training run would call it."""
    prepared = []
    prepare = TrainStep.prepare

    def noted(step, *arguments):
        prepared.append((step.augments_by, prepare(step, *arguments)[0].clone()))
        return prepared[-1][1], None, None

    monkeypatch.setattr(TrainStep, "prepare", noted)
    rows = input_pipelines.pipelines_of(replace(task, steps=2), task)
    (ours,) = (row for row in rows if row.name == "fastcifar")
    assert ours.images == 16
    ours.build([])()
    run = RunOptions(data=task.folder, compile=False)
    step = build_step(build_state(task.arch, task.recipe, run, task.data, CPU), task.recipe, run, task.data)
    order, plan = epoch_order(task.data.train.index[:16], 0, 0), step.plan(0, 2, progress=0.0)
    for number, positions in enumerate(order.split(8)):
        expected = prepare(step, task.data.train, positions, plan, plan.mixing.blend[number], plan.mixing.box[number])
        assert prepared[number][0] == step.augments_by == "numba"
        assert torch.equal(prepared[number][1], expected[0])


@pytest.mark.slow
def test_mistakes_are_one_line_and_the_old_name_says_so(betons):
    process = run_cli("bench/pipeline.py", "--data", betons, "--no-step", "--starts", "0")
    assert process.returncode == 2
    first, second = process.stderr.splitlines()
    assert first.startswith("bench/pipeline.py is now bench/input_pipelines.py")
    assert second == "error: 80 batches of 512 are more than 200 images"
    with pytest.raises(InputError, match="unknown pipeline 'report Z'"):
        input_pipelines.Options(pipelines=("report Z",))
