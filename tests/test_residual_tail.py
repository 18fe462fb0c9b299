"""`kernels.residual_tail`: as exact as eager PyTorch in every form, on every shape; a citizen of autograd and the compiler."""

import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import nn

from kernels import backends, reference, residual_tail_ops, residual_tail_tiles
from kernels.residual_tail import residual_tail, residual_tail_fusable, variant
from kernels.residual_tail_tiles import Tile, group_rows, image_tile, row_tile
from tests.kernel_checks import poisoned_buffers
from tests.tail_cases import FORMS, SLACK, TRITON, Case

TRAINING = [
    Case((3, 45, 5, 5), "mish", 3, se_activation="mish"),
    Case((3, 48, 4, 4), "relu", 40, biases=True),  # more units than a turn of any loop takes
    Case((4, 90, 4, 4), "none", 3),
    Case((2, 170, 3, 3), "mish", 7, shortcut=False),
    Case((2, 185, 2, 2), "relu", 8, shortcut=False),
    Case((2, 340, 4, 4), "relu", 14, se_activation="mish", biases=True),
    Case((3, 45, 5, 5), "none"),
    Case((3, 48, 5, 5), "mish"),
    Case((3, 90, 4, 4), "relu", shortcut=False),
    Case((5, 170, 2, 2), "mish", shortcut=False),
    Case((2, 185, 4, 4), "relu"),
    Case((3, 340, 3, 3), "none", shortcut=False),
    Case((1, 8, 7, 7), "mish", 2),
    Case((1, 8, 7, 7), "relu"),
    Case((5, 8, 1, 1), "relu", 2),
    Case((5, 8, 1, 1), "mish"),
    Case((3, 64, 4, 4), "mish", 4, se_activation="mish", biases=True),
]
EVALUATION = [replace(case, training=False) for case in TRAINING] + [Case((1, 8, 1, 1), "relu", 2, training=False)]
CASES = TRAINING + EVALUATION
HARD = [TRAINING[0], TRAINING[4], TRAINING[8], TRAINING[10], EVALUATION[0], EVALUATION[3], EVALUATION[10], TRAINING[16]]
HALF_AND_SINGLE = [torch.float16, torch.float32]


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_and_gradients_are_as_exact_as_eager_pytorch(form, case, dtype):
    case.check(form, dtype)


@pytest.mark.parametrize("kind", ["large", "tiny", "constant", "strided"])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("case", HARD, ids=str)
def test_hard_inputs(form, case, dtype, kind):
    case.check(form, dtype, kind)


def test_in_float32_the_errors_of_all_cases_together_are_at_most_twice_eagers(form):
    """One case's error in float32 is a matter of luck: eager's sums may happen to be exact. Together they are not."""
    ours, eager = defaultdict(float), defaultdict(float)
    for case in TRAINING:
        for name, errors in case.errors(form, torch.float32).items():
            ours[name] += errors[0] ** 2
            eager[name] += errors[1] ** 2
    assert len(ours) == 11
    for name, total in ours.items():
        assert total**0.5 <= SLACK * eager[name] ** 0.5, name


@pytest.mark.parametrize(
    "case",
    [Case((2, 8, 19, 19), "mish", 2), Case((3, 8, 19, 19), "relu"), Case((2, 8, 19, 19), "relu", 2, training=False)],
    ids=str,
)
def test_more_rows_than_a_tile_more_groups_than_a_block(monkeypatch, case):
    from kernels import residual_tail_backward_triton, residual_tail_triton

    for module in (residual_tail_triton, residual_tail_backward_triton):
        monkeypatch.setattr(module, "row_tile", lambda *_, **__: Tile(32, 8), raising=False)
        monkeypatch.setattr(module, "sums_tile", lambda *_: Tile(32, 8), raising=False)
        monkeypatch.setattr(module, "channel_block", lambda _: Tile(2, 4))
    monkeypatch.setattr(residual_tail_ops, "group_rows", lambda *_: 100)
    case.check(TRITON, torch.float32)


def test_more_images_than_a_block():
    Case((70, 4, 1, 1), "relu", 2).check(TRITON, torch.float32)


@pytest.mark.parametrize("case", [TRAINING[0], TRAINING[5], TRAINING[8], EVALUATION[0], TRAINING[16]], ids=str)
def test_unfilled_memory_is_never_read(case):
    inputs = case.inputs(torch.float32)
    expected = case.run(TRITON, inputs)
    with poisoned_buffers():
        assert residual_tail_ops.floats(inputs["bn_bias"], 3).isnan().all()
        found = case.run(TRITON, inputs)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("units", [0, 2])
