"""Squeeze-excitation of a CPU's channels_last maps: two passes over a map each way, by the loops of `kernels.map_loops`."""

import torch
from torch import Tensor

from kernels import map_loops
from kernels.backends import unfilled
from kernels.map_loops import NONE, channels_last, flat, stacked
from kernels.squeeze_excite import reference
from kernels.squeeze_excite.reference import Results
from kernels.threads import run


def forward(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, b_reduce: Tensor | None, b_expand: Tensor | None, activation: str
) -> Results:
    """`reference.forward`."""
    x, (n, channels), positions = channels_last(x), x.shape[:2], x.shape[2] * x.shape[3]
    squeezed, unused = unfilled(x, n, channels), unfilled(x, n, channels)
    run(map_loops.image_statistics, n, flat(x), squeezed.numpy(), unused.numpy(), positions)
    hidden, scale = reference.excite(squeezed, w_reduce, w_expand, b_reduce, b_expand, activation)
    return _scaled(x, scale, torch.zeros(1, 1)), squeezed, hidden, scale


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x scale + shift, [N, C] or less each."""
    out = torch.empty_like(x)
    vectors = stacked(torch.zeros(1, 1), scale, shift)
    run(map_loops.result, len(x), flat(x), None, vectors, NONE, flat(out), x.shape[2] * x.shape[3])
    return out


def backward(
    gradient: Tensor, x: Tensor, hidden: Tensor, scale: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: str,
    second: Tensor | None = None,
) -> Results:  # fmt: skip
    """`reference.backward`."""
    g = channels_last(gradient if second is None else gradient + second)
    x, positions = channels_last(x), x.shape[2] * x.shape[3]
    unused, d_scale = torch.empty_like(scale), torch.empty_like(scale)
    zeros = stacked(*[torch.zeros(1, x.shape[1])] * 3)
    run(map_loops.sums, len(x), flat(g), flat(x), None, zeros, NONE, None, unused.numpy(), d_scale.numpy(), positions)
    d_logits, d_hidden, d_mean, active = reference.excite_gradients(d_scale, hidden, scale, w_reduce, w_expand, activation)
    return _scaled(g, scale, d_mean / positions), d_logits, d_hidden, active
