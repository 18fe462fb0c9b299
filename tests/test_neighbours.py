"""`kernels.neighbours`: what stands next to a tail or a squeeze-excitation goes into its kernels, and computes what it did."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastcifar.compiling import compiled
from fastcifar.models.blocks import BasicBlock, PreActivationBlock
from kernels import neighbours
from kernels import residual_tail as tail
from kernels import squeeze_excite as excitation
from kernels.neighbours import fuse_neighbours
from kernels.residual_tail import fusable, residual_tail
from kernels.squeeze_excite import reference as excitation_reference
from kernels.squeeze_excite import squeeze_excite
from tests.kernel_checks import DEVICE, SLACK, assert_as_exact_as_eager, error, poisoned_buffers, sample
from tests.tail_cases import FLOAT32, Case
from tests.test_model_kernels import assert_same, small, step
from tests.test_squeeze_excite import inputs as inputs_of_excitation

SMALL = Case((2, 6, 3, 3), "mish", 2, biases=True)
CALL = neighbours._call
CASES = [
    Case((3, 45, 5, 5), "mish", 3, se_activation="mish", biases=True),
    Case((2, 185, 3, 2), "relu", shortcut=False),
    Case((3, 6, 19, 19), "none", 2, shortcut=False),
    Case((2, 45, 4, 3), "relu"),
    Case((5, 90, 2, 2), "none"),
]
LINEAR = ("w_reduce", "w_expand", "b_reduce", "b_expand")
NORM = ("shortcut_weight", "shortcut_bias", "running_shortcut_mean", "running_shortcut_var")


def network(form, case, leaves, kept=None):
    """A tail of a sum that is used elsewhere too, behind it dropout and two convolutions; the mask, drawn or given, is last.

    The shortcut has its own BN, but where there is no activation.
    """
    norm = case.shortcut and case.activation != "none"
    total = leaves["conv_out"] + leaves["addend"]
    linear = ("w_reduce", "w_expand", *("b_reduce", "b_expand") * case.biases) if case.units else ()
    out = form(
        total, leaves["shortcut"] if case.shortcut else None, leaves["bn_weight"], leaves["bn_bias"],
        leaves["running_mean"], leaves["running_var"], training=True, momentum=0.1, eps=1e-5, activation=case.activation,
        se_activation=case.se_activation, se=tuple(leaves[name] for name in linear) or None,
        shortcut_bn=tuple(leaves[name] for name in NORM) if norm else None,
    )  # fmt: skip
    if kept is None:
        out, kept = torch.native_dropout(out, 0.3, True)
    else:
        out = out * kept * (1 / 0.7)
    return total, F.conv2d(out, leaves["first"]), F.conv2d(out, leaves["second"]), kept


def run(function, inputs, gradients, dtype):
    """All results, moved statistics and gradients of `function`, which is called with leaves in `dtype`."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_(not name.startswith("running")) for name, x in inputs.items()}
    *results, kept = function(leaves)
    torch.autograd.backward(results, [g.to(dtype) for g in gradients])
    found = {f"result {number}": x.detach() for number, x in enumerate(results)}
    found |= {name: x if x.grad is None else x.grad for name, x in leaves.items() if x.grad is not None or "running" in name}
    return found, kept.detach()


def compiling(found):
    """A backend: Inductor's graphs, rewritten, then run operation by operation; `found` gets each before and after."""
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    def inner(module, _, **__):
        before = str(module.graph)
        fuse_neighbours(module.graph)
        module.graph.lint()
        module.recompile()
        found.append((before, str(module.graph)))
        return make_boxed_func(module)

    torch._dynamo.reset()
    return partial(compile_fx, inner_compile=inner)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "fused"), sample(CASES, [True, False], every=3), ids=str)