def test_running_statistics_are_batch_norms(form, units):
    case = Case((3, 48, 5, 5), units=units)
    bn = nn.BatchNorm2d(48, momentum=0.3)
    mean, var = torch.zeros(48), torch.ones(48)
    for seed in range(3):
        inputs = case.inputs(torch.float32)
        x = inputs["conv_out"] * (seed + 1) + seed
        bn(x)
        se = (inputs["w_reduce"], inputs["w_expand"]) if units else None
        form(x, None, bn.weight, bn.bias, mean, var, training=True, momentum=0.3, eps=1e-5, se=se)
    torch.testing.assert_close(mean, bn.running_mean)
    torch.testing.assert_close(var, bn.running_var)
    form(x, None, bn.weight, bn.bias, mean, var, training=False, momentum=0.3, eps=1e-5)
    torch.testing.assert_close(mean, bn.running_mean)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("units", "biases"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("activation", ["relu", "mish", "none"])
def test_gradcheck(activation, units, biases, training):
    for shortcut in (True, False):
        case = Case((3, 4, 3, 2), activation, units, shortcut, training, "mish")
        inputs = {
            name: x.double().requires_grad_(not name.startswith("running")) for name, x in case.inputs(torch.float32).items()
        }
        del inputs["gradient"]
        if not shortcut:
            inputs["shortcut"] = None
        if not units:
            del inputs["w_reduce"], inputs["w_expand"]
        if not biases:
            del inputs["b_reduce"], inputs["b_expand"]

        def function(*tensors, case=case):
            conv_out, shortcut, weight, bias, mean, var, *se = tensors
            return residual_tail_fusable(
                conv_out, shortcut, weight, bias, mean.clone(), var.clone(), training=case.training, momentum=0.1, eps=1e-5,
                se=tuple(se) if se else None, se_activation="mish", activation=case.activation,
            )  # fmt: skip

        assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("interpreting", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 6, 3, 3), "mish", 2),
        Case((2, 6, 3, 3), "mish", 2, biases=True),
        Case((2, 6, 3, 3), "relu", 0, False),
        Case((2, 6, 3, 3), "none"),
    ],
    ids=str,
)
def test_operators_keep_their_promises(monkeypatch, case, interpreting):
    ops = residual_tail_ops
    monkeypatch.setattr(backends, "interpreting", lambda: interpreting)
    inputs = case.inputs(torch.float32)
    x, gradient = inputs["conv_out"], inputs["gradient"]
    weight, bias, mean, var, *linear = (inputs[name] for name in list(inputs)[3:])
    linear = linear if case.biases else [*linear[:2], None, None]
    statistics = (x, mean.clone(), var.clone(), 0.1, case.units > 0)
    torch.library.opcheck(ops.batch_statistics, statistics)
    image_mean, mean, var = ops.batch_statistics(*statistics)
    scale = hidden = None
    if case.units:
        torch.library.opcheck(ops.squeeze, (x,))
        small = (image_mean, mean, var, weight, bias, *linear, 1e-5, "mish")
        torch.library.opcheck(ops.excite, small)
        scale, hidden = ops.excite(*small)
    else:
        image_mean, linear = None, [None] * 4
    leaves = [x, inputs["shortcut"] if case.shortcut else None, weight, bias, *linear]
    settings = (True, 1e-5, "mish", case.activation)
    rest = (image_mean, mean, var, scale, hidden, *settings)
    torch.library.opcheck(ops._tail_backward, (gradient, *leaves, *rest))
    torch.library.opcheck(ops._tail, (*(None if t is None else t.requires_grad_() for t in leaves), *rest))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 6, 3, 3), "mish", 2),
        Case((2, 6, 3, 3), "mish", 2, biases=True),
        Case((2, 6, 3, 3), "none", training=False),
        Case((2, 6, 3, 3), "relu", shortcut=False),
        Case((2, 6, 3, 3), "none", 2, shortcut=False, training=False),
    ],
    ids=str,
)
def test_compiles_into_one_graph(form, case, dtype):
    assert_compiles(form, case, dtype, "aot_eager")


def test_the_fusable_form_compiles_with_inductor():
    assert_compiles(residual_tail_fusable, Case((2, 6, 3, 3), "mish", 2), torch.float32, "inductor")


