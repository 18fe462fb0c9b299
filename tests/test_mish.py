"""Mish: as exact as eager PyTorch, value and slope, in every layout; finite wherever it should be."""

from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.activations import slope
from kernels.mish import _mish, mish, reference
from tests.kernel_checks import DEVICE, assert_as_exact_as_eager, assert_gradients_as_exact_as_eager, sample

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


def all_bf16() -> Tensor:
    """Each finite bfloat16 value."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    return x[x.isfinite()].to(DEVICE)


@pytest.mark.parametrize("implementation", ["triton", "numba", "formula"])
def test_all_bfloat16_values_give_finite_results(implementation):
    x = all_bf16()
    assert len(x) == 65536 - 256  # 254 NaN, two infinities
    if implementation != "formula":
        x = x.cpu() if implementation == "numba" else x
        leaf = x.clone().requires_grad_()
        value = mish(leaf, backend=implementation)
        value.sum().backward()
        interpreted = implementation == "triton" and DEVICE.type == "cpu"
        found, unit = (value.detach(), leaf.grad), 2**-7 if interpreted else 2**-8  # the interpreter truncates
    else:  # in float32 as PyTorch operations, for what the interpreter's bfloat16 cannot show
        e = x.float().clamp(max=20).exp()
        q = e * (e + 2)
        found, unit = ((x.float() * (q / (q + 2))).bfloat16(), slope(x.float(), "mish").bfloat16()), 2**-8  # rounded
    smallest = 2e-36 if implementation == "numba" else 1e-37  # Numba's exponential is 0 where it is no normal number
    exact = x.double().requires_grad_()
    exact_value = reference.mish(exact)
    exact_value.sum().backward()
    for result, expected, cancels in zip(found, (exact_value.detach(), exact.grad), (0, 1), strict=True):
        assert result.isfinite().all()
        # Absolutely, half a unit at the size of terms that cancel where the slope crosses zero; float32's smallest normals.
        close = (result.double() - expected).abs() <= 1.01 * unit * expected.abs() + 1e-7 * cancels + smallest
        assert close.all(), x[~close]


def test_nan_and_infinity_are_eagers():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)
    torch.testing.assert_close(triton_mish(x), reference.mish(x), equal_nan=True)


def test_autocast_leaves_the_dtype():
    for dtype in (torch.float32, torch.float16):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert triton_mish(normal(4, dtype=dtype).to(DEVICE)).dtype == dtype


def test_gradient_of_the_cpus_own_operator(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert torch.autograd.gradcheck(partial(_mish, form="triton"), normal(2, 3, 4).double().requires_grad_())


@pytest.mark.parametrize(
    ("x", "backend", "message"),
    [
        (torch.arange(3), "auto", r"x must be of a floating-point dtype, got \[3\] int64 on cpu"),
        (torch.zeros(2).double(), "triton", r"triton takes float32, float16 or bfloat16, got \[2\] float64 on cpu"),
        (torch.zeros(2), "cuda", "backend must be one of auto, torch, numba, triton, got 'cuda'"),
    ],
)
def test_bad_input_is_named(x, backend, message):
    with pytest.raises(ValueError, match=message):
        mish(x, backend=backend)
