"""`kernels.residual_tail`: as exact as eager PyTorch in every form, on every shape; one operator to the compiler."""

from collections import defaultdict
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastcifar.models import build_model, place
from kernels import backends
from kernels import residual_tail as tail
from kernels.residual_tail import fusable, reference, residual_tail, variant
from kernels.residual_tail.tiles import PROGRAMS, Tile, group_rows, image_tile, row_tile, together
from tests.conftest import run_cli
from tests.kernel_checks import DEVICE, SLACK, captured, poisoned_buffers, sample
from tests.tail_cases import FORMS, NUMBA, TRITON, Case

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
    Case((3, 45, 5, 5), "mish", 3, shortcut=False, se_activation="mish", se_last=True),
    Case((5, 8, 1, 1), "relu", 2, shortcut=False, se_last=True),
    Case((2, 170, 3, 3), "relu", 7, shortcut=False, biases=True, se_last=True),
]
EVALUATION = [replace(case, training=False) for case in TRAINING] + [Case((1, 8, 1, 1), "relu", 2, training=False)]
HARD = [TRAINING[i] for i in (0, 4, 8, 10, 16)] + [EVALUATION[i] for i in (0, 3, 10)]
BATCH = 512
REAL = [  # maps of the architectures, and some on the edge
    Case((BATCH, 32, 32, 32), "relu"),
    Case((BATCH, 64, 16, 16), "mish", 4, se_activation="mish"),
    Case((BATCH, 128, 8, 8), "relu", 8),
    Case((BATCH, 256, 4, 4), "relu", 16),
    Case((BATCH, 256, 8, 8), "mish", 16, se_activation="mish", biases=True),
    Case((BATCH, 45, 32, 32), "relu", shortcut=False),
    Case((BATCH, 48, 16, 16), "mish", shortcut=False),
    Case((BATCH, 90, 16, 16), "relu", 3),
    Case((BATCH, 170, 8, 8), "none", 7),
    Case((BATCH, 185, 2, 2), "relu"),
    Case((BATCH, 340, 4, 4), "relu", 14, shortcut=False),
    Case((7, 45, 5, 5), "mish", 2),
    Case((1, 64, 32, 32), "relu", 4),
    Case((BATCH, 32, 32, 32), "relu", training=False),
    Case((BATCH, 256, 8, 8), "mish", 16, training=False),
    Case((1, 185, 1, 1), "mish", 8, training=False),
    Case((BATCH, 45, 32, 32), "relu", 2, shortcut=False, biases=True, se_last=True),
    Case((BATCH, 340, 4, 4), "mish", 21, shortcut=False, se_last=True),
]
SMALL = Case((2, 6, 3, 3), "mish", 2, biases=True)
LAST = replace(SMALL, shortcut=False, se_last=True)
HALF_AND_SINGLE = [torch.float16, torch.float32]  # the interpreter rounds bfloat16 wrongly


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


# As exact as eager PyTorch


@pytest.mark.parametrize(("dtype", "case", "name"), sample(HALF_AND_SINGLE, TRAINING + EVALUATION, FORMS, every=13), ids=str)
def test_result_and_gradients_are_as_exact_as_eager_pytorch(dtype, case, name):
    case.check(FORMS[name], dtype)


@pytest.mark.parametrize(
    ("dtype", "case", "name", "kind"),
    sample(HALF_AND_SINGLE, HARD, FORMS, ["large", "tiny", "constant", "strided"], every=15),
    ids=str,
)
def test_hard_inputs(dtype, case, name, kind):
    case.check(FORMS[name], dtype, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "large", "tiny", "constant", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *HALF_AND_SINGLE], ids=str)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_real_shapes(form, case, dtype, kind):
    case.check(form, dtype, kind)


def test_in_float32_the_errors_of_all_cases_together_are_at_most_twice_eagers(form):
    """One case's error in float32 is a matter of luck: eager's sums may happen to be exact. Together they are not."""
    ours, eager = defaultdict(float), defaultdict(float)
    for case in TRAINING[1::4]:
        for name, errors in case.errors(form, torch.float32).items():
            ours[name] += errors[0] ** 2
            eager[name] += errors[1] ** 2
    assert len(ours) == 11
    for name, total in ours.items():
        assert total**0.5 <= SLACK * eager[name] ** 0.5, name


