"""The captured step: replayed, it does what it does when launched, with no help from the host."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tape import tape

from fastcifar import state as state_module
from fastcifar.checkpoint import load_checkpoint
from fastcifar.command import parse_command
from fastcifar.models import ARCHITECTURES
from fastcifar.step import TrainStep
from fastcifar.train import train

CPU = torch.device("cpu")
PLAIN_IMAGES = ("--policy", "none", "--random-erasing", "0", "--kernels", "torch")  # operations of fixed shapes
RECIPES = {
    "SGD and mixing": ("--recipe", "resnet18", "--mixup-alpha", "0.4", "--cutmix-alpha", "1", "--schedule-step", "batch"),
    "AdamW, average and dropout": (
        "--recipe", "light_resnet18", "--held-out", "0", "--optimizer", "adamw", "--ema-decay", "0.9", "--block-dropout", "0.2",
        "--stochastic-depth", "0.5", "--peak-lr", "0.01", "--clip-gradient-norm", "1",
    ),
    "one-cycle": (
        "--recipe", "resnet42", "--held-out", "0", "--min-momentum", "None", "--cutout", "8", "--clip-gradient-value", "0.1",
    ),
}  # fmt: skip


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
    options = ("--arch", "narrow", "--data", str(betons), "--out", str(out), "--no-plots", "--limit-test", "30")
    defaults = ("--batch-size", "20", "--limit-train", "100", "--epochs", "3", *PLAIN_IMAGES)
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_replayed_step_gives_the_plain_steps_bits(betons, tmp_path, taped, monkeypatch, recipe):
    """Over three epochs, whose tables are filled anew; the host's part of a step runs in the first one only."""
    captured = run(betons, tmp_path / "captured", *RECIPES[recipe])
    assert len(taped) >= 1
    monkeypatch.setattr(state_module, "captures", lambda *_: False)
    assert_same_training(captured, run(betons, tmp_path / "plain", *RECIPES[recipe]))


def test_a_replay_asks_the_host_for_nothing(betons, tmp_path, taped, monkeypatch):
    calls, original = [], TrainStep.run
    monkeypatch.setattr(TrainStep, "run", lambda step: calls.append(step.number) or original(step))
    run(betons, tmp_path / "run", *RECIPES["SGD and mixing"])
    assert calls == [0] * 4  # three warm-ups and the recording, of 15 steps
