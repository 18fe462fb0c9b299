"""The residual tail as PyTorch operators: what torch.compile, autograd, autocast and a captured graph see as single calls.

CUDA tensors, and CPU tensors under Triton's interpreter, go to the Triton kernels; other CPU tensors to the same formulas in
PyTorch. `statistics` moves the running statistics, so it is an operator of its own without a gradient: the gradient of
`tail` accounts for how mean, variance and scale depend on what they were computed from.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import residual_tail_function as algebra
from kernels.backends import runs_triton
from kernels.residual_tail_function import Gradients, Settings, Tensors
from kernels.residual_tail_tiles import group_rows


def channels_last(x: Tensor) -> Tensor:
    """x itself if its memory is rows [N * H * W, C], else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def like_map(x: Tensor) -> Tensor:
    """An unfilled map of x's shape and dtype, channels_last."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def floats(x: Tensor, *shape: int) -> Tensor:
    """Unfilled, in the dtype things are computed in."""
    return torch.empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)


@torch.library.custom_op("fastcifar::residual_tail_statistics", mutates_args=("running_mean", "running_var"))
def batch_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, per_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_triton(x):
        return algebra.batch_statistics(x, running_mean, running_var, momentum, per_image)
    from kernels import residual_tail_triton as kernels

    n, channels, height, width = x.shape
    rows = n * height * width
    group = height * width if per_image else group_rows(channels, rows)
    groups = -(-rows // group)
    group_mean, group_m2, mean, variance = (floats(x, *shape) for shape in (2 * [(groups, channels)] + 2 * [(channels,)]))
    kernels.statistics(channels_last(x), group_mean, group_m2, group)
    kernels.batch(group_mean, group_m2, mean, variance, running_mean, running_var, rows, group, momentum)
    return group_mean if per_image else floats(x, 0), mean, variance


@batch_statistics.register_fake
def _(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, per_image: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, channels = x.shape[:2]
    return floats(x, n, channels) if per_image else floats(x, 0), floats(x, channels), floats(x, channels)


@torch.library.custom_op("fastcifar::residual_tail_squeeze", mutates_args=())
def squeeze(x: Tensor) -> Tensor:
    if not runs_triton(x):
        return algebra.squeeze(x)
    from kernels import residual_tail_triton as kernels

    image_mean = floats(x, *x.shape[:2])
    kernels.statistics(channels_last(x), image_mean, None, x.shape[2] * x.shape[3])
    return image_mean


@squeeze.register_fake
def _(x: Tensor) -> Tensor:
    return floats(x, *x.shape[:2])


@torch.library.custom_op("fastcifar::residual_tail_excite", mutates_args=())
def excite(
    image_mean: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, w_reduce: Tensor, w_expand: Tensor,
    b_reduce: Tensor | None, b_expand: Tensor | None, eps: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    linear = (w_reduce, w_expand, b_reduce, b_expand)
    if not runs_triton(image_mean):
        return algebra.excite(image_mean, mean, variance, weight, bias, *linear, eps, activation)
    from kernels import residual_tail_triton as kernels

    scale, hidden = torch.empty_like(image_mean), floats(image_mean, len(image_mean), len(w_reduce))
    kernels.excite(image_mean, mean, variance, weight, bias, *linear, scale, hidden, eps, activation)
    return scale, hidden


@excite.register_fake
def _(
    image_mean: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, w_reduce: Tensor, w_expand: Tensor,
    b_reduce: Tensor | None, b_expand: Tensor | None, eps: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(image_mean), floats(image_mean, len(image_mean), len(w_reduce))


@torch.library.custom_op("fastcifar::residual_tail", mutates_args=())
def _tail(
    conv_out: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, w_reduce: Tensor | None,
    w_expand: Tensor | None, b_reduce: Tensor | None, b_expand: Tensor | None, image_mean: Tensor | None, mean: Tensor,
    variance: Tensor, scale: Tensor | None, hidden: Tensor | None, training: bool, eps: float, se_activation: str,
    activation: str,
) -> Tensor:  # fmt: skip
    if not runs_triton(conv_out):
        linear = (w_reduce, w_expand, b_reduce, b_expand)
        tensors = (conv_out, shortcut, weight, bias, *linear, image_mean, mean, variance, scale, hidden)
        return channels_last(algebra.apply(Tensors(*tensors), Settings(training, eps, se_activation, activation)))
    from kernels import residual_tail_triton as kernels

    out = like_map(conv_out)
    shortcut = channels_last(shortcut) if shortcut is not None else None
    kernels.tail(channels_last(conv_out), shortcut, weight, bias, mean, variance, scale, out, eps, activation)
    return out


@_tail.register_fake
def _(conv_out: Tensor, *_: Any) -> Tensor:
    return like_map(conv_out)


@torch.library.custom_op("fastcifar::residual_tail_backward", mutates_args=())
def _tail_backward(
    gradient: Tensor, conv_out: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, w_reduce: Tensor | None,
    w_expand: Tensor | None, b_reduce: Tensor | None, b_expand: Tensor | None, image_mean: Tensor | None, mean: Tensor,
    variance: Tensor, scale: Tensor | None, hidden: Tensor | None, training: bool, eps: float, se_activation: str,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`algebra.gradients`; empty where absent, and for a shortcut whose gradient is `gradient`."""
    linear = (w_reduce, w_expand, b_reduce, b_expand)
    tensors = Tensors(conv_out, shortcut, weight, bias, *linear, image_mean, mean, variance, scale, hidden)
    settings = Settings(training, eps, se_activation, activation)
    if runs_triton(conv_out):
        return _triton_gradients(gradient, tensors, settings)
    found = algebra.gradients(gradient, tensors, settings)
    dz = channels_last(found[1]) if _stores_dz(tensors, settings) else found[1].new_empty(0)
    return channels_last(found[0]), dz, *found[2:]


