"""The residual tail's algebra in PyTorch operations: what the compiler may fuse with what surrounds it.

The operators run it where no kernel serves, and the Triton kernels compute the same formulas. With c the convolution's output
[N, C, H, W] of P = HW positions, M = NP, r the shortcut, g the gradient of the result:

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

A shortcut with a BN of its own is r = gamma_r (d - mu_r) rstd_r + beta_r of another convolution's output d. In training

    dbeta_r = sum dz            dgamma_r = rstd_r sum dz (d - mu_r)
    dd = a_r (dz - dbeta_r / M - (d - mu_r) rstd_r dgamma_r / M)

Squeeze-excitation may come last instead, in front of a convolution, and without a shortcut (`se_last`):

    y = act(z)        z = (c - mu) a + beta        m = mean_hw y        out = s y        s of m as above
    ds = sum_hw g y        dz = (g s + dm / P) act'(z)        the rest of it as a tail's without squeeze-excitation

Centring on mu costs one subtraction and keeps what c a + (beta - mu a) cancels when |mu| is large. For the backward pass c,
r, mean_nc, mu, var, s and q are kept; not z, not y.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activations import activate, slope
from kernels.backends import cast, wide
from kernels.squeeze_excite.reference import excite, excite_gradients


class Settings(NamedTuple):
    """The scalars of a tail; as a tuple, it goes through operators and the compiler unchanged."""

    training: bool
    eps: float
    se_activation: str  # relu or mish
    activation: str  # relu, mish or none
    se_last: bool = False  # squeeze-excitation behind the activation, without a shortcut


class Tensors(NamedTuple):
    """What a tail's result and its gradients are computed from. The first eight have gradients."""

    conv_out: Tensor  # [N, C, H, W]
    shortcut: Tensor | None  # [N, C, H, W]
    weight: Tensor  # [C], like bias, mean and variance
    bias: Tensor
    w_reduce: Tensor | None  # [R, C]; None, like w_expand [C, R], image_mean, scale and hidden, without squeeze-excitation
    w_expand: Tensor | None
    b_reduce: Tensor | None  # [R]; None, like b_expand [C], where the linear layer has none
    b_expand: Tensor | None
    image_mean: Tensor | None  # mean_nc [N, C]
    mean: Tensor  # mu
    variance: Tensor  # biased
    scale: Tensor | None = None  # s [N, C]; computed by `apply`, as is hidden
    hidden: Tensor | None = None  # q [N, R]


class Neighbours(NamedTuple):
    """What stands next to a tail in a network and a kernel may do in the same pass; `kernels/neighbours.py` finds it."""

    kept: Tensor | None = None  # [N, C, H, W], boolean: what dropout behind the activation keeps,
    keep: float = 1.0  # with this probability, and divides by it
    shortcut_weight: Tensor | None = None  # [C], like the next three: the shortcut's own BN, through which it passes first
    shortcut_bias: Tensor | None = None
    shortcut_mean: Tensor | None = None
    shortcut_variance: Tensor | None = None
    second: Tensor | None = None  # the gradient of the result's second use
    elsewhere: Tensor | None = None  # of the gradient of conv_out: what its other uses add


ALONE = Neighbours()
EVERY = len(Tensors._fields)
GIVEN = EVERY - 2  # how many `apply` takes
NEAR = len(Neighbours._fields) - 2  # how many of Neighbours are known in the forward pass
Gradients = tuple[Tensor | None, ...]  # of the first eight; None where there is nothing


def has_own_gradient(tensors: Tensors, settings: Settings, neighbours: Neighbours = ALONE) -> bool:
    """Whether there is a shortcut whose gradient is not simply the result's."""
    direct = neighbours.kept is None and neighbours.second is None and neighbours.shortcut_weight is None
    return tensors.shortcut is not None and not (direct and settings.activation == "none")


