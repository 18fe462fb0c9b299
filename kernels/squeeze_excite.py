"""A map and the weights of a squeeze-excitation enter; the map leaves, each channel scaled by what the whole map says of it.

    m = mean_hw(x)      h = m W_reduce^T + b_reduce      s = sigmoid(act(h) W_expand^T + b_expand)      y = x s

    t = sum_hw(g x)                  dz = t s (1 - s)                   of the sigmoid's argument
    dh = (dz W_expand) act'(h)       dm = dh W_reduce                   dx = g s + dm / HW
    dW_expand = dz^T act(h)          dW_reduce = dh^T m                 biases: sums of dz and dh over n

The operator `fastcifar::squeeze_excite` keeps x, m, h and s for its gradient, the last three in float32.
"""

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.backends import Backend, describe, resolve, runs_triton
from kernels.reference import Activation


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
    """Squeeze-excitation (Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018).

    x [N, C, H, W], w_reduce [R, C], w_expand [C, R], b_reduce [R], b_expand [C]; parameters in x's dtype or float32. The
    result has x's shape and dtype, and its layout where that is contiguous or channels_last; else "triton" returns
    channels_last. Raises ValueError naming what does not fit, and where the backend cannot serve x.
    """
    check(x, w_reduce, w_expand, activation, b_reduce, b_expand)
    if resolve("squeeze_excite", backend, x) == "torch":
        return reference.squeeze_excite(x, w_reduce, w_expand, activation, b_reduce, b_expand)
    return _squeeze_excite(x, w_reduce, w_expand, b_reduce, b_expand, activation)[0]


def check(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: str, b_reduce: Tensor | None, b_expand: Tensor | None
) -> None:
    """Raise ValueError, naming shape and expectation, unless the arguments fit one another."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"squeeze_excite: x must be a floating-point map [N, C, H, W], got {describe(x)}")
    if activation not in get_args(Activation):
        raise ValueError(f"squeeze_excite: activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    channels, reduced = x.shape[1], w_reduce.shape[0] if w_reduce.dim() else 0
    expected = {
        "w_reduce": (w_reduce, [max(reduced, 1), channels]),
        "w_expand": (w_expand, [channels, reduced]),
        "b_reduce": (b_reduce, [reduced]),
        "b_expand": (b_expand, [channels]),
    }
    for name, (parameter, shape) in expected.items():
        if parameter is None:
            continue
        if list(parameter.shape) != shape:
            raise ValueError(f"squeeze_excite: {name} must be {shape} for x {describe(x)}, got {describe(parameter)}")
        if parameter.device != x.device or parameter.dtype not in (x.dtype, torch.float32) or parameter.dtype != w_reduce.dtype:
            raise ValueError(
                f"squeeze_excite: {name} must be on {x.device}, all parameters in x's dtype or all float32, "
                f"got {describe(parameter)} for x {describe(x)}"
            )


@torch.library.custom_op("fastcifar::squeeze_excite", mutates_args=())
def _squeeze_excite(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, b_reduce: Tensor | None, b_expand: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in `layout_of(x)`, squeezed [N, C], hidden [N, R], scale [N, C]."""
    if not runs_triton(x):
        return _forward_torch(x, w_reduce, w_expand, b_reduce, b_expand, activation)
    from kernels import squeeze_excite_triton

    results = _unfilled(x, w_reduce)
    parameters = tuple(None if w is None else w.contiguous() for w in (w_reduce, w_expand, b_reduce, b_expand))
    layout = layout_of(x)
    contiguous = layout == torch.contiguous_format
    squeeze_excite_triton.forward(x.contiguous(memory_format=layout), parameters, activation, results, contiguous)
    return results


