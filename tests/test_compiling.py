"""A run's --compile-mode and --kernels are what its step is compiled with."""

import subprocess
import sys

import pytest
import torch

from fastcifar import step as training_step
from fastcifar.batches import choose_augmentation
from fastcifar.compiling import OPTIONS, compiled
from fastcifar.dataset import load_splits
from fastcifar.models.layers import norm_act
from fastcifar.recipes import RunOptions, reported
from fastcifar.state import build_state, build_step

CPU = torch.device("cpu")


class LoweredError(Exception):
    """The compiler has read its settings: the code it would write is no part of the test."""


@pytest.mark.slow  # the compiler is imported
@pytest.mark.parametrize(
    ("mode", "expected"), [("default", (False, None, True)), ("tuned", (False, 200, False)), ("combo", (True, None, True))]
)
def test_a_mode_is_what_the_compiler_reads(mode, expected, monkeypatch):
    from torch._inductor import config, exc, graph

    usual, read = config.realize_opcount_threshold, []

    def stop(self):
        opcount = config.realize_opcount_threshold
        recompute_bans = torch._functorch.config.ban_recompute_used_far_apart
        read.append((config.combo_kernels, None if opcount == usual else opcount, recompute_bans))
        raise LoweredError

    monkeypatch.setattr(graph.GraphLowering, "codegen", stop)
    with (
        config.patch(force_disable_caches=True),
        pytest.raises((exc.InductorError, torch._dynamo.exc.BackendCompilerFailed), match="LoweredError"),
    ):
        compiled(lambda x: x.sin().cos(), mode)(torch.ones(8, requires_grad=True))
    assert read == [expected]
    assert config.realize_opcount_threshold == usual
    assert torch._functorch.config.ban_recompute_used_far_apart


@pytest.mark.parametrize("mode", OPTIONS)
def test_the_step_compiles_in_the_runs_mode(betons, mode, monkeypatch):
    asked = []
    monkeypatch.setattr(training_step, "compiled", lambda function, mode: asked.append((function.__name__, mode)) or function)
    run = RunOptions(data=betons, compile=True, compile_mode=mode, kernels="torch")
    data = load_splits(betons, CPU, limit_train=0, limit_test=0, val_fraction=0.0, seed=0, verify=False)
    recipe = reported("se_resnet18").recipe
    build_step(build_state("se_resnet18", recipe, run, data, CPU), recipe, run, data)
    assert asked == [("loss", mode), ("prepare", mode)]


def test_fusable_is_said_of_the_network_and_leaves_the_augmentation_to_what_is_fastest(monkeypatch):
    augmentation = reported("dropout_resnet24").recipe.augmentation
    assert choose_augmentation(augmentation, "fusable", CPU) == "numba"
    assert choose_augmentation(augmentation, "torch", CPU) == "torch"
    run = RunOptions(compile=True, kernels="fusable")
    asked = []
    monkeypatch.setattr("fastcifar.models.layers.residual_tail", lambda x, *_, backend, **__: asked.append(backend) or x)
    norm_act(torch.ones(2, 4, 3, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), run.kernels)
    assert asked == ["fusable"]


def test_a_hidden_function_goes_to_the_compiler_once_it_is_there(monkeypatch):
    import torch._dynamo

    from kernels.operators import spare_compiler

    asked = []
    monkeypatch.setattr(torch._dynamo, "disable", lambda function, *_, **__: asked.append(function) or function)
    hidden = torch._disable_dynamo(lambda x: x + 1)
    spare_compiler(hidden)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch._dynamo")
        assert hidden(1) == 2
    assert not asked
    assert [hidden(1), hidden(2)] == [2, 3]
    assert asked == [hidden.__wrapped__]


WITHOUT_COMPILER = """
import sys, torch
from fastcifar.optimization import build_optimizer
from kernels.dropout import dropout

layer = torch.nn.Linear(3, 2)
for kind in ("sgd", "nesterov", "adam", "adamw"):
    optimizer = build_optimizer(layer, kind, momentum=0.9, weight_decay=0.1, decay_norm_and_bias=False)
    x = dropout(torch.ones(2, 3), torch.arange(2), torch.tensor(0), probability=0.5, layer=0, seed=0)
    before = layer.weight.clone()
    layer(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not torch.equal(layer.weight, before)
assert "torch._dynamo" not in sys.modules
"""


@pytest.mark.slow  # a fresh process
def test_training_uncompiled_does_not_import_the_compiler():
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], check=True)
