"""Squeeze-excitation: as exact as eager PyTorch in its result and each gradient, at any width and map, in both layouts."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from kernels.squeeze_excite import _squeeze_excite, reference, squeeze_excite
from tests.kernel_checks import DEVICE, assert_gradients_as_exact_as_eager, sample

CHANNELS_LAST = torch.channels_last
LAYOUT = [CHANNELS_LAST, torch.contiguous_format]
DTYPES = [torch.float32, torch.float16] if DEVICE.type == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
# N, C, H, W, R: every width of the variants and others, maps from 1x1 to 32x32, full rows of 16 bytes and broken ones.
SHAPES = [
    (2, 45, 8, 8, 2), (1, 48, 32, 32, 3), (2, 90, 4, 4, 5), (3, 170, 1, 1, 10), (1, 185, 7, 7, 11), (2, 340, 2, 2, 21),
    (1, 45, 31, 17, 4), (3, 1, 3, 3, 1), (1, 16, 5, 5, 16), (1, 300, 4, 4, 33),
]  # fmt: skip


def inputs(
    n: int, c: int, h: int, w: int, r: int, *, dtype: torch.dtype = torch.float32, parameters: torch.dtype | None = None,
    biases: bool = True, memory_format: torch.memory_format = CHANNELS_LAST, seed: int = 0,
) -> list[Tensor | None]:  # fmt: skip
    """x, w_reduce, w_expand, b_reduce, b_expand."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=generator).to(dtype).to(memory_format=memory_format)
    shapes = ((r, c), (c, r), (r,), (c,))
    weights = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]
    weights[0] *= (h * w) ** 0.5  # the squeeze is that much smaller than x: both linears and the activation matter
    w_reduce, w_expand, b_reduce, b_expand = (t.to(parameters or dtype) for t in weights)
    drawn = [x, w_reduce, w_expand, *((b_reduce, b_expand) if biases else (None, None))]
    return [None if t is None else t.to(DEVICE) for t in drawn]


def call(function, activation: str = "relu"):
    """`function` with the arguments in the order of `inputs`."""
    return lambda x, w_reduce, w_expand, b_reduce, b_expand: function(x, w_reduce, w_expand, activation, b_reduce, b_expand)


triton_se = partial(squeeze_excite, backend="triton")


def check(*draws: list[Tensor | None], activation: str = "relu") -> None:
    assert_gradients_as_exact_as_eager(call(triton_se, activation), call(reference.squeeze_excite, activation), *draws)


def drawn(*shape: int, **options) -> list[list[Tensor | None]]:
    """Four draws, since with few hidden units a gradient is few numbers."""
    return [inputs(*shape, **options, seed=seed) for seed in range(4)]


TRAINED = [(512, 45, 32, 32, 2), (512, 90, 16, 16, 5), (512, 170, 8, 8, 10), (512, 340, 4, 4, 21), (128, 185, 16, 16, 11)]
EVERY = sample(DTYPES, SHAPES, LAYOUT, every=9) + [
    pytest.param(*each, marks=pytest.mark.gpu) for each in product(DTYPES, TRAINED, LAYOUT)
]


@pytest.mark.parametrize(("dtype", "shape", "memory_format"), EVERY)
def test_result_and_gradients_are_as_exact_as_eagers(shape, dtype, memory_format):
    biases, activation = shape[1] % 2 == 0, ("relu", "mish")[shape[1] // 2 % 2]
    check(*drawn(*shape, dtype=dtype, biases=biases, memory_format=memory_format), activation=activation)


@pytest.mark.parametrize(("activation", "biases"), sample(["relu", "mish"], [True, False], every=2))
def test_half_precision_maps_with_float32_parameters(activation, biases):
    check(*drawn(2, 45, 4, 4, 2, dtype=torch.float16, parameters=torch.float32, biases=biases), activation=activation)


@pytest.mark.parametrize("side", sample([1, 2, 3, 6, 9, 16, 32], every=3))
def test_every_size_of_map(side):
    check(*drawn(1, 45, side, side, 2), activation="mish")


@pytest.mark.parametrize(
    ("dtype", "values"), sample(DTYPES, ["large", "tiny", "constant", "one channel constant", "zero"], every=2)
)
def test_hard_values(values, dtype):
    draws = drawn(2, 45, 4, 4, 3, dtype=dtype, parameters=torch.float32)
    for draw in draws:
        x = draw[0]
        draw[0] = {
            "large": 1e4 * x.clamp(-1, 1),
            "tiny": 1e-4 * x,
            "constant": torch.full_like(x, 0.75),
            "one channel constant": torch.where(torch.arange(45, device=DEVICE)[:, None, None] == 7, -2.5, x).to(dtype),
            "zero": torch.zeros_like(x),
        }[values]
        if values == "large":  # with ordinary weights every sigmoid is 0 or 1
            draw[1:] = [t * 1e-3 for t in draw[1:]]
    check(*draws, activation="mish")


def test_saturated_sigmoids_give_finite_gradients():
    x, *parameters = inputs(1, 45, 4, 4, 3)
    leaves = [t.requires_grad_() for t in (1e4 * x, *parameters)]
    y = call(triton_se)(*leaves)
    y.sum().backward()
    torch.testing.assert_close(y, call(reference.squeeze_excite)(*leaves))
    assert all(t.grad.isfinite().all() for t in leaves)


LAYOUTS = {
    "contiguous": (lambda x: x.contiguous(), torch.contiguous_format),
    "channels_last": (lambda x: x, CHANNELS_LAST),
    "channel slice": (lambda x: torch.cat([x, x], 1)[:, :5], CHANNELS_LAST),
    "every other": (lambda x: torch.cat([x, x], 3)[..., ::2], CHANNELS_LAST),
    "transposed": (lambda x: x.transpose(2, 3), CHANNELS_LAST),
    "expanded": (lambda x: x[:, :, :1, :1].expand_as(x), CHANNELS_LAST),
}


@pytest.mark.parametrize("layout", sample(LAYOUTS, every=2))
def test_layouts(layout):
    change, expected = LAYOUTS[layout]
    draws = [[change(x), *parameters] for x, *parameters in drawn(2, 5, 3, 4, 2)]
    check(*draws)
    x, w_reduce, w_expand, *biases = draws[0]
    y = call(triton_se)(*draws[0])
    assert y.is_contiguous(memory_format=expected)
    assert torch.equal(y, call(triton_se)(x, w_reduce.T.contiguous().T, w_expand.T.contiguous().T, *biases))


def test_only_wanted_gradients_are_computed():
    x, w_reduce, w_expand, *_ = inputs(2, 5, 3, 3, 2)
    triton_se(x, w_reduce, w_expand.requires_grad_()).sum().backward()
    assert w_expand.grad is not None
    assert w_reduce.grad is None


def under_autocast(function):
    """`function` within bfloat16 autocast, unless it is to be exact."""

    def run(*arguments):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=arguments[0].dtype != torch.float64):
            return call(function)(*arguments)

    return run


