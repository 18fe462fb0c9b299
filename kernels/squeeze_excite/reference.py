"""Squeeze-excitation in plain PyTorch: the definition, and the operators' formulas for tensors that no kernel serves."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activations import Activation, activate, slope
from kernels.backends import unfilled, wide

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def squeeze_excite(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: Activation = "relu",
    b_reduce: Tensor | None = None, b_expand: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x * sigmoid(w_expand act(w_reduce mean_hw(x) + b_reduce) + b_expand) (Hu et al., CVPR 2018).

    x [N, C, H, W], w_reduce [R, C], w_expand [C, R], b_reduce [R], b_expand [C]; the result has x's shape and dtype.
    """
    squeezed = x.mean(dim=(2, 3)).to(w_reduce.dtype)  # [N, C]
    hidden = F.linear(squeezed, w_reduce, b_reduce)  # [N, R]
    scale = torch.sigmoid(F.linear(activate(hidden, activation), w_expand, b_expand))
    return x * scale[:, :, None, None].to(x.dtype)


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout a map is read and its results are written in: its own if contiguous, else channels_last."""
    if x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def unfilled_results(x: Tensor, w_reduce: Tensor) -> Results:
    """For `forward`: y in `layout_of(x)`, squeezed [N, C], hidden [N, R], scale [N, C]."""
    squeezed, hidden, scale = (unfilled(x, len(x), width) for width in (x.shape[1], w_reduce.shape[0], x.shape[1]))
    return torch.empty_like(x, memory_format=layout_of(x)), squeezed, hidden, scale


def unfilled_gradients(x: Tensor, hidden: Tensor, scale: Tensor) -> Results:
    """For `backward`: the gradients of x, of the sigmoid's argument and of hidden, and act(hidden)."""
    d_x = torch.empty_like(x, memory_format=layout_of(x))
    return d_x, torch.empty_like(scale), torch.empty_like(hidden), torch.empty_like(hidden)


def excite(
    squeezed: Tensor, w_reduce: Tensor, w_expand: Tensor, b_reduce: Tensor | None, b_expand: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """hidden [N, R] and scale [N, C], of squeezed [N, C] in the dtype of which all is computed."""
    biases = (None if b is None else wide(b) for b in (b_reduce, b_expand))
    with torch.autocast(squeezed.device.type, enabled=False):
        hidden = F.linear(squeezed, wide(w_reduce), next(biases))
        return hidden, torch.sigmoid(F.linear(activate(hidden, activation), wide(w_expand), next(biases)))


def excite_gradients(
    d_scale: Tensor, hidden: Tensor, scale: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: str
) -> Results:
    """The gradients of the sigmoid's argument [N, C], of hidden [N, R] and of squeezed [N, C], and act(hidden)."""
    with torch.autocast(hidden.device.type, enabled=False):
        d_logits = d_scale * scale * (1 - scale)
        d_hidden = d_logits @ wide(w_expand) * slope(hidden, activation)
        return d_logits, d_hidden, d_hidden @ wide(w_reduce), activate(hidden, activation)


def forward(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, b_reduce: Tensor | None, b_expand: Tensor | None, activation: str
) -> Results:
    """y, squeezed [N, C], hidden [N, R] and scale [N, C], the last three in float32 (float64 for float64)."""
    squeezed = wide(x).mean(dim=(2, 3))
    hidden, scale = excite(squeezed, w_reduce, w_expand, b_reduce, b_expand, activation)
    y = (wide(x) * scale[:, :, None, None]).to(x.dtype)
    return y.contiguous(memory_format=layout_of(x)), squeezed, hidden, scale


def backward(
    gradient: Tensor, x: Tensor, hidden: Tensor, scale: Tensor, w_reduce: Tensor, w_expand: Tensor, activation: str,
    second: Tensor | None = None,
) -> Results:  # fmt: skip
    """The gradients of x, of the sigmoid's argument [N, C] and of the hidden units [N, R], and act(hidden) [N, R].

    second: the gradient of y's second use, to be added to the first.
    """
    g, positions = wide(gradient) if second is None else wide(gradient) + wide(second), x.shape[2] * x.shape[3]
    d_scale = (g * x).sum(dim=(2, 3))
    d_logits, d_hidden, d_mean, active = excite_gradients(d_scale, hidden, scale, w_reduce, w_expand, activation)
    d_x = g * scale[:, :, None, None] + d_mean[:, :, None, None] / positions
    return d_x.to(x.dtype).contiguous(memory_format=layout_of(x)), d_logits, d_hidden, active