@torch.library.custom_op("fastcifar::squeeze_excite_backward", mutates_args=())
def _squeeze_excite_backward(
    gradient: Tensor, x: Tensor, hidden: Tensor, scale: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, of the sigmoid's argument [N, C] and of the hidden units [N, R], and act(hidden)."""
    if not runs_triton(x):
        return _backward_torch(gradient, x, hidden, scale, w_reduce, w_expand, activation)
    from kernels import squeeze_excite_triton

    layout = layout_of(x)
    results = _unfilled_gradients(x, hidden, scale)
    maps = [t.contiguous(memory_format=layout) for t in (gradient, x)]
    rest = [t.contiguous() for t in (hidden, scale, w_reduce, w_expand)]
    squeeze_excite_triton.backward((*maps, *rest), activation, results, layout == torch.contiguous_format)
    return results


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout a map is read and its results are written in: its own if contiguous, else channels_last."""
    if x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _forward_torch(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, b_reduce: Tensor | None, b_expand: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _working_dtype(x)
    inward, outward = (None if b is None else b.to(dtype) for b in (b_reduce, b_expand))
    with torch.autocast(x.device.type, enabled=False):
        squeezed = x.to(dtype).mean(dim=(2, 3))
        hidden = F.linear(squeezed, w_reduce.to(dtype), inward)
        scale = torch.sigmoid(F.linear(_act(hidden, activation), w_expand.to(dtype), outward))
    y = (x.to(dtype) * scale[:, :, None, None]).to(x.dtype)
    return y.contiguous(memory_format=layout_of(x)), squeezed, hidden, scale


def _backward_torch(
    gradient: Tensor, x: Tensor, hidden: Tensor, scale: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _working_dtype(x)
    g = gradient.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        d_logits = (g * x).sum(dim=(2, 3)) * scale * (1 - scale)
        d_active = d_logits @ w_expand.to(dtype)
        d_hidden = torch.ops.aten.mish_backward(d_active, hidden) if activation == "mish" else d_active * (hidden > 0)
        d_mean = d_hidden @ w_reduce.to(dtype)
    positions = x.shape[2] * x.shape[3]
    d_x = (g * scale[:, :, None, None] + d_mean[:, :, None, None] / positions).to(x.dtype)
    return d_x.contiguous(memory_format=layout_of(x)), d_logits, d_hidden, _act(hidden, activation)


def _act(hidden: Tensor, activation: str) -> Tensor:
    return F.mish(hidden) if activation == "mish" else F.relu(hidden)


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _unfilled(x: Tensor, w_reduce: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, channels = x.shape[:2]
    squeezed, hidden, scale = (
        torch.empty(n, width, dtype=_working_dtype(x), device=x.device) for width in (channels, w_reduce.shape[0], channels)
    )
    return torch.empty_like(x, memory_format=layout_of(x)), squeezed, hidden, scale


def _unfilled_gradients(x: Tensor, hidden: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=layout_of(x)),
        torch.empty_like(scale),
        torch.empty_like(hidden),
        torch.empty_like(hidden),
    )


@_squeeze_excite.register_fake
def _(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, b_reduce: Tensor | None, b_expand: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _unfilled(x, w_reduce)


@_squeeze_excite_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, hidden: Tensor, scale: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _unfilled_gradients(x, hidden, scale)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_reduce, w_expand, _, _, ctx.activation = inputs
    _, squeezed, hidden, scale = output
    ctx.save_for_backward(x, w_reduce, w_expand, squeezed, hidden, scale)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Of x, w_reduce, w_expand, b_reduce, b_expand and the activation's name."""
    if gradient is None:
        return (None,) * 6
    x, w_reduce, w_expand, squeezed, hidden, scale = ctx.saved_tensors
    d_x, d_logits, d_hidden, active = _squeeze_excite_backward(gradient, x, hidden, scale, w_reduce, w_expand, ctx.activation)
    with torch.autocast(x.device.type, enabled=False):
        return (
            d_x,
            (d_hidden.T @ squeezed).to(w_reduce.dtype) if ctx.needs_input_grad[1] else None,
            (d_logits.T @ active).to(w_expand.dtype) if ctx.needs_input_grad[2] else None,
            d_hidden.sum(0).to(w_reduce.dtype) if ctx.needs_input_grad[3] else None,
            d_logits.sum(0).to(w_expand.dtype) if ctx.needs_input_grad[4] else None,
            None,
        )


_squeeze_excite.register_autograd(_gradients, setup_context=_keep)
