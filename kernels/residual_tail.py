"""A convolution's output and a shortcut enter; act(shortcut + SE(BN(conv_out))) leaves, channels_last, with its gradients.

    out = act(z)        z = s (gamma (c - mu) rstd + beta) + r
    s = sigmoid(W_expand act(W_reduce mean_hw(BN(c)) + b_reduce) + b_expand), or 1

Three forms of one function: PyTorch's own operations (`reference.residual_tail`), our algebra as operations the compiler may
fuse (`residual_tail_fusable`; its formulas are in `residual_tail_function.py`), and the same algebra as Triton kernels.
Passes over the map in the last: statistics 1 read; result 2 reads, 1 write; sums for the gradients 3 reads, 1 write; the
gradient of conv_out 2 reads, 1 write. Evaluation is one pass, or two where squeeze-excitation has to see the map first.
"""

from typing import Any, Protocol

from torch import Tensor

from kernels import reference, residual_tail_function
from kernels.backends import Backend, describe, resolve
from kernels.reference import Activation, SqueezeExcitation
from kernels.residual_tail_function import Settings, TailActivation, Tensors


def residual_tail(
    conv_out: Tensor,
    shortcut: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float,
    eps: float,
    se: SqueezeExcitation | None = None,
    se_activation: Activation = "relu",
    activation: TailActivation = "relu",
    backend: Backend = "auto",
) -> Tensor:
    """BN, squeeze-excitation where `se` is given, sum with `shortcut` where there is one, activation.

    conv_out, shortcut: [N, C, H, W], of one dtype, which the result has. bn_weight, bn_bias, running_mean, running_var:
    [C]. se: (w_reduce [R, C], w_expand [C, R], b_reduce [R] or None, b_expand [C] or None), or the first two of these.
    training: normalise by the batch and move the running statistics as nn.BatchNorm2d does. Everything between is computed in
    float32 (float64 for float64), under autocast too.

    Raises ValueError, naming shape and expectation, for tensors that do not fit, one value per channel in training, and a
    backend that cannot serve conv_out.
    """
    check(conv_out, shortcut, (bn_weight, bn_bias, running_mean, running_var), training, se, se_activation, activation)
    if resolve(variant(shortcut, se, activation), backend, conv_out) == "torch":
        return reference.residual_tail(
            conv_out, shortcut, bn_weight, bn_bias, running_mean, running_var,
            training=training, momentum=momentum, eps=eps, se=se, se_activation=se_activation, activation=activation,
        )  # fmt: skip
    from kernels import residual_tail_ops

    settings = Settings(training, eps, se_activation, activation)
    channels = (bn_weight, bn_bias, running_mean, running_var)
    return _compose(residual_tail_ops, conv_out, shortcut, channels, se, momentum, settings)


def residual_tail_fusable(
    conv_out: Tensor,
    shortcut: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float,
    eps: float,
    se: SqueezeExcitation | None = None,
    se_activation: Activation = "relu",
    activation: TailActivation = "relu",
) -> Tensor:
    """`residual_tail` by the algebra of the fused kernels, in PyTorch operations that torch.compile may fuse; any device."""
    channels = (bn_weight, bn_bias, running_mean, running_var)
    check(conv_out, shortcut, channels, training, se, se_activation, activation)
    settings = Settings(training, eps, se_activation, activation)
    return _compose(residual_tail_function, conv_out, shortcut, channels, se, momentum, settings)


def variant(shortcut: Any, se: Any, activation: str) -> str:
    """The name a measurement of this kind of tail is recorded under: `residual_tail/shortcut+se+mish`.

    Whether the kernels win depends on what there is to fuse: each kind is measured for itself.
    """
    parts = [*(["shortcut"] if shortcut is not None else []), *(["se"] if se is not None else []), activation]
    return "residual_tail/" + "+".join(parts)


