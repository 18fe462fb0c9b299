"""A convolution's output and a shortcut enter; BN, squeeze-excitation, sum and activation leave, in operations that fuse.

The algebra of the residual tail over plain PyTorch operations: the compiler may fuse them with what surrounds them, the
operators of `residual_tail_ops.py` run them on the CPU, and the Triton kernels compute the same formulas. With c the
convolution's output [N, C, H, W] of P = HW positions, M = NP, r the shortcut, g the gradient of the result:

    mean_nc, var_nc of each image's map; mu and var by merging over n (Chan, Golub & LeVeque 1979); rstd = 1 / sqrt(var + eps)
    a = gamma rstd              y = a (c - mu) + beta: never stored
    squeeze m = a (mean_nc - mu) + beta: the mean of y without a pass over it
    q = W_reduce m + b_reduce   s = sigmoid(W_expand act(q) + b_expand)      (s = 1 without squeeze-excitation)
    out = act(z)                z = (c - mu) s a + s beta + r

    dz = g act'(z), which is the shortcut's gradient;   S1 = sum_hw dz,   S2 = sum_hw dz (c - mu)
    ds = a S2 + beta S1         dt = ds s (1 - s)         dq = act'(q) W_expand^T dt         dm = W_reduce^T dq
    dW_expand = sum_n dt act(q)^T      db_expand = sum_n dt      dW_reduce = sum_n dq m^T      db_reduce = sum_n dq
    dbeta = sum_n (s S1 + dm)   dgamma = rstd sum_n (s S2 + dm (mean_nc - mu))
    dc = dz s a + a dm / P - a dbeta / M - (c - mu) a rstd dgamma / M    (the last two in training only)

Centring on mu costs one subtraction and keeps what c a + (beta - mu a) cancels when |mu| is large. For the backward pass c,
r, mean_nc, mu, var, s and q are kept; not z, not y.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.reference import mish

TailActivation = Literal["relu", "mish", "none"]


class Settings(NamedTuple):
    """The scalars of a tail. As a tuple, it goes through operators and the compiler unchanged."""

    training: bool
    eps: float
    se_activation: str  # relu or mish
    activation: str  # relu, mish or none


def wide(x: Tensor) -> Tensor:
    """x in the dtype everything is computed in: float32, or float64 for float64."""
    return cast(x, torch.float64 if x.dtype == torch.float64 else torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; not even a call of `to` where it is so already.

    The compiler of torch 2.11 loses the gradient of a Function whose result is handed through by an operation that does
    nothing (`to`, `contiguous`): silently, the gradients are 0.
    """
    return x if x.dtype == dtype else x.to(dtype)


def activate(z: Tensor, activation: str) -> Tensor:
    return torch.relu(z) if activation == "relu" else mish(z) if activation == "mish" else z


def slope(z: Tensor, activation: str) -> Tensor:
    """act'(z). For Mish, with e = exp(min(z, 20)), w = 1 / (e (e + 2) + 2): grouped so that nothing overflows."""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "none":
        return torch.ones_like(z)
    e = z.clamp(max=20).exp()
    q = e * (e + 2)
    w = 1 / (q + 2)
    return torch.where(z > 20, 1, q * w + z * (4 * e * (e + 1) * w * w))


def spread(channels: Tensor) -> Tensor:
    """[C] or [N, C] beside a map [N, C, H, W]."""
    return channels[..., None, None]


def batch_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, per_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mean_nc [N, C], or empty without `per_image`; mu [C]; var [C]) and move the running statistics."""
    if per_image:
        image_var, image_mean = torch.var_mean(wide(x), (2, 3), correction=0)
        var_of_means, mean = torch.var_mean(image_mean, 0, correction=0)
        variance = image_var.mean(0) + var_of_means
    else:
        variance, mean = torch.var_mean(wide(x), (0, 2, 3), correction=0)
        image_mean = mean.new_empty(0)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    running_mean.mul_(1 - momentum).add_(cast(mean, running_mean.dtype), alpha=momentum)
    running_var.mul_(1 - momentum).add_(cast(variance, running_var.dtype), alpha=momentum * count / (count - 1))
    return image_mean, mean, variance


def squeeze(x: Tensor) -> Tensor:
    """Return mean_nc [N, C], relative to a first value: exact where all are equal."""
    x = wide(x)
    origin = x[:, :, :1, :1]
    return (origin + (x - origin).mean((2, 3), keepdim=True))[:, :, 0, 0]


def excite(
    image_mean: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, w_reduce: Tensor, w_expand: Tensor,
    b_reduce: Tensor | None, b_expand: Tensor | None, eps: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (s [N, C], q [N, R])."""
    with torch.autocast(image_mean.device.type, enabled=False):
        hidden = linear(squeezed(image_mean, mean, variance, weight, bias, eps), w_reduce, b_reduce)
        return torch.sigmoid(linear(activate(hidden, activation), w_expand, b_expand)), hidden


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in the dtype everything is computed in."""
    y = x @ wide(weight).T
    return y if bias is None else y + wide(bias)


def squeezed(image_mean: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """m [N, C]."""
    return (image_mean - wide(mean)) * (wide(weight) * torch.rsqrt(wide(variance) + eps)) + wide(bias)


# Of conv_out, shortcut, weight, bias, w_reduce, w_expand, b_reduce, b_expand.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Tensors(NamedTuple):
    """What a tail's result and its gradients are computed from."""

    conv_out: Tensor  # [N, C, H, W]
    shortcut: Tensor | None  # [N, C, H, W]
    weight: Tensor  # [C], like bias, mean and variance
    bias: Tensor
    w_reduce: Tensor | None  # [R, C]; None, like w_expand [C, R], scale and hidden, without squeeze-excitation
    w_expand: Tensor | None
    b_reduce: Tensor | None  # [R]; None, like b_expand [C], where the linear layer has none
    b_expand: Tensor | None
    image_mean: Tensor | None  # mean_nc [N, C]
    mean: Tensor  # mu
    variance: Tensor  # biased
    scale: Tensor | None  # s [N, C]
    hidden: Tensor | None  # q [N, R]