def test_what_is_moved_into_the_operators_is_as_exact_as_eager_pytorch(case, fused, monkeypatch):
    if not fused:  # a form that takes no neighbours
        monkeypatch.setattr(tail, "_form", lambda _: fusable)
    n, c, h, w = case.shape
    inputs = case.inputs(torch.float32)
    gradients = [inputs.pop("gradient"), *torch.randn(2, n, 4, h, w).to(DEVICE)]
    inputs["addend"] = torch.randn(case.shape).contiguous(memory_format=torch.channels_last).to(DEVICE)
    inputs |= {name: torch.randn(4, c, 1, 1).to(DEVICE) for name in ("first", "second")}
    inputs |= {name: inputs[name.replace("shortcut", "bn")] + 0.5 for name in NORM[:2]}
    inputs |= {name: torch.rand(c).to(DEVICE) for name in NORM[2:]}
    graphs, form = [], partial(residual_tail, backend="triton")
    function = torch.compile(partial(network, form, case), fullgraph=True, dynamic=False, backend=compiling(graphs))
    with poisoned_buffers():
        ours, kept = run(function, inputs, gradients, torch.float32)
    (_, forward), (_, backward) = graphs
    assert "residual_sum_statistics" in forward
    assert not any(name in forward for name in ("aten.add", "aten.mul"))
    dz_is_the_gradient = case.shortcut and case.activation == "none"  # which the shortcut wants too
    assert dz_is_the_gradient == any(name in backward for name in ("aten.add", "aten.mul"))
    definition = partial(network, partial(residual_tail, backend="torch"), case, kept=kept)
    (eager, _), (exact, _) = (run(definition, inputs, gradients, dtype) for dtype in (torch.float32, torch.float64))
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        assert error(value, exact[name]) <= max(SLACK * error(eager[name], exact[name]), FLOAT32), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda tail, a, b: tail(a.sin() + b),  # the compiler fuses the sum with the sine
        lambda tail, a, b: tail(a + b[:1]),
        lambda tail, a, b: tail(torch.add(a, b, alpha=2)),
        lambda tail, a, b: tail(a) * 2,
        lambda tail, a, b: tail(a) * b * 2,
        lambda tail, a, b: (tail(a) * (b > 0) * 2, tail(a) + 1),
    ],
)
def test_what_is_not_as_expected_stays(function):
    vectors = [torch.ones(4, device=DEVICE) for _ in range(4)]
    form = partial(residual_tail, backend="triton", training=True, momentum=0.1, eps=1e-5)
    graphs = []
    a, b = torch.randn(2, 2, 4, 3, 3, device=DEVICE)
    torch.compile(lambda a, b: function(lambda x: form(x, None, *vectors), a, b), backend=compiling(graphs))(a, b)
    ((before, after),) = graphs
    assert before == after


@pytest.mark.parametrize(
    "case", sample([SMALL, replace(SMALL, activation="none", units=0), replace(SMALL, shortcut=False)], every=3), ids=str
)
@pytest.mark.slow
def test_operators_with_neighbours_keep_their_promises(case, monkeypatch):
    inputs = case.inputs(torch.float32)
    x, shortcut, gradient, weight, bias, mean, var, *linear = inputs.values()
    addend, second, elsewhere = (torch.randn_like(x) for _ in range(3))
    norm = (bias + 1, weight, mean / 2, var + 1) if case.units and case.shortcut else (None,) * 4
    near = fusable.Neighbours(torch.rand_like(x) > 0.3, 0.7, *norm, second, elsewhere)
    torch.library.opcheck(tail._sum_statistics, (x, addend, mean.clone(), var.clone(), 0.1, case.units > 0))
    image_mean = x.mean((2, 3)) if case.units else None
    leaves = [x, shortcut if case.shortcut else None, weight, bias, *(linear if case.units else [None] * 4)]
    settings = fusable.Settings(True, 1e-5, "mish", case.activation)
    arguments = (*leaves, image_mean, mean, var, *settings, *near[: fusable.NEAR])
    _, *excited = tail._tail(*arguments)
    torch.library.opcheck(tail._tail, tuple(t.detach().requires_grad_() if i in (0, 2) else t for i, t in enumerate(arguments)))
    kept_by_forward = excited if case.units else (None, None)
    arguments = (gradient, *leaves, image_mean, mean, var, *kept_by_forward, *settings, *near)
    torch.library.opcheck(tail._tail_backward, arguments)
    found = tail._tail_backward(*arguments)
    monkeypatch.setattr(tail, "_form", lambda _: fusable)
    torch.testing.assert_close(found, tail._tail_backward(*arguments))


@pytest.mark.slow  # the compiler is imported
@pytest.mark.parametrize(("interpreting", "factors"), sample([True, False], [1, 3], every=3))
def test_statistics_take_stochastic_depth(interpreting, factors, monkeypatch):
    case, graphs = Case((3, 45, 5, 5), "relu", shortcut=False), []
    inputs = case.inputs(torch.float32)
    x, branch = (torch.randn(case.shape).contiguous(memory_format=torch.channels_last).to(DEVICE) for _ in range(2))
    leaves = [x, branch, *(inputs[name] for name in ("bn_weight", "bn_bias", "running_mean", "running_var"))]
    factor = torch.tensor([0.0, 2.0, 0.5], device=DEVICE)[-factors:, None, None, None]

    def function(backend, x, branch, *vectors):
        total = x + branch * factor.to(x.dtype)
        return residual_tail(total, None, *vectors, training=True, momentum=0.1, eps=1e-5, backend=backend) + 2 * total

    def moved(backend, dtype):
        given = [t.to(dtype, copy=True) for t in leaves]
        form = torch.compile(function, fullgraph=True, backend=compiling(graphs)) if backend == "triton" else function
        with torch.no_grad():
            return [form(backend, *given), *given[-2:]]

    if not interpreting:
        monkeypatch.setattr(tail, "_form", lambda _: fusable)
    with poisoned_buffers():
        ours = moved("triton", torch.float32)
    ((_, after),) = graphs
    assert "residual_sum_statistics" in after
    for triple in zip(ours, moved("torch", torch.float32), moved("torch", torch.float64), strict=True):
        assert_as_exact_as_eager(*triple)


