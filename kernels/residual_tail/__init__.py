"""The end of a residual block: act(shortcut + SE(BN(conv_out))), channels_last, with its gradients.

    out = act(z)        z = s (gamma (c - mu) rstd + beta) + r        r through a BN of its own where it has one
    s = sigmoid(W_expand act(W_reduce mean_hw(BN(c)) + b_reduce) + b_expand), or 1

and SE(act(BN(conv_out))), the input of a convolution in a pre-activation network (`se_last`).

Four forms of one function: PyTorch's own operations (`reference.py`), our algebra as operations the compiler may fuse
(`fusable.py`, with the formulas and their derivatives), and the same algebra as Triton kernels (`triton.py`) and as loops of a
CPU (`numba.py`), called without the operators, whose calls take 0.2 ms a tail, where nothing is compiled. Passes over the map
in the last two: statistics 1 read; result 2 reads, 1 write; sums for the gradients 3 reads, 1 write; the gradient of conv_out
2 reads, 1 write. Evaluation is one pass, or two where squeeze-excitation has to see the map first.

To PyTorch it is three operators. An operator that changes its arguments has no gradient, so the statistics are one of their
own; the gradient of `fastcifar::residual_tail` accounts for how they depend on conv_out. A fourth, statistics of a sum, and the
last arguments of the others are for the compiler: `kernels/neighbours.py` moves what stands next to a tail into its kernels.
"""

from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from kernels.activations import Activation
from kernels.backends import Backend, describe, resolve, runs_numba, runs_triton, unfilled
from kernels.operators import register_fake
from kernels.residual_tail import fusable, reference
from kernels.residual_tail.fusable import EVERY, GIVEN, NEAR, Neighbours, Settings, Tensors, has_own_gradient, shortcut_tail
from kernels.residual_tail.reference import BatchNorm, SqueezeExcitation, TailActivation

CHANNELS_LAST = torch.channels_last


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
    shortcut_bn: BatchNorm | None = None,
    se: SqueezeExcitation | None = None,
    se_activation: Activation = "relu",
    activation: TailActivation = "relu",
    se_last: bool = False,
    backend: Backend | Literal["fusable"] = "auto",
) -> Tensor:
    """BN, squeeze-excitation where `se` is given, sum with `shortcut` where there is one, activation.

    conv_out, shortcut: [N, C, H, W], of one dtype, which the result has. bn_weight, bn_bias, running_mean, running_var:
    [C]. shortcut_bn: the same four of the BN, with the same momentum and eps, through which the shortcut passes first, where it
    has one. se: (w_reduce [R, C], w_expand [C, R], b_reduce [R] or None, b_expand [C] or None), or the first two of these.
    se_last: SE(act(BN(conv_out))) instead, as in front of a convolution; there is no shortcut then.
    training: normalise by the batch and move the running statistics as nn.BatchNorm2d does. backend: "fusable" computes by the
    kernels' algebra on any device. Everything between is computed in float32 (float64 for float64), under autocast too.

    Raises ValueError, naming shape and expectation, for tensors that do not fit, one value per channel in training, and a
    backend that cannot serve conv_out.
    """
    channels = (bn_weight, bn_bias, running_mean, running_var)
    _check(conv_out, shortcut, channels, training, se, se_activation, activation)
    if shortcut_bn is not None:
        if shortcut is None:
            raise ValueError("residual_tail: shortcut_bn must have a shortcut to normalise, got none")
        _check(shortcut, None, shortcut_bn, training, None, "relu", "none")
    if se_last and (se is None or shortcut is not None):
        raise ValueError("residual_tail: se_last must have squeeze-excitation and no shortcut")
    form = backend if backend == "fusable" else resolve(variant(shortcut, se, activation), backend, conv_out)
    module = None if form == "torch" else _called(form)
    if shortcut is not None and shortcut_bn is not None and (form == "torch" or module is not None):
        same: dict[str, Any] = {"training": training, "momentum": momentum, "eps": eps, "backend": form}
        shortcut = residual_tail(shortcut, None, *shortcut_bn, activation="none", **same)
    if form == "torch":
        return reference.residual_tail(
            conv_out, shortcut, *channels,
            training=training, momentum=momentum, eps=eps, se=se, se_activation=se_activation, activation=activation,
            se_last=se_last,
        )  # fmt: skip
    # The statistics are taken outside autograd: the gradient of the tail accounts for how they depend on conv_out.
    statistics = _statistics if module is None else module.statistics
    image_mean, mean, variance, squeezes_first = None, running_mean, running_var, se is not None and not se_last
    if training:
        image_mean, mean, variance = statistics(conv_out.detach(), running_mean, running_var, momentum, squeezes_first)
    elif squeezes_first:  # the squeeze wants the means of images; nothing moves
        image_mean, _, _ = statistics(conv_out.detach(), mean.clone(), variance.clone(), 0.0, True)
    image_mean = image_mean if squeezes_first else None
    tensors = Tensors(conv_out, shortcut, bn_weight, bn_bias, *_linear(se), image_mean, mean, variance)
    settings = Settings(training, eps, se_activation, activation, se_last)
    if module is not None:
        return fusable.tail(module, tensors, settings)
    return _tail(*tensors[:GIVEN], *settings, *_of_shortcut(shortcut, shortcut_bn, training, momentum))[0]


