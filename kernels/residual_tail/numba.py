"""The residual tail on a CPU: the same algebra as `fusable`, each pass over the map a loop of `kernels.map_loops`.

Statistics 1 read; result 2 reads, 1 write; sums for the gradients 3 reads, 1 write; the gradient of conv_out 2 reads, 1 write;
one less of all where there is no shortcut, but that Mish's dz is stored even then: its slope takes longer than a read.
"""

import torch
from torch import Tensor

from kernels.augment.numba import Array
from kernels.backends import unfilled, wide
from kernels.map_loops import channels_last, flat, image_statistics, tail_loops
from kernels.residual_tail import fusable
from kernels.residual_tail.fusable import Gradients, Settings, Tensors
from kernels.threads import run


def statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, per_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fusable.statistics`."""
    (n, channels), positions = x.shape[:2], x.shape[2] * x.shape[3]
    image_mean, m2 = unfilled(x, n, channels), unfilled(x, n, channels)
    run(image_statistics, n, flat(channels_last(x)), image_mean.numpy(), m2.numpy(), positions)
    var_of_means, mean = torch.var_mean(image_mean.double(), 0, correction=0)
    variance = (m2.mean(0, dtype=torch.float64) / positions + var_of_means).float()
    mean = mean.float()
    fusable.move(running_mean, running_var, mean, variance, momentum, n * positions)
    return image_mean if per_image else unfilled(x, 0), mean, variance


def apply(tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`fusable.apply`."""
    tensors = fusable.excited(tensors, settings)
    x, r = channels_last(tensors.conv_out), tensors.shortcut
    out = torch.empty_like(x)
    result, _, _ = tail_loops(settings.activation)
    added = None if r is None else flat(channels_last(r))
    run(result, len(x), flat(x), added, _vectors(tensors, settings), flat(out), x.shape[2] * x.shape[3])
    return out, tensors.scale, tensors.hidden


def _vectors(tensors: Tensors, settings: Settings, *more: Tensor) -> Array:
    """Mean, slope, intercept and what else the loops want beside a map: [3 or more, 1 or N, C]."""
    vectors = (wide(tensors.mean), *fusable.line(tensors, settings), *more)
    return torch.stack(torch.broadcast_tensors(*(v.detach().reshape(-1, v.shape[-1]) for v in vectors))).numpy()


def gradients(gradient: Tensor, tensors: Tensors, settings: Settings) -> Gradients:
    """`fusable.gradients`."""
    g, x, r = channels_last(gradient), channels_last(tensors.conv_out), tensors.shortcut
    (n, channels), positions = x.shape[:2], x.shape[2] * x.shape[3]
    d_conv, s1, s2 = torch.empty_like(x), unfilled(x, n, channels), unfilled(x, n, channels)
    dz, activation = None, settings.activation
    if activation != "none" and (r is not None or activation == "mish"):
        dz = d_conv if r is None else torch.empty_like(x)
    maps = (None if m is None else flat(channels_last(m)) for m in (g, x, r, dz))
    _, sums, _ = tail_loops(activation)
    g_rows, x_rows, r_rows, dz_rows = maps
    run(sums, n, g_rows, x_rows, r_rows, _vectors(tensors, settings), dz_rows, s1.numpy(), s2.numpy(), positions)
    constant, decline, parameters = fusable.from_sums(s1, s2, tensors, settings)
    if dz is not None:
        g_rows, activation = dz_rows, "none"
    _, _, map_gradient = tail_loops(activation)
    vectors = _vectors(tensors, settings, constant, decline)
    run(map_gradient, n, g_rows, x_rows, vectors, flat(d_conv), positions)
    return d_conv, None if r is None else g if dz is None else dz, *parameters
