"""The loops over a CPU's maps: as exact as eager PyTorch, the same bits with any number of threads."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from kernels import backends
from kernels.mish import mish
from kernels.residual_tail import numba
from kernels.squeeze_excite import reference, squeeze_excite
from tests.kernel_checks import assert_gradients_as_exact_as_eager, poisoned_buffers
from tests.tail_cases import NUMBA, Case
from tests.test_mish import LAYOUTS as MISH_LAYOUTS
from tests.test_mish import normal
from tests.test_residual_tail import EVALUATION, HARD, SMALL, TRAINING, assert_equal
from tests.test_squeeze_excite import LAYOUTS, call, drawn

DTYPES = [torch.bfloat16, torch.float32]
WIDE = Case((2, 1100, 3, 3), "mish", 2)  # more channels than lanes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*TRAINING, *EVALUATION, WIDE], ids=str)
def test_a_tail_is_as_exact_as_eager_pytorch(case, dtype):
    case.check(NUMBA, dtype)


@pytest.mark.parametrize("kind", ["large", "tiny", "constant", "strided"])
@pytest.mark.parametrize("case", HARD, ids=str)
def test_hard_inputs(case, kind):
    for dtype in DTYPES:
        case.check(NUMBA, dtype, kind)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("shape", [(8, 20, 6, 6), (16, 45, 8, 8), (4, 7, 5, 3), (32, 33, 4, 4), (2, 8, 32, 32), (9, 340, 1, 1)])
@pytest.mark.parametrize("kind", ["far", "outlier", "equal"])
def test_statistics_are_exact_to_a_millionth(shape, kind, per_image):
    """Also 1000 deviations from 0, and where one value outweighs all others."""
    torch.manual_seed(0)
    x = torch.full(shape, 0.1) if kind == "equal" else torch.randn(shape) + (1000 if kind == "far" else 0)
    if kind == "outlier":
        x[0, :, 0, 0] = 1000
    x = x.contiguous(memory_format=torch.channels_last)
    image_mean, mean, variance = numba.statistics(x, torch.zeros(shape[1]), torch.ones(shape[1]), 0.1, per_image)
    true, exact = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)
    if kind == "equal":
        assert torch.equal(mean, x[0, :, 0, 0])
        assert torch.equal(variance, torch.zeros_like(variance))
    else:
        assert ((mean - true).abs() <= 1.2e-7 * true.abs() + 3e-7 * exact.sqrt()).all()
        assert ((variance - exact).abs() / exact).max() < (5e-6 if kind == "far" else 1e-6)  # a mean of 1000 is off by 3e-5
    if per_image:
        off = (image_mean - x.double().mean((2, 3))).abs()
        assert (off <= 1.2e-7 * image_mean.abs() + 1e-6 * x.double().std((2, 3), correction=0)).all()


@pytest.mark.parametrize("case", [TRAINING[0], TRAINING[8], EVALUATION[0]], ids=str)
def test_unfilled_memory_is_never_read(case):
    inputs = case.inputs(torch.bfloat16)
    expected = case.run(NUMBA, inputs)
    with poisoned_buffers():
        assert_equal(case.run(NUMBA, inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    threads = torch.get_num_threads()
    case = replace(SMALL, shape=(7, 45, 5, 3))
    inputs = case.inputs(dtype)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(case.run(NUMBA, inputs))
    finally:
        torch.set_num_threads(threads)
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


# Squeeze-excitation and Mish by themselves


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 45, 8, 6, 2), (2, 90, 4, 4, 5), (3, 170, 1, 1, 10), (2, 340, 2, 2, 21), (1, 1100, 3, 3, 4)]
)
def test_squeeze_excitation_is_as_exact_as_eagers(shape, dtype):
    draws = drawn(*shape, dtype=dtype, parameters=torch.float32, biases=shape[1] % 2 == 0)
    ours = call(partial(squeeze_excite, backend="numba"), "mish")
    assert_gradients_as_exact_as_eager(ours, call(reference.squeeze_excite, "mish"), *draws)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_squeeze_excitation_of_any_layout(layout):
    change, expected = LAYOUTS[layout]
    draws = [[change(x), *parameters] for x, *parameters in drawn(2, 5, 3, 4, 2)]
    ours = call(partial(squeeze_excite, backend="numba"))
    assert_gradients_as_exact_as_eager(ours, call(reference.squeeze_excite), *draws)
    assert ours(*draws[0]).is_contiguous(memory_format=expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", MISH_LAYOUTS)
def test_mish_is_as_exact_as_eagers(layout, dtype):
    x = MISH_LAYOUTS[layout](normal(2, 6, 4, 5).to(dtype))
    ours = partial(mish, backend="numba")
    assert ours(x).stride() == torch.nn.functional.mish(x).stride()
    assert_gradients_as_exact_as_eager(ours, torch.nn.functional.mish, [x])


# Compiled, the operators call the same loops


@pytest.mark.slow
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, units=0, shortcut=False, activation="relu", biases=False)], ids=str)
def test_compiles_into_one_graph(monkeypatch, case):
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    calls = []
    original = numba.gradients
    monkeypatch.setattr(numba, "gradients", lambda *given: calls.append(given) or original(*given))
    inputs = case.inputs(torch.float32)
    torch._dynamo.reset()
    found = case.run(torch.compile(NUMBA, fullgraph=True, backend="aot_eager"), inputs)
    assert len(calls) == 1
    assert_equal(found, case.run(NUMBA, inputs))


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("mish", "numba"), ("squeeze_excite", "numba"), ("residual_tail/mish", "numba"), ("residual_tail/se+none", "numba"),
        ("residual_tail/shortcut+se+relu", "numba"), ("residual_tail/shortcut+relu", "torch"), ("residual_tail/none", "torch"),
    ],
)  # fmt: skip
def test_auto_takes_numba_where_there_is_mish_or_squeeze_excitation(kind, form):
    assert backends.resolve(kind, "auto", torch.ones(1)) == form
    assert backends.resolve(kind, "auto", torch.ones(1).half()) == "torch"
