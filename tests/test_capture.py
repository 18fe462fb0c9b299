"""The captured step: replayed, it does what it does when launched, with no help from the host."""

import io
import os
import signal
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tape import tape

from fastcifar import state as state_module
from fastcifar.checkpoint import load_checkpoint
from fastcifar.command import parse_command
from fastcifar.errors import Stopped
from fastcifar.models import ARCHITECTURES
from fastcifar.step import TrainStep
from fastcifar.train import train
from tests.kernel_checks import sample

CPU = torch.device("cpu")
PLAIN_IMAGES = ("--policy", "none", "--random-erasing", "0", "--kernels", "torch")  # operations of fixed shapes
ONE_CYCLE = ("--recipe", "resnet42", "--held-out", "0", "--cutout", "8", "--clip-gradient-value", "0.1")
RECIPES = {
    "SGD and mixing": ("--recipe", "resnet18", "--mixup-alpha", "0.4", "--cutmix-alpha", "1", "--schedule-step", "batch"),
    "AdamW, average and dropout": (
        "--recipe", "light_resnet18", "--held-out", "0", "--optimizer", "adamw", "--ema-decay", "0.9", "--block-dropout", "0.2",
        "--stochastic-depth", "0.5", "--peak-lr", "0.01", "--clip-gradient-norm", "1",
    ),
    "one-cycle": ONE_CYCLE,
    "sizes": (
        "--recipe", "resnet18", "--mixup-alpha", "0.4", "--cutmix-alpha", "1", "--schedule-epochs", "3",
        "--sizes", "20", "32", "24", "--size-epochs", "1", "2", "--average-from", "1.4",
    ),
    "sizes and frozen": (
        "--recipe", "light_resnet18", "--held-out", "0", "--schedule-epochs", "3", "--sizes", "24", "32", "--size-epochs", "1",
        "--frozen", "stem.0.weight", "*.bias", "--frozen-from", "2", "--precision", "bf16",
        "--optimizer", "muon", "--momentum", "0.6", "--vector-momentum", "0.85",
    ),
    "streamed, bf16": ("--recipe", "resnet18", "--stream", "--cutout", "8", "--precision", "bf16"),
}  # fmt: skip
PHASES = {"sizes": 3, "sizes and frozen": 3}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    row = replace(ARCHITECTURES["light_resnet18"], widths=(4, 8, 8, 16), blocks=(1, 1, 1, 1))
    monkeypatch.setitem(ARCHITECTURES, "narrow", row)


@pytest.fixture
def taped(monkeypatch):
    """Runs capture their steps on tapes; returns the tapes."""
    tapes = []

    def record(function):
        tapes.append(tape(function))
        return tapes[-1]

    monkeypatch.setattr(state_module, "captures", lambda *_: True)
    monkeypatch.setattr(state_module, "cuda_graph", record)
    return tapes


def run(betons, out, *arguments, console=None):
    options = ("--arch", "narrow", "--data", str(betons), "--out", str(out), "--no-plots")
    sizes = ("--batch-size", "20", "--limit-train", "100", "--limit-test", "30", "--eval-batch-size", "12")
    defaults = (*sizes, "--epochs", "3", *PLAIN_IMAGES)
    return train(parse_command([*options, *defaults, *arguments]), console or Console(quiet=True))


def assert_same_training(*folders):
    checkpoints = [load_checkpoint(folder.last, CPU) for folder in folders]
    parts = [[*c.model.values(), *(c.average or {}).values()] for c in checkpoints]
    moments = [[v for state in c.optimizer["state"].values() for v in state.values() if v is not None] for c in checkpoints]
    for kind in (parts, moments):
        assert len(kind[0]) == len(kind[1]) > 0
        for one, other in zip(*kind, strict=True):
            assert torch.equal(one, other)
    rows = [[(row["train_loss"], row["train_accuracy"], row["eval_loss"]) for row in f.read_metrics()] for f in folders]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("recipe", sample(RECIPES, every=3, gpu=False))
def test_a_replayed_step_gives_the_plain_steps_bits(betons, tmp_path, taped, monkeypatch, recipe):
    """Over three epochs, whose tables are filled anew; the host's part of a step runs in the first one only."""
    original = state_module.StepSettings  # on CUDA a momentum that moves comes from a table, captured or not
    monkeypatch.setattr(state_module, "StepSettings", lambda **s: original(**s | {"table_momentum": recipe == "one-cycle"}))
    captured = run(betons, tmp_path / "captured", *RECIPES[recipe])
    assert len(taped) == 2 + PHASES.get(recipe, 1)  # drawing an epoch, evaluation, and the step of each phase
    counts = [v for name, v in load_checkpoint(captured.last, CPU).model.items() if name.endswith("num_batches_tracked")]
    assert set(map(int, counts)) == {15}  # batches, the warm-ups' left out
    monkeypatch.setattr(state_module, "captures", lambda *_: False)
    assert_same_training(captured, run(betons, tmp_path / "plain", *RECIPES[recipe]))