def assert_compiles(form, case, dtype, backend):
    inputs = case.inputs(dtype)
    torch._dynamo.reset()
    found = case.run(torch.compile(form, fullgraph=True, backend=backend), inputs)
    expected = case.run(form, inputs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_autocast_changes_nothing_between_the_convolutions(form):
    case = Case((2, 6, 3, 3), "mish", 2)
    inputs = case.inputs(torch.bfloat16)
    expected = case.run(form, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.run(form, inputs)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_nan_and_infinity_are_not_hidden(form):
    case = Case((2, 6, 3, 3), "relu", training=False)
    inputs = case.inputs(torch.float32)
    inputs["conv_out"][0, 0, 0, 0], inputs["conv_out"][0, 1, 0, 0] = float("nan"), float("inf")
    inputs["bn_weight"].abs_()
    out = case.run(form, inputs)["result"]
    assert out[0, 0, 0, 0].isnan()
    assert out[0, 1, 0, 0].isinf()


BAD = {
    "conv_out must be": lambda t: {"conv_out": t["conv_out"][0]},
    r"conv_out must be .*int64": lambda t: {"conv_out": t["conv_out"].long()},
    r"shortcut must be like conv_out.*\[2, 6, 3, 3\].*\[2, 6, 3, 2\]": lambda t: {"shortcut": t["shortcut"][..., :2]},
    r"shortcut must be .*float64": lambda t: {"shortcut": t["shortcut"].double()},
    r"bn_weight must be .*\[6\].*\[5\]": lambda t: {"bn_weight": t["bn_weight"][:5]},
    r"running_var must be .*dense": lambda t: {"running_var": torch.ones(12)[::2]},
    r"w_expand must be .*\[6, 2\]": lambda t: {"se": (t["w_reduce"], t["w_reduce"])},
    r"b_reduce must be .*\[2\].*\[6\]": lambda t: {"se": (t["w_reduce"], t["w_expand"], t["b_expand"], None)},
    r"b_expand must be .*\[6\].*\[2\]": lambda t: {"se": (t["w_reduce"], t["w_expand"], None, t["b_reduce"])},
    r"bn_bias must be on cpu.*meta": lambda t: {"bn_bias": t["bn_bias"].to("meta")},
    "activation must be relu, mish or none, got 'gelu'": lambda t: {"activation": "gelu"},
    "se_activation must be": lambda t: {"se_activation": "none"},
    "more than one value per channel": lambda t: {"conv_out": torch.ones(1, 6, 1, 1), "shortcut": None},
    "backend must be": lambda t: {"backend": "numba"},
    "float64 on cpu": lambda t: {"conv_out": t["conv_out"].double(), "shortcut": None, "backend": "triton"},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
    inputs = Case((2, 6, 3, 3), units=2).inputs(torch.float32)
    arguments = {name: inputs[name] for name in ("conv_out", "shortcut", "bn_weight", "bn_bias", "running_mean", "running_var")}
    scalars = {"training": True, "momentum": 0.1, "eps": 1e-5, "backend": "torch"}
    with pytest.raises(ValueError, match=f"residual_tail.*{message}"):
        residual_tail(**(arguments | scalars | BAD[message](inputs)))


def test_triton_wants_a_cuda_tensor_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = Case((2, 6, 3, 3))
    with pytest.raises(ValueError, match=r"triton needs a CUDA tensor.*\[2, 6, 3, 3\] float32 on cpu"):
        case.run(TRITON, case.inputs(torch.float32))
    torch.testing.assert_close(
        case.run(residual_tail, case.inputs(torch.float32)), case.run(reference.residual_tail, case.inputs(torch.float32))
    )


def test_importing_and_running_on_the_cpu_leaves_triton_alone():
    code = (
        "import sys, torch; from kernels.residual_tail import residual_tail as tail; v = torch.ones(4)\n"
        "tail(torch.randn(2, 4, 3, 3), None, v, v, v.clone(), v.clone(), training=True, momentum=0.1, eps=1e-5)\n"
        "import kernels.residual_tail_ops; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_measurements_are_kept_apart_by_what_there_is_to_fuse():
    assert variant(None, None, "relu") == "residual_tail/relu"
    assert variant(torch.ones(1), (torch.ones(1),), "mish") == "residual_tail/shortcut+se+mish"


@pytest.mark.parametrize("channels", [1, 3, 32, 40, 45, 64, 90, 128, 170, 185, 256, 340, 512, 1000])
def test_tiles_fit_the_chip(channels):
    for rows in (1, 4, 49, 1024, 512 * 1024):
        for largest in (2048, 4096, 8192):
            tile = row_tile(channels, rows, largest)
            assert tile.rows * tile.channels <= largest
            assert tile.rows < 2 * rows
            assert 1 <= tile.warps <= 8
        group = group_rows(channels, rows)
        assert group >= row_tile(channels, group).rows
        programs = -(-rows // group) * -(-channels // row_tile(channels, group).channels)
        assert programs <= 2 * residual_tail_tiles.PROGRAMS
    assert image_tile(channels, 16).channels >= channels
