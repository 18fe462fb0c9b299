"""What PyTorch asks of the operators behind `mish` and `squeeze_excite`: one each way, in any layout, compiled or captured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.mish import _mish, _mish_backward, mish
from kernels.mish.reference import mish as eager_mish
from kernels.squeeze_excite import _squeeze_excite, _squeeze_excite_backward, squeeze_excite
from kernels.squeeze_excite.reference import squeeze_excite as eager_squeeze_excite
from tests.kernel_checks import DEVICE, captured, poisoned_buffers, sample
from tests.test_squeeze_excite import CHANNELS_LAST, call, inputs

LAYOUTS = [CHANNELS_LAST, torch.contiguous_format]


def mish_inputs(*shape: int, memory_format=CHANNELS_LAST, gaps: bool = False, **_) -> list[Tensor]:
    x = 3 * torch.randn(shape[:4], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return [(torch.cat([x, x], 3)[..., ::2] if gaps else x).to(memory_format=memory_format)]


@dataclass(frozen=True)
class Case:
    """inputs: for N, C, H, W, R. opchecks: operators with their arguments, from inputs."""

    function: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    inputs: Callable[..., list[Tensor | None]]
    opchecks: Callable[..., list[tuple[Callable[..., object], tuple[object, ...]]]]

    def leaves(self, *shape: int, **options: object) -> list[Tensor | None]:
        return [t if t is None else t.requires_grad_() for t in self.inputs(*(shape or (2, 5, 3, 4, 2)), **options)]


def of_squeeze_excite(x, w_reduce, w_expand, *biases):
    hidden, scale = torch.randn(2, 2, device=DEVICE), torch.rand(2, 5, device=DEVICE)
    fixed = [t.detach() for t in (torch.randn_like(x), x, hidden, scale, w_reduce, w_expand)]
    return [
        (_squeeze_excite, (x, w_reduce, w_expand, *biases, "mish", "triton")),
        (_squeeze_excite_backward, (*fixed, "relu", "triton")),
    ]


MISH = Case(
    mish, eager_mish, mish_inputs,
    lambda x: [(_mish, (x, "triton")), (_mish_backward, (torch.ones_like(x), x.detach(), "triton"))],
)  # fmt: skip
SQUEEZE_EXCITE = Case(
    lambda *leaves, backend: call(partial(squeeze_excite, backend=backend))(*leaves), call(eager_squeeze_excite), inputs,
    of_squeeze_excite,
)  # fmt: skip
CASES = pytest.mark.parametrize("case", [MISH, SQUEEZE_EXCITE], ids=["mish", "squeeze_excite"])


@CASES
@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_every_element_is_written(case, memory_format):
    leaves = case.leaves(2, 45, 3, 3, 5, memory_format=memory_format)
    with poisoned_buffers():
        y = case.function(*leaves, backend="triton")
        y.sum().backward()  # an expanded gradient
    assert all(t.isfinite().all() for t in (y, *(leaf.grad for leaf in leaves)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options", "interpret", "memory_format"),  # "0": the CPU's own implementation
    [*sample([MISH], [{}, {"gaps": True}], ["1", "0"], LAYOUTS, every=3),
     *sample([SQUEEZE_EXCITE], [{}, {"biases": False}], ["1", "0"], LAYOUTS, every=7)],
)  # fmt: skip
def test_the_operators_keep_pytorchs_rules(case, options, interpret, memory_format, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    for operator, arguments in case.opchecks(*case.leaves(memory_format=memory_format, **options)):
        torch.library.opcheck(operator, arguments)


@CASES
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.gpu])])
@pytest.mark.parametrize("backend", sample(["triton", "torch", "auto"], every=3))
def test_it_compiles_into_one_graph(case, backend, compiler):
    leaves = case.leaves()
    torch._dynamo.reset()  # one lambda for all cases: the compiler would call a halt to compiling it again
    compiled = torch.compile(lambda *a: 2 * case.function(*a, backend=backend), fullgraph=True, backend=compiler)
    y, expected = compiled(*leaves), 2 * case.eager(*leaves)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    gradients = (torch.autograd.grad(t.sum(), leaves) for t in (y, expected))
    torch.testing.assert_close(*map(list, gradients))


@CASES
def test_no_sample_no_work(case):
    leaves = case.leaves(0, 5, 3, 4, 2)
    case.function(*leaves, backend="triton").sum().backward()
    assert all(leaf.grad.shape == leaf.shape and leaf.grad.count_nonzero() == 0 for leaf in leaves)


@CASES
def test_triton_on_the_cpu_needs_the_interpreter(case, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        ValueError, match=r"triton needs a CUDA tensor \(or TRITON_INTERPRET=1\), got \[2, 5, 3, 4\] float32 on cpu"
    ):
        case.function(*(t.cpu() for t in case.inputs(2, 5, 3, 4, 2)), backend="triton")


# On a GPU


def both(*leaves: Tensor | None, backend: str = "triton") -> Tensor:
    return mish(call(partial(squeeze_excite, backend=backend), "mish")(*leaves), backend=backend)


@pytest.mark.gpu
def test_a_captured_graph_replays_forward_and_backward():
    first, second = (inputs(64, 90, 8, 8, 5, dtype=torch.bfloat16, parameters=torch.float32, seed=seed) for seed in (0, 1))
    leaves = [t.requires_grad_() for t in first]

    def step():
        y = both(*leaves)
        return y, *torch.autograd.grad(y.float().square().sum(), leaves)

    graph, results = captured(step)
    with torch.no_grad():
        for leaf, value in zip(leaves, second, strict=True):
            leaf.copy_(value)
    graph.replay()
    for replayed, expected in zip(results, step(), strict=True):
        assert torch.equal(replayed, expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    x = torch.zeros(6400, 340, 32, 32, dtype=torch.float16, device="cuda").to(memory_format=CHANNELS_LAST)
    assert x.numel() > 2**31
    few = inputs(2, 340, 32, 32, 21, dtype=torch.float16)
    x[-2:] = few[0]
    for function in (lambda x, *_: mish(x, backend="triton"), call(partial(squeeze_excite, backend="triton"))):
        assert torch.equal(function(x, *few[1:])[-2:], function(*few))