class _Operations(Protocol):
    """What the two modules that carry the algebra out have in common; the formulas say what is what."""

    def batch_statistics(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, per_image: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def squeeze(self, x: Tensor) -> Tensor: ...

    def excite(
        self, image_mean: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor,
        w_reduce: Tensor, w_expand: Tensor, b_reduce: Tensor | None, b_expand: Tensor | None, eps: float, activation: str,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def tail(self, tensors: Tensors, settings: Settings) -> Tensor: ...


def _compose(
    operations: _Operations,
    conv_out: Tensor,
    shortcut: Tensor | None,
    channels: tuple[Tensor, Tensor, Tensor, Tensor],
    se: SqueezeExcitation | None,
    momentum: float,
    settings: Settings,
) -> Tensor:
    """The small things first, outside autograd: the gradient of `tail` accounts for how they depend on its inputs."""
    weight, bias, running_mean, running_var = channels
    image_mean = scale = hidden = None
    mean, variance = running_mean, running_var
    if settings.training:
        x = conv_out.detach()
        image_mean, mean, variance = operations.batch_statistics(x, running_mean, running_var, momentum, se is not None)
    elif se is not None:
        image_mean = operations.squeeze(conv_out.detach())
    w_reduce, w_expand, b_reduce, b_expand = (*se, None, None)[:4] if se is not None else (None,) * 4
    if image_mean is not None and w_reduce is not None and w_expand is not None:
        small = (weight.detach(), bias.detach(), w_reduce.detach(), w_expand.detach())
        biases = (_detached(b_reduce), _detached(b_expand))
        scale, hidden = operations.excite(image_mean, mean, variance, *small, *biases, settings.eps, settings.se_activation)
    else:
        image_mean = None
    linear = (w_reduce, w_expand, b_reduce, b_expand)
    return operations.tail(
        Tensors(conv_out, shortcut, weight, bias, *linear, image_mean, mean, variance, scale, hidden), settings
    )


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def check(
    conv_out: Tensor,
    shortcut: Tensor | None,
    channels: tuple[Tensor, Tensor, Tensor, Tensor],
    training: bool,
    se: SqueezeExcitation | None,
    se_activation: str,
    activation: str,
) -> None:
    """Raise ValueError for what no form of the tail accepts."""
    if conv_out.dim() != 4 or not conv_out.is_floating_point() or conv_out.numel() == 0:
        raise ValueError(f"residual_tail: conv_out must be a filled floating-point [N, C, H, W], got {describe(conv_out)}")
    n, c, height, width = conv_out.shape
    if training and n * height * width == 1:
        raise ValueError(f"residual_tail: training needs more than one value per channel, got {describe(conv_out)}")
    if shortcut is not None and (shortcut.shape, shortcut.dtype) != (conv_out.shape, conv_out.dtype):
        raise ValueError(f"residual_tail: shortcut must be like conv_out, {describe(conv_out)}, got {describe(shortcut)}")
    names = ("bn_weight", "bn_bias", "running_mean", "running_var")
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [(name, x, (c,)) for name, x in zip(names, channels, strict=True)]
    if se is not None:
        hidden = se[0].shape[0]
        expected += [("w_reduce", se[0], (hidden, c)), ("w_expand", se[1], (c, hidden))]
        biases = zip(("b_reduce", "b_expand"), se[2:], ((hidden,), (c,)), strict=False)
        expected += [(name, b, shape) for name, b, shape in biases if b is not None]
    for name, x, shape in expected:
        if tuple(x.shape) != shape or not x.is_floating_point() or (x.dim() == 1 and not x.is_contiguous()):
            raise ValueError(f"residual_tail: {name} must be floating-point, dense, {list(shape)}, got {describe(x)}")
    others = [(name, x) for name, x, _ in expected] + ([("shortcut", shortcut)] if shortcut is not None else [])
    for name, x in others:
        if x.device != conv_out.device:
            raise ValueError(f"residual_tail: {name} must be on {conv_out.device} like conv_out, got {describe(x)}")
    if activation not in ("relu", "mish", "none"):
        raise ValueError(f"residual_tail: activation must be relu, mish or none, got {activation!r}")
    if se_activation not in ("relu", "mish"):
        raise ValueError(f"residual_tail: se_activation must be relu or mish, got {se_activation!r}")