def _triton_gradients(gradient: Tensor, tensors: Tensors, settings: Settings) -> Gradients:
    from kernels import residual_tail_backward_triton as kernels

    conv_out, shortcut, weight, bias, w_reduce, w_expand, _, _, image_mean, mean, variance, scale, hidden = tensors
    x, gradient = channels_last(conv_out), channels_last(gradient)
    n, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    group = positions if scale is not None else group_rows(channels, n * positions)
    s1, s2 = (floats(x, -(-n * positions // group), channels) for _ in range(2))
    d_weight, d_bias = floats(x, channels), floats(x, channels)
    d_linear, dm = absent_or_like(x, *tensors[4:8]), None
    dz = like_map(x) if _stores_dz(tensors, settings) else None
    of_map = (weight, bias, mean, variance, scale)
    r = channels_last(shortcut) if shortcut is not None else None
    kernels.sums(gradient, x, r, *of_map, dz, s1, s2, group, settings.eps, settings.activation)
    if scale is None:
        kernels.channel_gradient(s1, s2, variance, d_weight, d_bias, settings.eps)
    else:
        assert w_reduce is not None
        assert w_expand is not None
        assert image_mean is not None
        assert hidden is not None
        dt, dq, dm = torch.empty_like(scale), torch.empty_like(hidden), torch.empty_like(scale)
        linear = (w_reduce.contiguous(), w_expand.contiguous())
        se = (settings.eps, settings.se_activation)
        kernels.excite_gradient(s1, s2, scale, hidden, weight, bias, variance, *linear, dt, dq, dm, *se)
        kernels.parameter_gradient(
            s1, s2, scale, hidden, image_mean, mean, variance, weight, bias, dt, dq, dm,
            d_weight, d_bias, *d_linear[:2], filled(d_linear[2]), filled(d_linear[3]), *se,
        )  # fmt: skip
    d_conv = like_map(x)
    source, activation = (dz, "none") if dz is not None else (gradient, settings.activation)
    kernels.map_gradient(source, x, *of_map, dm, d_weight, d_bias, d_conv, settings.eps, activation, settings.training)
    d_shortcut = dz if dz is not None else x.new_empty(0)
    return d_conv, d_shortcut, d_weight.to(weight.dtype), d_bias.to(bias.dtype), *d_linear


def filled(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def absent_or_like(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each parameter an unfilled gradient, contiguous; an empty one where it is None."""
    a, b, c, d = (floats(x, 0) if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parameters)
    return a, b, c, d


def _stores_dz(tensors: Tensors, settings: Settings) -> bool:
    """Whether someone wants dz and it is not simply the result's gradient."""
    return tensors.shortcut is not None and settings.activation != "none"


@_tail_backward.register_fake
def _(
    gradient: Tensor, conv_out: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, w_reduce: Tensor | None,
    w_expand: Tensor | None, b_reduce: Tensor | None, b_expand: Tensor | None, *rest: Any,
) -> Gradients:  # fmt: skip
    dz = like_map(conv_out) if shortcut is not None and rest[-1] != "none" else conv_out.new_empty(0)
    d_linear = absent_or_like(conv_out, w_reduce, w_expand, b_reduce, b_expand)
    return like_map(conv_out), dz, torch.empty_like(weight), torch.empty_like(bias), *d_linear


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: len(Tensors._fields)])
    ctx.settings = Settings(*inputs[len(Tensors._fields) :])


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tensors = Tensors(*ctx.saved_tensors)
    d_conv, d_shortcut, *parameters = _tail_backward(gradient, *tensors, *ctx.settings)
    d_shortcut = d_shortcut if _stores_dz(tensors, ctx.settings) else gradient
    found = (d_conv, d_shortcut, *parameters)
    own = (None if x is None else g for x, g in zip(tensors, found, strict=False))
    return *own, *(None,) * (len(tensors) - len(found) + len(ctx.settings))


_tail.register_autograd(_gradient, setup_context=_keep)


def tail(tensors: Tensors, settings: Settings) -> Tensor:
    """act(z) with its gradients."""
    return _tail(*tensors, *settings)