def shortcut_tail(tensors: Tensors, settings: Settings, neighbours: Neighbours) -> tuple[Tensors, Settings]:
    """The shortcut's own BN as a tail without anything else."""
    given: dict[str, Any] = dict.fromkeys(Tensors._fields)
    given |= dict(zip(("weight", "bias", "mean", "variance"), neighbours[2:NEAR], strict=True))
    return Tensors(**given | {"conv_out": tensors.shortcut}), settings._replace(activation="none")


def spread(channels: Tensor) -> Tensor:
    """[C] or [N, C] beside a map [N, C, H, W]."""
    return channels[..., None, None]


def statistics(
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
    move(running_mean, running_var, mean, variance, momentum, x.shape[0] * x.shape[2] * x.shape[3])
    return image_mean, mean, variance


def move(running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, momentum: float, count: int) -> None:
    """Move the running statistics as nn.BatchNorm2d does, by those of `count` values a channel."""
    running_mean.mul_(1 - momentum).add_(cast(mean, running_mean.dtype), alpha=momentum)
    running_var.mul_(1 - momentum).add_(cast(variance, running_var.dtype), alpha=momentum * count / max(count - 1, 1))


def apply(tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return act(z) in conv_out's dtype, s and q."""
    if settings.se_last:
        y = activate(_linear(tensors, settings)[2], settings.activation)
        hidden, scale = excite(y.mean((2, 3)), *layers(tensors), settings.se_activation)
        return cast(y * spread(scale), tensors.conv_out.dtype), scale, hidden
    tensors = excited(tensors, settings)
    _, _, z = _linear(tensors, settings)
    return cast(activate(z, settings.activation), tensors.conv_out.dtype), tensors.scale, tensors.hidden


def excited(tensors: Tensors, settings: Settings) -> Tensors:
    """With s [N, C] and q [N, R], where there is squeeze-excitation."""
    if tensors.w_reduce is None or tensors.w_expand is None:
        return tensors
    with torch.autocast(tensors.conv_out.device.type, enabled=False):
        hidden = _squeezed(tensors, settings) @ wide(tensors.w_reduce).T
        hidden = hidden if tensors.b_reduce is None else hidden + wide(tensors.b_reduce)
        logits = activate(hidden, settings.se_activation) @ wide(tensors.w_expand).T
        logits = logits if tensors.b_expand is None else logits + wide(tensors.b_expand)
    return tensors._replace(scale=torch.sigmoid(logits), hidden=hidden)


def _squeezed(tensors: Tensors, settings: Settings) -> Tensor:
    """m [N, C]."""
    assert tensors.image_mean is not None
    a = wide(tensors.weight) * torch.rsqrt(wide(tensors.variance) + settings.eps)
    return (tensors.image_mean - wide(tensors.mean)) * a + wide(tensors.bias)


def line(tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return s a and s beta, [C] or [N, C]: z is (c - mu) times the first, plus the second and r."""
    slopes = wide(tensors.weight) * torch.rsqrt(wide(tensors.variance) + settings.eps)
    intercepts = wide(tensors.bias)
    return (slopes, intercepts) if tensors.scale is None else (tensors.scale * slopes, tensors.scale * intercepts)


def _linear(tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return c - mu [N, C, H, W], s a [C] or [N, C], and z [N, C, H, W]."""
    slopes, intercepts = line(tensors, settings)
    centred = wide(tensors.conv_out) - spread(wide(tensors.mean))
    z = centred * spread(slopes) + spread(intercepts)
    return centred, slopes, z if tensors.shortcut is None else z + wide(tensors.shortcut)


def gradients(gradient: Tensor, tensors: Tensors, settings: Settings) -> Gradients:
    """Return the gradients of the first eight of `tensors`, each in its dtype."""
    if settings.se_last:
        return _gradients_before(gradient, tensors, settings)
    centred, slopes, z = _linear(tensors, settings)
    dz = wide(gradient) * slope(z, settings.activation)
    s1, s2 = dz.sum((2, 3)), (dz * centred).sum((2, 3))  # [N, C]
    constant, decline, parameters = from_sums(s1, s2, tensors, settings)
    d_conv = dz * spread(slopes) + spread(constant)
    if settings.training:
        d_conv = d_conv - centred * spread(decline)
    maps = (cast(d_conv, tensors.conv_out.dtype), None if tensors.shortcut is None else cast(dz, tensors.shortcut.dtype))
    return *maps, *parameters


def layers(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Squeeze-excitation's, which there is."""
    assert tensors.w_reduce is not None
    assert tensors.w_expand is not None
    return tensors.w_reduce, tensors.w_expand, tensors.b_reduce, tensors.b_expand


def _gradients_before(gradient: Tensor, tensors: Tensors, settings: Settings) -> Gradients:
    """The gradients where squeeze-excitation comes last: through it, then those of a tail without any."""
    scale, hidden, g = tensors.scale, tensors.hidden, wide(gradient)
    assert scale is not None
    assert hidden is not None
    w_reduce, w_expand, *_ = layers(tensors)
    plain = tensors._replace(w_reduce=None, w_expand=None, b_reduce=None, b_expand=None, scale=None, hidden=None)
    y = activate(_linear(plain, settings)[2], settings.activation)
    dt, dq, dm, active = excite_gradients((g * y).sum((2, 3)), hidden, scale, w_reduce, w_expand, settings.se_activation)
    with torch.autocast(y.device.type, enabled=False):
        found = (dq.T @ y.mean((2, 3)), dt.T @ active, dq.sum(0), dt.sum(0))
    d_layers = (None if x is None else cast(each, x.dtype) for x, each in zip(tensors[4:8], found, strict=True))
    dy = g * spread(scale) + spread(dm) / (y.shape[2] * y.shape[3])
    return *gradients(dy, plain, settings._replace(se_last=False))[:4], *d_layers


def from_sums(s1: Tensor, s2: Tensor, tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor, Gradients]:
    """Return k [C] or [N, C] and l [C] of dc = dz s a + k - (c - mu) l, and the parameters' gradients in their dtypes."""
    conv_out, _, weight, bias, w_reduce, w_expand, _, _, image_mean, mean, variance, scale, hidden = tensors
    rstd = torch.rsqrt(wide(variance) + settings.eps)
    a = wide(weight) * rstd
    positions = conv_out.shape[2] * conv_out.shape[3]
    d_linear: Gradients = (None, None, None, None)
    constant = torch.zeros_like(a)
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
            d_expand = dt.T @ activate(hidden, settings.se_activation)
            d_linear = (dq.T @ _squeezed(tensors, settings), d_expand, dq.sum(0), dt.sum(0))
        d_bias = (scale * s1 + dm).sum(0)
        d_weight = (scale * s2 + dm * (image_mean - wide(mean))).sum(0) * rstd
        constant = a * dm / positions
    decline = torch.zeros_like(a)
    if settings.training:
        count = conv_out.shape[0] * positions
        constant, decline = constant - a * d_bias / count, a * rstd * d_weight / count
    found = (d_weight, d_bias, *d_linear)
    cast_to = zip(tensors[2:], found, strict=False)
    return constant, decline, tuple(None if x is None or g is None else cast(g, x.dtype) for x, g in cast_to)


class ResidualTail(torch.autograd.Function):
    """out and its gradients; the statistics enter as constants, and the formulas above know better."""

    @staticmethod
    def forward(ctx: Any, form: Any, settings: Settings, *given: Tensor | None) -> Tensor:
        tensors = Tensors(*given)  # type: ignore[arg-type]
        out, scale, hidden = form.apply(tensors, settings)
        ctx.form, ctx.settings = form, settings
        ctx.save_for_backward(*given, scale, hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.form.gradients(gradient, Tensors(*ctx.saved_tensors), ctx.settings)
        return None, None, *found, *(None,) * (GIVEN - len(found))


def tail(form: Any, tensors: Tensors, settings: Settings) -> Tensor:
    """act(z), channels_last, with its gradients, by the `apply` and `gradients` of the module `form`."""
    return ResidualTail.apply(form, settings, *tensors[:GIVEN]).contiguous(memory_format=torch.channels_last)