@pytest.mark.slow
@pytest.mark.parametrize("interpreting", sample([True, False], every=2))
def test_a_tail_that_ends_in_squeeze_excitation_takes_sums_but_no_dropout(interpreting, monkeypatch):
    case = Case((2, 45, 4, 4), "relu", 3, shortcut=False, biases=True, se_last=True)
    inputs = case.inputs(torch.float32)
    inputs["addend"] = torch.randn(case.shape).to(DEVICE)
    graphs, weights = [], [torch.randn(4, 45, 1, 1, device=DEVICE) for _ in range(3)]
    leaves = [inputs[name].requires_grad_() for name in ("conv_out", "addend", "bn_weight", "bn_bias", *LINEAR)]
    kept = torch.rand(case.shape, device=DEVICE) > 0.3

    def function(backend, x, addend, weight, bias, *linear):
        mean, var = (inputs[name].to(x.dtype, copy=True) for name in ("running_mean", "running_var"))
        form = partial(residual_tail, training=True, momentum=0.1, eps=1e-5, backend=backend)
        total = x + addend
        y = form(total, None, weight, bias, mean, var, se=linear, se_last=True)
        z = form(total, None, weight, bias, mean, var, se=linear, se_last=True) * kept * 2.0
        return (
            sum(F.conv2d(each, w.to(each)).sin().sum() for each, w in zip((y, y, z), weights, strict=True)) + total.sin().sum()
        )

    compiled = torch.compile(partial(function, "triton"), fullgraph=True, backend=compiling(graphs))
    if not interpreting:
        monkeypatch.setattr(tail, "_form", lambda _: fusable)
    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    (_, forward), _ = graphs
    assert "residual_sum_statistics" in forward
    assert "aten.mul" in forward  # dropout
    eager = torch.autograd.grad(function("torch", *leaves), leaves)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(function("torch", *exact_leaves), exact_leaves)
    for triple in zip(gradients, eager, exact, strict=True):
        assert_as_exact_as_eager(*triple, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("block", [BasicBlock, PreActivationBlock])
def test_a_compiled_network_learns_the_same(block, monkeypatch):
    calls = []
    monkeypatch.setattr(neighbours, "_call", lambda node, *given: calls.append(str(node)) or CALL(node, *given))
    model = small(block, "triton")
    ours = deepcopy(model)
    torch._dynamo.reset()
    ours.forward = compiled(ours.forward, fullgraph=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        assert_same(step(ours), step(model), rtol=1e-4, atol=1e-5)
    assert len(calls) >= 2


@pytest.mark.parametrize("interpreting", sample([True, False], every=2))
def test_a_squeeze_excitation_takes_both_gradients(interpreting, monkeypatch):
    graphs, weights = [], [torch.randn(4, 45, 1, 1, device=DEVICE) for _ in range(2)]
    leaves = [t.requires_grad_() for t in inputs_of_excitation(2, 45, 3, 3, 5)]

    def function(form, x, w_reduce, w_expand, *biases):
        y = form(x, w_reduce, w_expand, "mish", *biases)
        return sum(F.conv2d(y, weight.to(y)).sin().sum() for weight in weights)

    ours = partial(function, partial(squeeze_excite, backend="triton"))
    compiled = torch.compile(ours, fullgraph=True, backend=compiling(graphs))
    if not interpreting:
        monkeypatch.setattr(excitation, "_form", lambda *_: excitation_reference)
    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    (_, (_, backward)) = graphs
    assert "aten.add" not in backward
    definition = partial(function, excitation_reference.squeeze_excite)
    eager = torch.autograd.grad(definition(*leaves), leaves)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(definition(*exact_leaves), exact_leaves)
    for triple in zip(gradients, eager, exact, strict=True):
        assert_as_exact_as_eager(*triple, "gradient")
