"""Mish and squeeze-excitation on a CUDA device: the comparisons of the interpreter, bfloat16, large maps, capture."""

from functools import partial

import pytest
import torch

from kernels import mish, reference, squeeze_excite
from kernels.mish import _mish
from kernels.squeeze_excite import _squeeze_excite
from tests import test_mish, test_squeeze_excite
from tests.kernel_checks import assert_as_exact_as_eager, assert_gradients_as_exact_as_eager, poisoned_buffers
from tests.test_mish import all_bf16, exact_mish, normal, triton_mish
from tests.test_squeeze_excite import CHANNELS_LAST, call, drawn, triton_se

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TRAINED = [(512, 48, 32, 32, 3), (512, 90, 16, 16, 5), (512, 170, 8, 8, 10), (512, 340, 4, 4, 21), (128, 185, 16, 16, 11)]


def on_device(draws):
    return [[None if t is None else t.to(DEVICE) for t in draw] for draw in draws]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*test_mish.SHAPES, (), (7,), (3, 1025), (512, 48, 32, 32), (512, 340, 4, 4)])
def test_mish_is_as_exact_as_eager(shape, dtype):
    assert_gradients_as_exact_as_eager(triton_mish, reference.mish, *on_device([[normal(*shape, dtype=dtype)]]))


@pytest.mark.parametrize("layout", test_mish.LAYOUTS)
def test_mish_lies_in_memory_as_eagers_does(layout):
    x = test_mish.LAYOUTS[layout](normal(2, 6, 4, 5).to(DEVICE))
    assert triton_mish(x).stride() == reference.mish(x).stride()
    assert_as_exact_as_eager(triton_mish(x), reference.mish(x), reference.mish(x.double()))


def test_mish_of_all_bfloat16_values():
    x = all_bf16().to(DEVICE)
    leaf = x.clone().requires_grad_()
    y = triton_mish(leaf)
    y.sum().backward()
    for result, exact, floor in zip((y, leaf.grad), exact_mish(x), (1e-37, 1e-6), strict=True):
        assert result.isfinite().all()
        close = (result.double() - exact).abs() <= 1.01 * 2**-8 * exact.abs() + floor
        assert close.all(), x[~close]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [CHANNELS_LAST, torch.contiguous_format])
@pytest.mark.parametrize("shape", [*test_squeeze_excite.SHAPES, *TRAINED])
def test_squeeze_excite_is_as_exact_as_eager(shape, memory_format, dtype):
    number = shape[1]
    draws = on_device(drawn(*shape, dtype=dtype, biases=number % 2 == 0, memory_format=memory_format))
    activation = ("relu", "mish")[number // 2 % 2]
    functions = call(triton_se, activation), call(reference.squeeze_excite, activation)
    assert_gradients_as_exact_as_eager(*functions, *draws)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squeeze_excite_under_autocast(dtype):
    def under_autocast(function):
        def run(*arguments):
            with torch.autocast(DEVICE, dtype, enabled=arguments[0].dtype != torch.float64):
                return call(function)(*arguments)

        return run

    draws = on_device(drawn(64, 90, 8, 8, 5, dtype=dtype, parameters=torch.float32))
    assert_gradients_as_exact_as_eager(under_autocast(triton_se), under_autocast(reference.squeeze_excite), *draws)


@pytest.mark.parametrize("memory_format", [CHANNELS_LAST, torch.contiguous_format])
def test_every_element_is_written(memory_format):
    (draw,) = on_device([drawn(7, 45, 9, 9, 5, memory_format=memory_format)[0]])
    leaves = [t.requires_grad_() for t in draw]
    with poisoned_buffers():
        y = triton_mish(call(triton_se)(*leaves))
        y.sum().backward()
    assert all(t.isfinite().all() for t in (y, *(t.grad for t in leaves)))


def test_the_operators_keep_pytorchs_rules():
    x, *parameters = (t.requires_grad_() for t in on_device([drawn(2, 5, 3, 4, 2)[0]])[0])
    torch.library.opcheck(_mish, (x,))
    torch.library.opcheck(_squeeze_excite, (x, *parameters, "mish"))


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_both_compile_into_one_graph(backend):
    (draw,) = on_device([drawn(4, 45, 8, 8, 3)[0]])
    leaves = [t.requires_grad_() for t in draw]
    function = call(partial(squeeze_excite, backend=backend))
    compiled = torch.compile(lambda *a: 2 * mish(function(*a), backend=backend), fullgraph=True)
    y, expected = compiled(*leaves), 2 * reference.mish(call(reference.squeeze_excite)(*leaves))
    torch.testing.assert_close(y, expected)
    gradients = (torch.autograd.grad(t.sum(), leaves) for t in (y, expected))
    torch.testing.assert_close(*map(list, gradients), atol=1e-4, rtol=1e-4)


def test_a_captured_graph_replays_forward_and_backward():
    first, second = on_device(drawn(64, 90, 8, 8, 5, dtype=torch.bfloat16, parameters=torch.float32)[:2])
    leaves = [t.requires_grad_() for t in first]

    def step():
        y = triton_mish(call(triton_se, "mish")(*leaves))
        return y, *torch.autograd.grad(y.float().square().sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf, value in zip(leaves, second, strict=True):
            leaf.copy_(value)
    graph.replay()
    for replayed, expected in zip(captured, step(), strict=True):
        assert torch.equal(replayed, expected)


def test_more_than_two_to_the_31_elements():
    x = torch.zeros(6400, 340, 32, 32, dtype=torch.float16, device=DEVICE).to(memory_format=CHANNELS_LAST)
    assert x.numel() > 2**31
    (draw,) = on_device([drawn(2, 340, 32, 32, 21, dtype=torch.float16)[0]])
    x[-2:] = draw[0]
    assert torch.equal(triton_mish(x)[-2:], triton_mish(draw[0]))
    assert torch.equal(call(triton_se)(x, *draw[1:])[-2:], call(triton_se)(*draw))
