"""Mish and squeeze-excitation on a CUDA device together: compiled by Inductor, captured, and beyond 2^31 elements."""

from functools import partial

import pytest
import torch

from kernels.mish import mish
from kernels.mish.reference import mish as eager_mish
from kernels.squeeze_excite import squeeze_excite
from kernels.squeeze_excite.reference import squeeze_excite as eager_squeeze_excite
from tests.test_mish import triton_mish
from tests.test_squeeze_excite import CHANNELS_LAST, call, drawn, triton_se

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_both_compile_into_one_graph(backend):
    draw = drawn(4, 45, 8, 8, 3)[0]
    leaves = [t.requires_grad_() for t in draw]
    function = call(partial(squeeze_excite, backend=backend))
    compiled = torch.compile(lambda *a: 2 * mish(function(*a), backend=backend), fullgraph=True)
    y, expected = compiled(*leaves), 2 * eager_mish(call(eager_squeeze_excite)(*leaves))
    torch.testing.assert_close(y, expected)
    gradients = (torch.autograd.grad(t.sum(), leaves) for t in (y, expected))
    torch.testing.assert_close(*map(list, gradients), atol=1e-4, rtol=1e-4)


def test_a_captured_graph_replays_forward_and_backward():
    first, second = drawn(64, 90, 8, 8, 5, dtype=torch.bfloat16, parameters=torch.float32)[:2]
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
    x = torch.zeros(6400, 340, 32, 32, dtype=torch.float16, device="cuda").to(memory_format=CHANNELS_LAST)
    assert x.numel() > 2**31
    draw = drawn(2, 340, 32, 32, 21, dtype=torch.float16)[0]
    x[-2:] = draw[0]
    assert torch.equal(triton_mish(x)[-2:], triton_mish(draw[0]))
    assert torch.equal(call(triton_se)(x, *draw[1:])[-2:], call(triton_se)(*draw))
