"""Mish: as exact as eager PyTorch, value and slope, in every layout; finite wherever it should be; one operator to PyTorch."""

import pytest
import torch
from torch import Tensor

from kernels.mish import _mish, _mish_backward, mish, reference
from tests.kernel_checks import DEVICE, assert_as_exact_as_eager, assert_gradients_as_exact_as_eager, poisoned_buffers, sample

CHANNELS_LAST = torch.channels_last
DTYPES = [torch.float32, torch.float16] if DEVICE.type == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 45, 1, 1), (2, 48, 4, 4), (1, 90, 8, 8), (3, 170, 2, 2), (1, 185, 7, 5), (1, 340, 3, 3), (1, 5, 32, 32)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=CHANNELS_LAST),
    "permuted": lambda x: x.permute(3, 0, 2, 1),
    "batch slice": lambda x: torch.cat([x, x])[1:],
    "channel slice": lambda x: torch.cat([x, x], 1).to(memory_format=CHANNELS_LAST)[:, 3 : 3 + x.shape[1]],
    "every other": lambda x: torch.cat([x, x], 3)[..., ::2],
    "expanded": lambda x: x[:, :, :1].expand_as(x),
}


def triton_mish(x: Tensor) -> Tensor:
    return mish(x, backend="triton")


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


HARD = {
    "large": lambda x: 1e4 * x.clamp(-1, 1),
    "tiny": lambda x: 1e-4 * x,
    "constant": lambda x: torch.full_like(x, -1.19),
    "zero": torch.zeros_like,
    "mixed": lambda x: x * 10 ** torch.linspace(-4, 4, 45)[:, None, None].clamp(max=3.9),
}


@pytest.mark.parametrize(("dtype", "shape"), sample(DTYPES, [*SHAPES, (), (7,), (3, 1025), (2, 3, 4, 5, 6)], every=4), ids=str)
def test_value_and_slope_are_as_exact_as_eagers(dtype, shape):
    assert_gradients_as_exact_as_eager(triton_mish, reference.mish, [normal(*shape).to(DEVICE, dtype)])


@pytest.mark.parametrize(("values", "dtype"), sample(HARD, DTYPES, every=3))
def test_hard_values(values, dtype):
    x = HARD[values](normal(2, 45, 4, 4, scale=1.0)).to(DEVICE, dtype)
    assert_gradients_as_exact_as_eager(triton_mish, reference.mish, [x])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_result_lies_in_memory_as_eagers_does(layout):
    x = LAYOUTS[layout](normal(2, 6, 4, 5).to(DEVICE))
    ours, eager = x.detach().requires_grad_(), x.detach().requires_grad_()
    result, expected = triton_mish(ours), reference.mish(eager)
    assert result.stride() == expected.stride()
    gradient = normal(*result.shape, scale=1.0).to(DEVICE)  # contiguous: not the layout of every x
    result.backward(gradient)
    expected.backward(gradient)
    exact = x.double().requires_grad_()
    reference.mish(exact).backward(gradient.double())
    assert_as_exact_as_eager(result, expected, reference.mish(x.double()))
    assert_as_exact_as_eager(ours.grad, eager.grad, exact.grad)


def test_every_element_is_written():
    x = normal(3, 45, 5, 5).to(DEVICE).requires_grad_()
    with poisoned_buffers():
        y = triton_mish(x)
        y.sum().backward()  # an expanded gradient
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def all_bf16() -> Tensor:
    """Each finite bfloat16 value."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    return x[x.isfinite()].to(DEVICE)


def mish_formula(x: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's formula in float32, as PyTorch operations, for what the interpreter's bfloat16 cannot show."""
    e = x.clamp(max=20).exp()
    q = e * (e + 2)
    w = 1 / (q + 2)
    return x * (q / (q + 2)), torch.where(x > 20, 1, q * w + x * (4 * e * (e + 1) * w * w))


def exact_mish(x: Tensor) -> tuple[Tensor, Tensor]:
    exact = x.double().requires_grad_()
    y = reference.mish(exact)
    y.sum().backward()
    return y.detach(), exact.grad


@pytest.mark.parametrize("implementation", ["triton", "formula"])
def test_all_bfloat16_values_give_finite_results(implementation):
    x = all_bf16()
    assert len(x) == 65536 - 256  # 254 NaN, two infinities
    if implementation == "triton":
        leaf = x.clone().requires_grad_()
        y = triton_mish(leaf)
        y.sum().backward()
        value, slope = y.detach(), leaf.grad
        unit = 2**-7 if DEVICE.type == "cpu" else 2**-8  # the interpreter truncates: a whole unit in the last place
    else:
        value, slope = (result.bfloat16() for result in mish_formula(x.float()))
        unit = 2**-8  # rounded: half a unit
    exact_value, exact_slope = exact_mish(x)
    for result, exact in ((value, exact_value), (slope, exact_slope)):
        assert result.isfinite().all()
        # Absolutely, half a unit at the size of terms that cancel where the slope crosses zero; float32's smallest normals.
        close = (result.double() - exact).abs() <= 1.01 * unit * exact.abs() + 1e-7 * (result is slope) + 1e-37
        assert close.all(), x[~close]


def test_nan_and_infinity_are_eagers():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)
    torch.testing.assert_close(triton_mish(x), reference.mish(x), equal_nan=True)


@pytest.mark.parametrize(
    ("interpret", "x"),
    sample(["1", "0"], [normal(2, 3, 4, 5), normal(2, 3, 4, 5).to(memory_format=CHANNELS_LAST), normal(3, 8)[:, ::2]], every=4),
)
def test_the_operators_keep_pytorchs_rules(interpret, x, monkeypatch):
    x = x.to(DEVICE)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)  # "0": the CPU's own implementation
    torch.library.opcheck(_mish, (x.detach().requires_grad_(),))
    torch.library.opcheck(_mish_backward, (torch.ones_like(x), x))


@pytest.mark.parametrize("backend", sample(["triton", "torch", "auto"], every=3))
def test_it_compiles_into_one_graph(backend):
    x = normal(2, 5, 3, 3).to(DEVICE).requires_grad_()
    compiled = torch.compile(lambda x: 2 * mish(x + 1, backend=backend), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(2 * reference.mish(x + 1).sum(), x)
    torch.testing.assert_close(compiled(x), 2 * reference.mish(x + 1))
    torch.testing.assert_close(gradient, expected)


def test_autocast_leaves_the_dtype():
    for dtype in (torch.float32, torch.float16):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert triton_mish(normal(4, dtype=dtype).to(DEVICE)).dtype == dtype


def test_gradient_of_the_cpus_own_operator(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert torch.autograd.gradcheck(_mish, normal(2, 3, 4).double().requires_grad_())


def test_nothing_in_nothing_out():
    x = torch.empty(0, 3, 4, 4, requires_grad=True, device=DEVICE)
    triton_mish(x).sum().backward()
    assert x.grad.shape == x.shape


def test_bad_input_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"x must be of a floating-point dtype, got \[3\] int64 on cpu"):
        mish(torch.arange(3))
    with pytest.raises(ValueError, match=r"triton takes float32, float16 or bfloat16, got \[2\] float64 on cpu"):
        mish(torch.zeros(2).double(), backend="triton")
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, got 'cuda'"):
        mish(torch.zeros(2), backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"triton needs a CUDA tensor \(or TRITON_INTERPRET=1\), got \[2, 3\] float32 on cpu"):
        mish(torch.zeros(2, 3), backend="triton")