def operator_of_the_cpu(x, w_reduce, w_expand, activation, b_reduce, b_expand):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        return _squeeze_excite(x, w_reduce, w_expand, b_reduce, b_expand, activation, "triton")[0]


@pytest.mark.parametrize(
    ("dtype", "function"),
    [  # the interpreter would truncate bfloat16
        (torch.float32, triton_se),
        (torch.bfloat16, operator_of_the_cpu if DEVICE.type == "cpu" else triton_se),
    ],
)
def test_autocast_returns_the_maps_dtype_and_is_as_exact(dtype, function):
    draws = drawn(2, 45, 4, 4, 2, dtype=dtype, parameters=torch.float32)
    assert_gradients_as_exact_as_eager(under_autocast(function), under_autocast(reference.squeeze_excite), *draws)


@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_the_operators_formulas_of_the_gradient(activation):
    arguments = [t.double().cpu().requires_grad_() for t in inputs(2, 5, 3, 4, 3)]  # float64: the CPU's own implementation
    assert torch.autograd.gradcheck(lambda *a: _squeeze_excite(*a, activation, "triton")[0], arguments)
    expected = call(reference.squeeze_excite, activation)(*arguments)
    torch.testing.assert_close(_squeeze_excite(*arguments, activation, "triton")[0], expected)


X, REDUCE, EXPAND = (t.cpu() for t in inputs(2, 5, 3, 4, 2)[:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], REDUCE, EXPAND), r"x must be a floating-point map \[N, C, H, W\], got \[5, 3, 4\] float32 on cpu"),
        ((X.int(), REDUCE, EXPAND), r"x must be a floating-point map \[N, C, H, W\], got \[2, 5, 3, 4\] int32 on cpu"),
        ((X, EXPAND, REDUCE), r"w_reduce must be \[5, 5\] for x \[2, 5, 3, 4\] float32 on cpu, got \[5, 2\]"),
        ((X, REDUCE[0], EXPAND), r"w_reduce must be \[5, 5\] .*, got \[5\]"),
        ((X, REDUCE[:0], EXPAND[:, :0]), r"w_reduce must be \[1, 5\] .*, got \[0, 5\]"),
        ((X, REDUCE, EXPAND[:, :1]), r"w_expand must be \[5, 2\] .*, got \[5, 1\]"),
        ((X, REDUCE, EXPAND, "relu", torch.zeros(5)), r"b_reduce must be \[2\] .*, got \[5\]"),
        ((X, REDUCE, EXPAND, "relu", None, torch.zeros(2)), r"b_expand must be \[5\] .*, got \[2\]"),
        ((X, REDUCE, EXPAND, "gelu"), "activation must be one of relu, mish, got 'gelu'"),
        (
            (X, REDUCE.half(), EXPAND),
            r"w_reduce must be on cpu, all parameters in x's dtype or all float32, got \[2, 5\] float16",
        ),
        ((X.half(), REDUCE, EXPAND.half()), r"w_expand must be on cpu, .*, got \[5, 2\] float16 on cpu"),
        ((X, REDUCE.to("meta"), EXPAND), r"w_reduce must be on cpu, .*, got \[2, 5\] float32 on meta"),
    ],
)
def test_bad_input_is_named(arguments, message):
    for backend in ("auto", "torch", "triton"):
        with pytest.raises(ValueError, match=f"squeeze_excite: {message}"):
            squeeze_excite(*arguments, backend=backend)
