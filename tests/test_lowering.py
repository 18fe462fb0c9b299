"""Inductor calls our operators as they are: without describing their inputs, which for a whole network does not end."""

import os
import subprocess
import sys

import pytest
import torch

from fastcifar.models import build_model, place

OPERATORS = {"residual_tail_statistics", "residual_tail", "residual_tail_backward"}


class LoweredError(Exception):
    """Inductor has met every operator of a graph: the code it would write is no part of the test."""


@pytest.fixture
def lower(monkeypatch):
    """Lower the forward and the backward pass of `se_resnet18` as training does; return what operators Inductor wrote of."""
    from torch._inductor import compile_fx, exc, graph, lowering

    described, directions = [], []

    def stop(self):
        directions.append(self.is_backward)
        raise LoweredError

    def inner(module, inputs, **options):
        with pytest.raises(exc.InductorError, match="LoweredError"):
            compile_fx.compile_fx_inner(module, inputs, **options)
        return module

    def backend(module, inputs):
        compile_fx.compile_fx(module, inputs, inner_compile=inner)
        raise LoweredError

    def lower():
        for overload in [each for each in lowering.lowerings if str(each).startswith("fastcifar.")]:
            del lowering.lowerings[overload]
        model = place(build_model("se_resnet18", kernels="triton"), torch.device("cpu")).train()
        forward = torch.compile(lambda x: model(x).float().square().sum(), fullgraph=True, dynamic=False, backend=backend)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="LoweredError"):
            forward(torch.randn(4, 3, 32, 32))
        assert directions == [False, True]
        return described

    monkeypatch.setattr(graph.GraphLowering, "codegen", stop)
    monkeypatch.setattr(
        exc.OperatorIssue, "operator_str", staticmethod(lambda target, *_: described.append(target._opname) or "")
    )
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
    ):
        yield lower
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_compiler_describes_no_operator_of_ours(lower):
    assert lower() == []


@pytest.mark.slow
def test_without_a_fallback_of_its_own_each_operator_is_described(lower, monkeypatch):
    monkeypatch.setattr("kernels.operators._register_fallback", lambda *_: None)
    assert set(lower()) == OPERATORS


@pytest.mark.slow
def test_importing_the_kernels_imports_no_compiler():
    modules = "kernels.augment, kernels.mish, kernels.residual_tail, kernels.squeeze_excite"
    code = f"import sys, {modules}; sys.exit('torch._inductor.lowering' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, timeout=900)