@pytest.mark.parametrize(
    "case",
    sample([Case((2, 8, 19, 19), "mish", 2), Case((3, 8, 19, 19)), Case((2, 8, 19, 19), units=2, training=False)], every=3),
    ids=str,
)
def test_more_rows_than_a_tile_more_groups_than_a_block(monkeypatch, case):
    from kernels.residual_tail import triton

    monkeypatch.setattr(triton, "row_tile", lambda *_, **__: Tile(32, 8))
    monkeypatch.setattr(triton, "sums_tile", lambda *_: Tile(32, 8))
    monkeypatch.setattr(triton, "channel_block", lambda _: Tile(2, 4))
    monkeypatch.setattr(triton, "group_rows", lambda *_: 100)
    case.check(TRITON, torch.float32)


@pytest.mark.parametrize(
    "case",
    [Case((2, 45, 4, 4), "mish", 3, biases=True), Case((2, 45, 4, 4), "relu"), Case((3, 90, 2, 2), shortcut=False)],
    ids=str,
)
def test_rows_of_several_positions(case):
    assert together(case.shape[1], 4, 4) > 1
    case.check(TRITON, torch.float32)


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 45, 4, 4), "relu", 3, shortcut=False, biases=True, se_last=True),
        Case((3, 6, 5, 3), "mish", 2, shortcut=False, training=False, se_activation="mish", se_last=True),
    ],
    ids=str,
)
def test_squeeze_excitation_may_come_last(form, case):
    case.check(form, torch.float32)


def test_more_images_than_a_block(monkeypatch):
    from kernels.residual_tail import triton

    monkeypatch.setattr(triton, "IMAGES_TILE", Tile(16, 16))
    Case((18, 4, 1, 1), "relu", 2, biases=True).check(TRITON, torch.float32)


@pytest.mark.parametrize("case", sample([TRAINING[0], TRAINING[8], EVALUATION[0], TRAINING[16]], every=2), ids=str)
def test_unfilled_memory_is_never_read(case):
    inputs = case.inputs(torch.float32)
    expected = case.run(TRITON, inputs)
    with poisoned_buffers():
        assert backends.unfilled(inputs["bn_bias"], 3).isnan().all()
        assert_equal(case.run(TRITON, inputs), expected)


@pytest.mark.parametrize(
    ("kind", "shape", "per_image"),
    sample(
        ["normal", "outlier", "equal"], [(8, 20, 6, 6), (16, 45, 8, 8), (4, 7, 5, 3), (32, 33, 4, 4)], [False, True], every=5
    ),
)
def test_statistics_are_exact_to_a_millionth(shape, kind, per_image):
    """Also where the mean is a small difference of large sums, and where one value outweighs all others."""
    torch.manual_seed(0)
    x = torch.full(shape, 0.1) if kind == "equal" else torch.randn(shape)
    if kind == "outlier":
        x[0, :, 0, 0] = 1000
    x = x.to(DEVICE, memory_format=torch.channels_last)
    running_mean, running_var = torch.zeros(shape[1], device=DEVICE), torch.ones(shape[1], device=DEVICE)
    _, mean, variance = tail._statistics(x, running_mean, running_var, 0.1, per_image)
    true, exact = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)
    if kind == "equal":
        assert torch.equal(mean, x[0, :, 0, 0])
        assert torch.equal(variance, torch.zeros_like(variance))
    else:
        assert ((mean - true).abs() / exact.sqrt()).max() < 3e-7
        assert ((variance - exact).abs() / exact).max() < 1e-6
    assert ((running_mean - 0.1 * true).abs() / (exact.sqrt() + true.abs())).max() < 5e-8
    count = x[:, 0].numel()
    moved = 0.9 + 0.1 * exact * count / (count - 1)
    assert ((running_var - moved).abs() / moved).max() < 1e-6


@pytest.mark.parametrize("units", [0, 2])
def test_running_statistics_are_batch_norms(form, units):
    case = Case((3, 48, 5, 5), units=units)
    bn = nn.BatchNorm2d(48, momentum=0.3).to(DEVICE)
    mean, var = torch.zeros(48, device=DEVICE), torch.ones(48, device=DEVICE)
    inputs = case.inputs(torch.float32)
    se = (inputs["w_reduce"], inputs["w_expand"]) if units else None
    for seed in range(3):
        x = inputs["conv_out"] * (seed + 1) + seed
        bn(x)
        form(x, None, bn.weight, bn.bias, mean, var, training=True, momentum=0.3, eps=1e-5, se=se)
    for _ in range(2):
        torch.testing.assert_close(mean, bn.running_mean)
        torch.testing.assert_close(var, bn.running_var)
        form(x, None, bn.weight, bn.bias, mean, var, training=False, momentum=0.3, eps=1e-5, se=se)  # moves nothing


