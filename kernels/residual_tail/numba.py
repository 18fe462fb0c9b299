"""The residual tail on a CPU: the same algebra as `fusable`, each pass over the map a loop of `kernels.map_loops`.

Statistics 1 read; result 2 reads, 1 write; sums for the gradients 3 reads, 1 write; the gradient of conv_out 2 reads, 1 write;
one less of all where there is no shortcut, but that Mish's dz is stored even then: its slope takes longer than a read.
"""

import torch
from torch import Tensor

from kernels import map_loops
from kernels.backends import unfilled, wide
from kernels.map_loops import NUMBER, Array, channels_last, flat, stacked
from kernels.residual_tail import fusable
from kernels.residual_tail.fusable import Gradients, Settings, Tensors
from kernels.threads import run


def statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, per_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fusable.statistics`."""
    (n, channels), positions = x.shape[:2], x.shape[2] * x.shape[3]
    image_mean, m2 = unfilled(x, n, channels), unfilled(x, n, channels)
    run(map_loops.image_statistics, n, flat(channels_last(x)), image_mean.numpy(), m2.numpy(), positions)
    mean, variance = unfilled(x, channels), unfilled(x, channels)
    map_loops.merge(image_mean.numpy(), m2.numpy(), positions, mean.numpy(), variance.numpy())
    fusable.move(running_mean, running_var, mean, variance, momentum, n * positions)
    return image_mean if per_image else unfilled(x, 0), mean, variance


def apply(tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`fusable.apply`."""
    if settings.se_last:
        return fusable.apply(tensors, settings)
    tensors = fusable.excited(tensors, settings)
    x, r = channels_last(tensors.conv_out), tensors.shortcut
    out, positions = torch.empty_like(x), x.shape[2] * x.shape[3]
    added = None if r is None else flat(channels_last(r))
    vectors = _vectors(tensors, settings)
    run(map_loops.result, len(x), flat(x), added, vectors, NUMBER[settings.activation], flat(out), positions)
    return out, tensors.scale, tensors.hidden


def _vectors(tensors: Tensors, settings: Settings, *more: Tensor) -> Array:
    return stacked(wide(tensors.mean), *fusable.line(tensors, settings), *more)


def gradients(gradient: Tensor, tensors: Tensors, settings: Settings) -> Gradients:
    """`fusable.gradients`."""
    if settings.se_last:
        return fusable.gradients(gradient, tensors, settings)
    g, x, r = channels_last(gradient), channels_last(tensors.conv_out), tensors.shortcut
    (n, channels), positions = x.shape[:2], x.shape[2] * x.shape[3]
    activation = settings.activation
    d_conv, s1, s2 = torch.empty_like(x), unfilled(x, n, channels), unfilled(x, n, channels)
    dz = torch.empty_like(x) if activation == "mish" or (activation == "relu" and r is not None) else None
    added, stored = None if r is None else flat(channels_last(r)), None if dz is None else flat(dz)
    vectors = _vectors(tensors, settings)
    run(
        map_loops.sums, n, flat(g), flat(x), added, vectors, NUMBER[activation], stored, s1.numpy(), s2.numpy(), positions
    )  # fmt: skip
    constant, decline, parameters = fusable.from_sums(s1, s2, tensors, settings)
    vectors, source = _vectors(tensors, settings, constant, decline), flat(g) if stored is None else stored
    run(map_loops.map_gradient, n, source, flat(x), vectors, stored is None and activation == "relu", flat(d_conv), positions)
    return d_conv, None if r is None else g if dz is None else dz, *parameters