@pytest.mark.parametrize("recipe", sample(["AdamW, average and dropout", "SGD and mixing"], every=2, gpu=False))
def test_a_replayed_step_leaves_out_what_is_not_finite(betons, tmp_path, taped, monkeypatch, recipe):
    original, arguments = TrainStep.loss, (*RECIPES[recipe], "--skip-nonfinite")

    def poisoned(step, *batch):
        loss, hits = original(step, *batch)
        return loss * torch.where(step.tables.cursor[0] % 2 == 0, torch.nan, 1.0), hits

    monkeypatch.setattr(TrainStep, "loss", poisoned)
    captured = run(betons, tmp_path / "captured", *arguments)
    assert len(taped) == 3
    assert [row["skipped_steps"] for row in captured.read_metrics()] == [3] * 3  # of 5, the very first among them
    monkeypatch.setattr(state_module, "captures", lambda *_: False)
    assert_same_training(captured, run(betons, tmp_path / "plain", *arguments))


def test_a_replay_asks_the_host_for_nothing(betons, tmp_path, taped, monkeypatch):
    calls, original = [], TrainStep.run
    monkeypatch.setattr(TrainStep, "run", lambda step: calls.append(step.number) or original(step))
    run(betons, tmp_path / "run", *RECIPES["SGD and mixing"])
    assert calls == [0] * 4  # three warm-ups and the recording, of 15 steps


@pytest.mark.parametrize("resumed_as", sample(["captured", "plain", "streamed", "sizes"], every=4, gpu=False))
def test_a_resume_inside_an_epoch_goes_on_with_the_same_bits(betons, tmp_path, taped, monkeypatch, resumed_as):
    recipes = {"streamed": "streamed, bf16", "sizes": "sizes"}
    recipe, original = RECIPES[recipes.get(resumed_as, "AdamW, average and dropout")], TrainStep.__call__
    whole = run(betons, tmp_path / "whole", *recipe)

    def signalled(step):
        original(step)
        if step.number == 3 and (tmp_path / "cut" / "last.pt").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", signalled)
        with pytest.raises(Stopped, match="saved in epoch 2 after step 3 of 5"):
            run(betons, tmp_path / "cut", *recipe)
    if resumed_as == "plain":
        monkeypatch.setattr(state_module, "captures", lambda *_: False)
    assert_same_training(whole, train(parse_command(["--resume", str(tmp_path / "cut")]), Console(quiet=True)))


def test_what_the_host_would_change_shows_on_the_tape(betons, tmp_path, taped, monkeypatch):
    """Captured against the rule, a momentum that the host moves stands still: other weights come out."""
    recipe = (*ONE_CYCLE, "--optimizer", "nesterov", "--min-momentum", "0.5")
    plain = run(betons, tmp_path / "plain", *recipe)
    monkeypatch.setattr(state_module, "obstacle", lambda *_: "")
    captured = run(betons, tmp_path / "captured", *recipe)
    one, other = (load_checkpoint(folder.last, CPU).model["classifier.weight"] for folder in (plain, captured))
    assert not torch.equal(one, other)


def test_what_stands_against_capture_is_named(betons, tmp_path, taped):
    console = Console(record=True, quiet=False, width=200, file=io.StringIO())
    arguments = (*ONE_CYCLE, "--optimizer", "nesterov", "--min-momentum", "0.85")
    folder = run(betons, tmp_path / "run", *arguments, console=console)
    assert "the step is not captured, and so slower: min_momentum " in console.export_text()
    assert len(taped) == 1  # evaluation
    assert folder.read_summary()["epochs_trained"] == 3


def test_a_capture_that_fails_is_a_line_and_changes_nothing(betons, tmp_path, monkeypatch):
    plain = run(betons, tmp_path / "plain", *RECIPES["AdamW, average and dropout"])

    def fails(function):
        function()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    monkeypatch.setattr(state_module, "captures", lambda *_: True)
    monkeypatch.setattr(state_module, "cuda_graph", fails)
    console = Console(record=True, width=200, file=io.StringIO())
    folder = run(betons, tmp_path / "run", *RECIPES["AdamW, average and dropout"], console=console)
    for name in ("the step", "evaluation"):
        line = f"{name} is not captured, and so slower: CUDA out of memory. Tried to allocate 2 GiB.\n"
        assert console.export_text(clear=False).count(line) == 1
    assert_same_training(plain, folder)


def test_the_tape_refuses_to_wait():
    for wait in (lambda x: x.item(), lambda x: x.cpu(), bool, float):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            tape(lambda wait=wait: wait(torch.zeros(())))