@pytest.mark.parametrize(
    ("activation", "linear", "shortcut", "training"),
    sample(
        ["relu", "mish", "none"],
        [(), ("w_reduce", "w_expand"), ("w_reduce", "w_expand", "b_reduce", "b_expand")],
        [True, False],
        [True, False],
        every=5,
    ),
)
def test_gradcheck(activation, linear, shortcut, training):
    drawn = Case((3, 3, 2, 2), units=2).inputs(torch.float32)
    names = ["conv_out", *["shortcut"] * shortcut, "bn_weight", "bn_bias", *linear]

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return FORMS["fusable"](
            given["conv_out"], given.get("shortcut"), given["bn_weight"], given["bn_bias"],
            *(drawn[name].double().cpu() for name in ("running_mean", "running_var")),
            training=training, momentum=0.1, eps=1e-5, se=tuple(given[name] for name in linear) or None, se_activation="mish",
            activation=activation,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, [drawn[name].double().cpu().requires_grad_() for name in names])


# One operator to PyTorch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interpreting", "case"),
    sample([True, False], [SMALL, replace(SMALL, units=0, shortcut=False, activation="relu", biases=False), LAST], every=3),
    ids=str,
)
def test_operators_keep_their_promises(monkeypatch, case, interpreting):
    monkeypatch.setattr(backends, "interpreting", lambda: interpreting)
    inputs = case.inputs(torch.float32)
    x, shortcut, gradient, weight, bias, mean, var, *linear = inputs.values()
    statistics = (x, mean.clone(), var.clone(), 0.1, case.units > 0 and not case.se_last)
    torch.library.opcheck(tail._statistics, statistics)
    image_mean, mean, var = tail._statistics(*statistics)
    image_mean, linear = image_mean if statistics[-1] else None, linear if case.units else [None] * 4
    leaves = [x, shortcut if case.shortcut else None, weight, bias, *linear]
    settings = fusable.Settings(True, 1e-5, "mish", case.activation, case.se_last)
    _, *excited = tail._tail(*leaves, image_mean, mean, var, *settings)
    kept = (image_mean, mean, var, *(excited if case.units else (None, None)))
    torch.library.opcheck(tail._tail_backward, (gradient, *leaves, *kept, *settings))
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    torch.library.opcheck(tail._tail, (*leaves, image_mean, mean, var, *settings))


COMPILED = [
    SMALL,
    LAST,
    replace(SMALL, units=0, activation="none", training=False),
    replace(SMALL, biases=False, activation="none", shortcut=False, training=False),
]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("case", "name", "dtype"), sample(COMPILED, FORMS, HALF_AND_SINGLE, every=7), ids=str)
def test_compiles_into_one_graph(backend, case, name, dtype):
    form = FORMS[name]
    inputs = case.inputs(dtype)
    torch._dynamo.reset()
    found = case.run(torch.compile(form, fullgraph=True, backend=backend), inputs)
    expected = case.run(form, inputs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_autocast_changes_nothing_between_the_convolutions(form):
    inputs = SMALL.inputs(torch.bfloat16)
    expected = SMALL.run(form, inputs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_equal(SMALL.run(form, inputs), expected)


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
    r"bn_bias must be on .*meta": lambda t: {"bn_bias": t["bn_bias"].to("meta")},
    "se_last must have squeeze-excitation and no shortcut": lambda t: {"se_last": True},
    "shortcut_bn must have a shortcut": lambda t: {"shortcut": None, "shortcut_bn": (t["bn_weight"],) * 4},
    r"bn_bias must be .*\[6\].*\[5\]": lambda t: {
        "shortcut_bn": (t["bn_weight"], t["bn_bias"][:5], t["bn_bias"], t["bn_bias"])
    },
    "activation must be relu, mish or none, got 'gelu'": lambda t: {"activation": "gelu"},
    "se_activation must be": lambda t: {"se_activation": "none"},
    "more than one value per channel": lambda t: {"conv_out": t["conv_out"][:1, :, :1, :1], "shortcut": None},
    "backend must be": lambda t: {"backend": "cuda"},
    "numba takes .*float16": lambda t: {"conv_out": t["conv_out"].half(), "shortcut": None, "backend": "numba"},
    "float64 on": lambda t: {"conv_out": t["conv_out"].double(), "shortcut": None, "backend": "triton"},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
    inputs = SMALL.inputs(torch.float32)
    arguments = {name: inputs[name] for name in ("conv_out", "shortcut", "bn_weight", "bn_bias", "running_mean", "running_var")}
    scalars = {"training": True, "momentum": 0.1, "eps": 1e-5, "backend": "torch"}
    with pytest.raises(ValueError, match=f"residual_tail.*{message}"):
        residual_tail(**(arguments | scalars | BAD[message](inputs)))


@pytest.mark.slow
def test_triton_wants_a_cuda_tensor_outside_the_interpreter():
    """And importing or running on the CPU does not import Triton."""
    code = (
        "import sys, torch; from kernels.residual_tail import residual_tail; v = torch.ones(4)\n"
        "given = torch.ones(2, 4, 3, 3), None, v, v, v.clone(), v.clone()\n"
        "options = dict(training=True, momentum=0.1, eps=1e-5)\n"
        "residual_tail(*given, **options); assert 'triton' not in sys.modules\n"
        "residual_tail(*given, **options, backend='triton')"
    )
    process = run_cli("-c", code, env={"TRITON_INTERPRET": "0"})
    expected = "triton needs a CUDA tensor (or TRITON_INTERPRET=1), got [2, 4, 3, 3] float32 on cpu"
    assert process.stderr.splitlines()[-1].endswith(expected)


@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, NUMBA), (torch.float16, reference.residual_tail)])
def test_on_the_cpu_auto_is_numba_where_it_can_serve(dtype, form):
    inputs = {name: x.cpu() for name, x in SMALL.inputs(dtype).items()}
    assert_equal(SMALL.run(residual_tail, inputs), SMALL.run(form, inputs))


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
        assert programs <= 2 * PROGRAMS
    assert image_tile(channels, 16).channels >= channels