def _of_shortcut(shortcut: Tensor | None, norm: BatchNorm | None, training: bool, momentum: float) -> tuple[Any, ...]:
    """What the operator is told of the shortcut's own BN; in training its running statistics move."""
    if shortcut is None or norm is None:
        return ()
    weight, bias, mean, variance = norm
    if training:
        _, mean, variance = _statistics(shortcut.detach(), mean, variance, momentum, False)
    return *Neighbours()[:2], weight, bias, mean, variance


def variant(shortcut: Any, se: Any, activation: str) -> str:
    """The name of this kind of tail: `residual_tail/shortcut+se+mish`.

    Which form is fastest depends on what there is to fuse, so a plan can choose one for each kind.
    """
    parts = [*(["shortcut"] if shortcut is not None else []), *(["se"] if se is not None else []), activation]
    return "residual_tail/" + "+".join(parts)


def _check(
    conv_out: Tensor, shortcut: Tensor | None, channels: tuple[Tensor, ...], training: bool, se: SqueezeExcitation | None,
    se_activation: str, activation: str,
) -> None:  # fmt: skip
    """Raise ValueError for what no form of the tail accepts."""
    if conv_out.dim() != 4 or not conv_out.is_floating_point() or conv_out.numel() == 0:
        raise ValueError(f"residual_tail: conv_out must be a filled floating-point [N, C, H, W], got {describe(conv_out)}")
    c, units = conv_out.shape[1], len(se[0]) if se is not None else 0
    if training and conv_out.numel() == c:
        raise ValueError(f"residual_tail: training needs more than one value per channel, got {describe(conv_out)}")
    if shortcut is not None and (shortcut.shape, shortcut.dtype) != (conv_out.shape, conv_out.dtype):
        raise ValueError(f"residual_tail: shortcut must be like conv_out, {describe(conv_out)}, got {describe(shortcut)}")
    names = ("bn_weight", "bn_bias", "running_mean", "running_var", "w_reduce", "w_expand", "b_reduce", "b_expand", "shortcut")
    shapes = ((c,), (c,), (c,), (c,), (units, c), (c, units), (units,), (c,), conv_out.shape)
    for name, x, shape in zip(names, (*channels, *_linear(se), shortcut), shapes, strict=True):
        if x is None:
            continue
        if x.shape != shape or not x.is_floating_point() or (x.dim() == 1 and not x.is_contiguous()):
            raise ValueError(f"residual_tail: {name} must be floating-point, dense, {list(shape)}, got {describe(x)}")
        if x.device != conv_out.device:
            raise ValueError(f"residual_tail: {name} must be on {conv_out.device} like conv_out, got {describe(x)}")
    if activation not in get_args(TailActivation):
        raise ValueError(f"residual_tail: activation must be relu, mish or none, got {activation!r}")
    if se_activation not in get_args(Activation):
        raise ValueError(f"residual_tail: se_activation must be relu or mish, got {se_activation!r}")