def apply(tensors: Tensors, settings: Settings) -> Tensor:
    """Return act(z) in conv_out's dtype."""
    _, _, z = _linear(tensors, settings)
    return cast(activate(z, settings.activation), tensors.conv_out.dtype)


def gradients(gradient: Tensor, tensors: Tensors, settings: Settings) -> Gradients:
    """Return the gradients of the first eight of `tensors`; those of absent linear layers and biases are empty."""
    conv_out, _, weight, bias, w_reduce, w_expand, b_reduce, b_expand, image_mean, mean, variance, scale, hidden = tensors
    centred, slopes, z = _linear(tensors, settings)
    dz = wide(gradient) * slope(z, settings.activation)
    s1, s2 = dz.sum((2, 3)), (dz * centred).sum((2, 3))  # [N, C]
    rstd = torch.rsqrt(wide(variance) + settings.eps)
    a = wide(weight) * rstd
    positions = conv_out.shape[2] * conv_out.shape[3]
    d_linear = [weight.new_empty(0) for _ in range(4)]
    if scale is None:
        d_bias, d_weight = s1.sum(0), s2.sum(0) * rstd
    else:
        assert w_reduce is not None
        assert w_expand is not None
        assert image_mean is not None
        assert hidden is not None
        with torch.autocast(conv_out.device.type, enabled=False):
            dt = (a * s2 + wide(bias) * s1) * scale * (1 - scale)
            dq = dt @ wide(w_expand) * slope(hidden, settings.se_activation)
            dm = dq @ wide(w_reduce)
            m = squeezed(image_mean, mean, variance, weight, bias, settings.eps)
            d_linear[0] = cast(dq.T @ m, w_reduce.dtype)
            d_linear[1] = cast(dt.T @ activate(hidden, settings.se_activation), w_expand.dtype)
            if b_reduce is not None:
                d_linear[2] = cast(dq.sum(0), b_reduce.dtype)
            if b_expand is not None:
                d_linear[3] = cast(dt.sum(0), b_expand.dtype)
        d_bias = (scale * s1 + dm).sum(0)
        d_weight = (scale * s2 + dm * (image_mean - wide(mean))).sum(0) * rstd
    d_conv = dz * spread(slopes)
    if scale is not None:
        d_conv = d_conv + spread(a * dm / positions)
    if settings.training:
        count = conv_out.shape[0] * positions
        d_conv = d_conv - spread(a * d_bias / count) - centred * spread(a * rstd * d_weight / count)
    maps = (cast(d_conv, conv_out.dtype), cast(dz, conv_out.dtype))
    d_reduce, d_expand, d_b_reduce, d_b_expand = d_linear
    return *maps, cast(d_weight, weight.dtype), cast(d_bias, bias.dtype), d_reduce, d_expand, d_b_reduce, d_b_expand


def _linear(tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return c - mu [N, C, H, W], s a [C] or [N, C], and z [N, C, H, W]."""
    slopes = wide(tensors.weight) * torch.rsqrt(wide(tensors.variance) + settings.eps)
    offsets = wide(tensors.bias)
    if tensors.scale is not None:
        slopes, offsets = tensors.scale * slopes, tensors.scale * offsets
    centred = wide(tensors.conv_out) - spread(wide(tensors.mean))
    z = centred * spread(slopes) + spread(offsets)
    return centred, slopes, z if tensors.shortcut is None else z + wide(tensors.shortcut)


class ResidualTail(torch.autograd.Function):
    """out and its gradients; the statistics, the scale and `hidden` enter as constants, and the formulas above know better."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(*tensors)
        return apply(Tensors(*tensors), settings)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = Tensors(*ctx.saved_tensors)
        found = gradients(gradient, tensors, ctx.settings)
        own = (None if x is None else g for x, g in zip(tensors, found, strict=False))
        return None, *own, *(None,) * (len(tensors) - len(found))


def tail(tensors: Tensors, settings: Settings) -> Tensor:
    """act(z), channels_last, with its gradients."""
    return ResidualTail.apply(settings, *tensors).contiguous(memory_format=torch.channels_last)