# On a GPU: captured, compiled in a network, and beyond 2^31 elements


@pytest.mark.gpu
@pytest.mark.parametrize("case", [REAL[i] for i in (0, 2, 4, 6, 13, 14)], ids=str)
def test_twice_the_same_is_the_same_to_the_bit_and_a_captured_graph_replays_it_on_new_inputs(case):
    inputs, fresh = (case.inputs(torch.bfloat16, kind) for kind in ("plain", "large"))
    expected = case.run(TRITON, fresh)
    assert_equal(case.run(TRITON, fresh), expected)
    graph, found = captured(lambda: case.run(TRITON, inputs))
    for name, x in inputs.items():
        x.copy_(fresh[name])
    graph.replay()
    assert_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "triton", "fusable"])
@pytest.mark.parametrize("arch", ["mish_se_resnet18", "light_resnet18"])
def test_a_network_compiles_into_one_graph_and_learns_the_same(arch, kernels):
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    expected, gradients = None, None
    baseline = place(build_model(arch, kernels="torch"), DEVICE)
    state = deepcopy(baseline.state_dict())
    for model in (baseline, place(build_model(arch, kernels=kernels), DEVICE)):
        model.load_state_dict(state)
        forward = model if model is baseline else torch.compile(model, fullgraph=True, dynamic=False)
        with torch.autocast("cuda", torch.bfloat16):
            logits = forward(images)
        logits.float().square().mean().backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        if expected is None:
            expected, gradients = logits.detach().float(), found
    assert torch.nn.functional.cosine_similarity(logits.float().flatten(), expected.flatten(), 0) > 0.99
    assert torch.nn.functional.cosine_similarity(found, gradients, 0) > 0.9
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, baseline.get_buffer(name), rtol=0.05, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("units", [0, 4])
def test_more_than_2_to_the_31_elements(units):
    images = 2**31 // (64 * 1024) + 2
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    few = Case((2, 64, 32, 32), "relu", units)
    inputs = few.inputs(torch.bfloat16)
    for name in ("conv_out", "shortcut", "gradient"):  # copies of one image: the batch's statistics are its own
        inputs[name] = inputs[name][:1].expand(2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    expected = few.run(TRITON, inputs)
    for name in ("conv_out", "shortcut", "gradient"):
        inputs[name] = inputs[name][:1].expand(images, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    found = Case((images, 64, 32, 32), "relu", units).run(TRITON, inputs)
    for name in ("result", "gradient of shortcut", "gradient of conv_out"):
        for image in (0, images // 2, images - 1):
            torch.testing.assert_close(found[name][image], expected[name][0], rtol=0.02, atol=0.02)