def _linear(se: SqueezeExcitation | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """w_reduce, w_expand, b_reduce and b_expand, or None."""
    if se is None:
        return None, None, None, None
    return se if len(se) == 4 else (*se, None, None)


# The operators


def _schema(tensors: int, neighbours: int) -> str:
    """The arguments of an operator: the first of Tensors, the settings, the first of Neighbours with their defaults."""
    kinds = {name: "Tensor?" if type(None) in get_args(hint) else "Tensor" for name, hint in get_type_hints(Tensors).items()}
    named = [f"{kinds[name]} {name}" for name in Tensors._fields[:tensors]]
    named += [f"{hint.__name__} {name}" for name, hint in get_type_hints(Settings).items()]
    defaults = list(Neighbours._field_defaults.items())[:neighbours]
    return ", ".join(named + [f"{'Tensor?' if value is None else 'float'} {name}={value}" for name, value in defaults])


def _unpack(tensors: int, arguments: tuple[Any, ...]) -> tuple[Tensors, Settings, Neighbours]:
    """An operator's arguments, whose defaults may be left out, as its schema names them."""
    scalars = tensors + len(Settings._fields)
    return Tensors(*arguments[:tensors]), Settings(*arguments[tensors:scalars]), Neighbours(*arguments[scalars:])


def _form(x: Tensor) -> Any:
    """The module that serves x in the operators: all have the functions statistics, apply and gradients."""
    if runs_triton(x):
        from kernels.residual_tail import triton

        return triton
    return _numba() if runs_numba(x) else fusable


def _numba() -> Any:
    from kernels.residual_tail import numba

    return numba


def _called(form: str) -> Any:
    """The module to call without the operators: what the compiler may look into, or need not where there is none."""
    if form == "fusable":
        return fusable
    return _numba() if form == "numba" and not torch.compiler.is_compiling() else None


def _fuses(form: Any) -> bool:
    """Whether a form's kernels take neighbours; for the others they are computed here."""
    return getattr(form, "FUSES_NEIGHBOURS", False)


def _dropped(x: Tensor, neighbours: Neighbours) -> Tensor:
    return x if neighbours.kept is None else x * neighbours.kept * (1 / neighbours.keep)


def _apply(tensors: Tensors, settings: Settings, neighbours: Neighbours) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`fusable.apply` of a shortcut that went through its own BN, then dropout."""
    form = _form(tensors.conv_out)
    if _fuses(form):
        return form.apply(tensors, settings, neighbours)
    if neighbours.shortcut_weight is not None:
        tensors = tensors._replace(shortcut=form.apply(*shortcut_tail(tensors, settings, neighbours))[0])
    out, scale, hidden = form.apply(tensors, settings)
    return _dropped(out, neighbours), scale, hidden


def _gradients(gradient: Tensor, tensors: Tensors, settings: Settings, neighbours: Neighbours) -> fusable.Gradients:
    """`fusable.gradients` behind dropout, of the sum of both gradients, with what conv_out has from elsewhere."""
    form = _form(tensors.conv_out)
    if _fuses(form):
        return form.gradients(gradient, tensors, settings, neighbours)
    gradient = gradient if neighbours.second is None else gradient + neighbours.second
    own_tail = shortcut_tail(tensors, settings, neighbours) if neighbours.shortcut_weight is not None else None
    if own_tail is not None:
        tensors = tensors._replace(shortcut=form.apply(*own_tail)[0])
    d_conv, d_shortcut, *others = form.gradients(_dropped(gradient, neighbours), tensors, settings)
    if own_tail is not None:
        dz = _dropped(gradient, neighbours) if d_shortcut is None else d_shortcut
        d_shortcut, _, *norm = form.gradients(dz, *own_tail)
        others += norm[:2]
    return d_conv if neighbours.elsewhere is None else d_conv + neighbours.elsewhere, d_shortcut, *others


@torch.library.custom_op("fastcifar::residual_tail_statistics", mutates_args=("running_mean", "running_var"))
def _statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, per_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _form(x).statistics(x, running_mean, running_var, momentum, per_image)


@register_fake(_statistics)
def _(x: Tensor, mean: Tensor, var: Tensor, momentum: float, per_image: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, channels = x.shape[:2]
    return unfilled(x, n, channels) if per_image else unfilled(x, 0), unfilled(x, channels), unfilled(x, channels)


@torch.library.custom_op("fastcifar::residual_sum_statistics", mutates_args=("running_mean", "running_var"))
def _sum_statistics(
    x: Tensor, addend: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, per_image: bool,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The statistics of x + addend, and that sum, channels_last. factor: of the addend, [1 or N, 1, 1, 1]."""
    form = _form(x)
    if not _fuses(form):
        total = (x + (addend if factor is None else addend * factor)).contiguous(memory_format=CHANNELS_LAST)
        return *form.statistics(total, running_mean, running_var, momentum, per_image), total
    total = torch.empty_like(x, memory_format=CHANNELS_LAST)
    return *form.statistics(x, running_mean, running_var, momentum, per_image, addend, total, factor), total


@register_fake(_sum_statistics)
def _(
    x: Tensor, addend: Tensor, mean: Tensor, var: Tensor, momentum: float, per_image: bool, factor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, channels = x.shape[:2]
    image_mean = unfilled(x, n, channels) if per_image else unfilled(x, 0)
    return image_mean, unfilled(x, channels), unfilled(x, channels), torch.empty_like(x, memory_format=CHANNELS_LAST)


@torch.library.custom_op(
    "fastcifar::residual_tail", mutates_args=(), schema=f"({_schema(GIVEN, NEAR)}) -> (Tensor, Tensor, Tensor)"
)
def _tail(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out, scale and hidden; the last two empty without squeeze-excitation."""
    out, *excited = _apply(*_unpack(GIVEN, arguments))
    scale, hidden = (unfilled(out, 0) if x is None else x for x in excited)
    return out.contiguous(memory_format=CHANNELS_LAST), scale, hidden


@register_fake(_tail)
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, w_expand = arguments[0], _unpack(GIVEN, arguments)[0].w_expand
    scale, hidden = (unfilled(x, *((0,) if w_expand is None else (len(x), w_expand.shape[side]))) for side in (0, 1))
    return torch.empty_like(x, memory_format=CHANNELS_LAST), scale, hidden


@torch.library.custom_op(
    "fastcifar::residual_tail_backward", mutates_args=(),
    schema=f"(Tensor gradient, {_schema(EVERY, len(Neighbours._fields))}) -> Tensor[]",
)  # fmt: skip
def _tail_backward(gradient: Tensor, *arguments: Any) -> list[Tensor]:
    """The gradients of the first eight of Tensors, empty where absent and for a shortcut whose gradient is `gradient`.

    Those of the shortcut's own weight and bias come last, where it has a BN.
    """
    given = _unpack(EVERY, arguments)
    d_conv, dz, *parameters = _gradients(gradient, *given)
    maps = (d_conv, dz if has_own_gradient(*given) else None)
    dense = (None if x is None else x.contiguous(memory_format=CHANNELS_LAST) for x in maps)
    return [gradient.new_empty(0) if x is None else x for x in (*dense, *parameters)]


@register_fake(_tail_backward)
def _(gradient: Tensor, *arguments: Any) -> list[Tensor]:
    tensors, settings, neighbours = _unpack(EVERY, arguments)
    stored = (True, has_own_gradient(tensors, settings, neighbours))
    maps = [torch.empty_like(gradient, memory_format=CHANNELS_LAST) if each else gradient.new_empty(0) for each in stored]
    norm = [x for x in (neighbours.shortcut_weight, neighbours.shortcut_bias) if x is not None]
    return maps + [gradient.new_empty(0) if x is None else x.new_empty(x.shape) for x in (*tensors[2:8], *norm)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.settings, neighbours = _unpack(GIVEN, inputs)
    excited = output[1:] if tensors.w_reduce is not None else (None, None)
    ctx.save_for_backward(*tensors[:GIVEN], *excited, *(x for x in neighbours if not isinstance(x, float)))
    ctx.keep, ctx.inputs = neighbours.keep, len(inputs)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    settings, tensors = ctx.settings, Tensors(*ctx.saved_tensors[:EVERY])
    kept, *others = ctx.saved_tensors[EVERY:]
    neighbours = Neighbours(kept, ctx.keep, *others)
    own = dict[int, Tensor]()  # by the argument's number
    if gradient is not None:
        found = _tail_backward(gradient, *tensors, *settings, *neighbours)
        found[1] = found[1] if has_own_gradient(tensors, settings, neighbours) else gradient
        own = {number: g for number, (x, g) in enumerate(zip(tensors[:8], found, strict=False)) if x is not None}
        of_norm = GIVEN + len(settings) + Neighbours._fields.index("shortcut_weight")
        own |= dict(enumerate(found[8:], of_norm))
    return tuple(own.get(number) for number in range(ctx.inputs))


_tail.register_autograd(_gradient, setup_context=_keep)
