"""Squeeze-excitation (Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018): scale each channel by what the map says of it.

    m = mean_hw(x)      h = m W_reduce^T + b_reduce      s = sigmoid(act(h) W_expand^T + b_expand)      y = x s

    t = sum_hw(g x)                  dz = t s (1 - s)                   of the sigmoid's argument
    dh = (dz W_expand) act'(h)       dm = dh W_reduce                   dx = g s + dm / HW
    dW_expand = dz^T act(h)          dW_reduce = dh^T m                 biases: sums of dz and dh over n

The operator `fastcifar::squeeze_excite` keeps x, m, h and s for its gradient, the last three in float32.
"""

from typing import Any, get_args

import torch
from torch import Tensor

from kernels.activations import Activation
from kernels.backends import Backend, describe, resolve, runs_numba, runs_triton
from kernels.operators import register_fake
from kernels.squeeze_excite import reference
from kernels.squeeze_excite.reference import Results, layout_of, unfilled_gradients, unfilled_results


def squeeze_excite(
    x: Tensor,
    w_reduce: Tensor,
    w_expand: Tensor,
    activation: Activation = "relu",
    b_reduce: Tensor | None = None,
    b_expand: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """x * sigmoid(w_expand act(w_reduce mean_hw(x) + b_reduce) + b_expand).

    x [N, C, H, W], w_reduce [R, C], w_expand [C, R], b_reduce [R], b_expand [C]; parameters in x's dtype or float32. The
    result has x's shape and dtype, and its layout where that is contiguous or channels_last; else "triton" returns
    channels_last. Raises ValueError naming what does not fit, and where the backend cannot serve x.
    """
    _check(x, activation, {"w_reduce": w_reduce, "w_expand": w_expand, "b_reduce": b_reduce, "b_expand": b_expand})
    form = resolve("squeeze_excite", backend, x)
    if form == "torch":
        return reference.squeeze_excite(x, w_reduce, w_expand, activation, b_reduce, b_expand)
    return _squeeze_excite(x, w_reduce, w_expand, b_reduce, b_expand, activation, form)[0]


def _check(x: Tensor, activation: str, parameters: dict[str, Tensor | None]) -> None:
    """Raise ValueError, naming shape and expectation, unless the arguments fit one another."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"squeeze_excite: x must be a floating-point map [N, C, H, W], got {describe(x)}")
    if activation not in get_args(Activation):
        raise ValueError(f"squeeze_excite: activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    w_reduce = parameters["w_reduce"]
    assert w_reduce is not None
    channels, reduced = x.shape[1], w_reduce.shape[0] if w_reduce.dim() else 0
    shapes = ([max(reduced, 1), channels], [channels, reduced], [reduced], [channels])
    for (name, parameter), shape in zip(parameters.items(), shapes, strict=True):
        if parameter is None:
            continue
        if list(parameter.shape) != shape:
            raise ValueError(f"squeeze_excite: {name} must be {shape} for x {describe(x)}, got {describe(parameter)}")
        if parameter.device != x.device or parameter.dtype not in (x.dtype, torch.float32) or parameter.dtype != w_reduce.dtype:
            raise ValueError(
                f"squeeze_excite: {name} must be on {x.device}, all parameters in x's dtype or all float32, "
                f"got {describe(parameter)} for x {describe(x)}"
            )


def _form(x: Tensor, form: str) -> Any:
    """The module that serves x: all have the functions forward and backward. Triton's interpreter only if it is asked for."""
    if form == "triton" and runs_triton(x):
        from kernels.squeeze_excite import triton

        return triton
    if runs_numba(x) and layout_of(x) == torch.channels_last:
        from kernels.squeeze_excite import numba

        return numba
    return reference


@torch.library.custom_op("fastcifar::squeeze_excite", mutates_args=())
def _squeeze_excite(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, b_reduce: Tensor | None, b_expand: Tensor | None, activation: str,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _form(x, form).forward(x, w_reduce, w_expand, b_reduce, b_expand, activation)


@torch.library.custom_op("fastcifar::squeeze_excite_backward", mutates_args=())
def _squeeze_excite_backward(
    gradient: Tensor, x: Tensor, hidden: Tensor, scale: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: str,
    form: str, second: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _form(x, form).backward(gradient, x, hidden, scale, w_reduce, w_expand, activation, second)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    x, w_reduce, w_expand, _, _, *ctx.settings = inputs
    ctx.save_for_backward(x, w_reduce, w_expand, *output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Of x, w_reduce, w_expand, b_reduce, b_expand, and the activation's and the form's names."""
    if gradient is None:
        return (None,) * 7
    x, w_reduce, w_expand, squeezed, hidden, scale = ctx.saved_tensors
    d_x, d_logits, d_hidden, active = _squeeze_excite_backward(gradient, x, hidden, scale, w_reduce, w_expand, *ctx.settings)
    _, wants_reduce, wants_expand, wants_b_reduce, wants_b_expand, *_ = ctx.needs_input_grad
    with torch.autocast(x.device.type, enabled=False):
        return (
            d_x,
            (d_hidden.T @ squeezed).to(w_reduce.dtype) if wants_reduce else None,
            (d_logits.T @ active).to(w_expand.dtype) if wants_expand else None,
            d_hidden.sum(0).to(w_reduce.dtype) if wants_b_reduce else None,
            d_logits.sum(0).to(w_expand.dtype) if wants_b_expand else None,
            None,
            None,
        )


register_fake(_squeeze_excite)(lambda x, w_reduce, *_: unfilled_results(x, w_reduce))
register_fake(_squeeze_excite_backward)(lambda _, x, hidden, scale, *__: unfilled_gradients(x, hidden, scale))
_squeeze_excite.register_autograd(_gradient, setup_context=_keep)
