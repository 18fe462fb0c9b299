"""--profile: what a step's stages are, and a real trace of a real run."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fastcifar.dataset import load_splits
from fastcifar.errors import InputError
from fastcifar.profiling import WARMUP, Launched, Span, StepSpans, profiled, seconds_by_stage
from fastcifar.recipes import RunOptions, reported
from fastcifar.state import build_state, build_step
from fastcifar.step import TrainStep

# A step of 100 us: 10 of data, from 20 forward to 40, backward to 70, optimizer to the end.
STEP = StepSpans(Span(0, 100), Span(5, 15), Span(20, 40), Span(70, 80))
NEXT = StepSpans(*(Span(s.start + 150, s.end + 150) for s in STEP))


def microseconds(seconds):
    return {name: round(1e6 * each) for name, each in seconds.items() if each}


def test_every_microsecond_of_the_host_belongs_to_a_stage_or_is_idle():
    host, device = seconds_by_stage([STEP, NEXT], [])
    assert microseconds(host) == {"data": 20, "forward": 40, "backward": 60, "optimizer": 60, "other": 20, "idle": 50}
    assert sum(host.values()) == pytest.approx(250e-6)
    assert device == {}


def test_a_kernel_belongs_to_the_stage_that_launched_it_and_overlap_is_not_idle_time():
    kernels = [
        Launched(at=6, ran=Span(10, 30)),
        Launched(at=25, ran=Span(30, 60)),
        Launched(at=45, ran=Span(50, 90)),  # on another stream, beside the one before
        Launched(at=75, ran=Span(110, 120)),
        Launched(at=500, ran=Span(500, 900)),  # of no traced step
    ]
    _, device = seconds_by_stage([STEP], kernels)
    assert microseconds(device) == {"data": 20, "forward": 30, "backward": 40, "optimizer": 10, "idle": 30}


def test_a_replayed_graph_has_no_stages():
    host, device = seconds_by_stage([StepSpans(Span(0, 100), None, None, None)], [Launched(2, Span(10, 90))])
    assert microseconds(host) == {"other": 100}
    assert microseconds(device) == {"other": 80, "idle": 20}


def test_a_run_is_traced_and_trains_as_without(betons, tmp_path):
    device, recipe = torch.device("cpu"), replace(reported("se_resnet18").recipe, batch_size=8)
    run = RunOptions(data=betons, compile=False, kernels="torch", profile=2)
    data = load_splits(betons, device, limit_train=0, limit_test=0, val_fraction=0.0, seed=0, verify=False)
    said, weights = io.StringIO(), []
    for kind in (
        TrainStep,
        profiled(TrainStep, run.profile, tmp_path / "trace.json", Console(file=said, width=120), available=6),
    ):
        state = build_state("se_resnet18", recipe, run, data, device)
        step = build_step(state, recipe, run, data, kind)
        step.begin(0, [0.1] * 6)
        torch.manual_seed(0)
        for _ in range(6):
            step()
        weights.append(state.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    table = {cells[0]: cells[1:] for cells in map(str.split, said.getvalue().splitlines()) if len(cells) == 3}
    assert {"data", "forward", "backward", "optimizer", "idle"} <= set(table)
    assert all(float(table[stage][0]) > 0 for stage in ("data", "forward", "backward", "optimizer"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert sum(event.get("name") == "fastcifar.step" and event.get("ph") == "X" for event in trace["traceEvents"]) == 2


def test_more_steps_than_the_run_has_are_refused(tmp_path):
    with pytest.raises(InputError, match="profile 4 needs 7 steps, this run has 6: lower --profile"):
        profiled(TrainStep, 7 - WARMUP, tmp_path, Console(), available=6)
