"""The layers between the convolutions, on feature maps [N, C, H, W]."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.distributed import ALONE, World
from fastcifar.errors import unknown
from fastcifar.models.sync_norm import SyncNorm
from kernels.activations import Activation
from kernels.backends import resolve
from kernels.dropout import dropout as keyed_dropout
from kernels.residual_tail import residual_tail, variant

# A backend of the kernels, or their algebra in PyTorch operations for the compiler to fuse.
Form = Literal["auto", "torch", "numba", "triton", "fusable"]
# A form of all, or {kind: form}: augment, squeeze_excite, residual_tail/shortcut+se+mish and its like; "*" for those not named.
Kernels = Form | dict[str, Form]
StochasticDepthMode = Literal["sample", "batch"]
ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.Mish: "mish"}  # what the kernels know
TAILS = [variant(*parts) for parts in product((None, True), (None, True), (*ACTIVATIONS.values(), "none"))]
KINDS = ("*", "augment", "squeeze_excite", *TAILS)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """A convolution whose padding keeps the map's size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)


@dataclass(frozen=True)
class Norm:
    """What distinguishes one network's batch norm from another's."""

    momentum: float = 0.1  # weight of the newest batch in the running statistics, above 0, at most 1
    eps: float = 1e-5  # added to the variance, above 0
    scales: bool = True  # train its weights; off: they stay 1


PYTORCHS = Norm()


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's, but for its count of batches, which the training step moves for all layers at once.

    world: the processes whose batches it normalises as one; by default this one's alone.
    """

    world: World = ALONE

    def __init__(self, channels: int, norm: Norm = PYTORCHS) -> None:
        super().__init__(channels, eps=norm.eps, momentum=norm.momentum)
        self.weight.requires_grad_(norm.scales)

    def forward(self, x: Tensor) -> Tensor:
        assert self.momentum is not None
        if self.training and self.world.size > 1:
            y, mean, var = SyncNorm.apply(x, self.weight, self.bias, self.eps, self.world)
            self._move_statistics(mean, var, len(x) * x[0, 0].numel() * self.world.size)
            return y
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        _, _, running_mean, running_var = _vectors(self)
        running_mean.lerp_(mean, self.momentum or 0.0)
        running_var.lerp_(var * (count / (count - 1)), self.momentum or 0.0)


def synchronise(model: nn.Module, world: World) -> None:
    """Let every batch norm of a model see the batches of all of `world`."""
    for layer in model.modules():
        if isinstance(layer, BatchNorm2d):
            layer.world = world


class SqueezeExcitation(nn.Module):
    """Scale each channel by what the whole map says of it (Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018).

        s = sigmoid(W_expand act(W_reduce mean_hw(x) + b_reduce) + b_expand)        y = x * s

    The bottleneck has channels // reduction units, at least one. bias: whether b_reduce and b_expand exist.
    """

    def __init__(
        self, channels: int, activation: Callable[[], nn.Module], *, reduction: int = 16, bias: bool, kernels: Kernels = "torch"
    ) -> None:
        super().__init__()
        self.kernels = kernels
        hidden = max(channels // reduction, 1)
        self.reduce = nn.Linear(channels, hidden, bias=bias)
        self.activation = activation()
        self.expand = nn.Linear(hidden, channels, bias=bias)

    @property
    def parameters_of_kernels(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """w_reduce [R, C], w_expand [C, R], b_reduce [R] and b_expand [C], as the kernels take them."""
        return self.reduce.weight, self.expand.weight, self.reduce.bias, self.expand.bias

    def forward(self, x: Tensor) -> Tensor:
        form = _form("squeeze_excite", self.kernels, x, self.activation)
        if form in ("numba", "triton"):
            from kernels.squeeze_excite import squeeze_excite

            w_reduce, w_expand, b_reduce, b_expand = self.parameters_of_kernels
            activation = ACTIVATIONS[type(self.activation)]
            return squeeze_excite(x, w_reduce, w_expand, activation, b_reduce, b_expand, backend=form)
        squeezed = x.mean(dim=(2, 3))  # [N, C]
        scale = torch.sigmoid(self.expand(self.activation(self.reduce(squeezed))))
        return x * scale[:, :, None, None].to(x.dtype)


@dataclass
class DrawKeys:
    """What random layers draw by while a training step on a CPU runs; without samples they ask PyTorch's generator.

    Keyed draws are those of the samples: in whatever batch, at whatever place, on however many threads and processes. On CUDA
    draws stay PyTorch's: a captured graph carries its generator on, and an operator of ours would end the compiler's fusion.
    """

    seed: int = 0
    epoch: Tensor | None = None  # [] int64
    samples: Tensor | None = None  # [B] int64, the batch's numbers in their source
    step: Tensor | None = None  # [1] int64, of the epoch

    @contextmanager
    def given(self, seed: int, epoch: Tensor, samples: Tensor | None, step: Tensor) -> Iterator[None]:
        """What is drawn inside is drawn by these."""
        self.seed, self.epoch, self.samples, self.step = seed, epoch, samples, step
        try:
            yield
        finally:
            self.samples = None


class RandomLayer(nn.Module):
    """A layer that drops by the keys of the step, where it is given some: `share_keys`."""

    keys: DrawKeys | None = None
    number = 0  # among the network's random layers

    @property
    def is_keyed(self) -> bool:
        return self.keys is not None and self.keys.samples is not None

    def drop(self, x: Tensor, probability: float, *, by_step: bool = False) -> Tensor:
        """x [N, C, ...] with each element dropped or scaled by 1 / (1 - probability). by_step: keyed by the step, N = 1."""
        assert self.keys is not None
        rows = self.keys.step if by_step else self.keys.samples
        assert rows is not None
        assert self.keys.epoch is not None
        return keyed_dropout(x, rows, self.keys.epoch, probability=probability, layer=self.number, seed=self.keys.seed)


def share_keys(model: nn.Module) -> DrawKeys | None:
    """Number the model's random layers and give them one object of keys, the same one every time; None where there are none."""
    layers = [layer for layer in model.modules() if isinstance(layer, RandomLayer)]
    keys = layers[0].keys or DrawKeys() if layers else None
    for number, layer in enumerate(layers):
        layer.keys, layer.number = keys, number
    return keys


class Dropout(RandomLayer, nn.Dropout):
    """PyTorch's, but for keyed draws: `kernels.dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x, self.p) if self.training and self.is_keyed else super().forward(x)


class StochasticDepth(RandomLayer):
    """Drop a residual branch in training (Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016).

    mode: sample draws for every sample and scales the kept by 1 / survival; batch draws once for the whole batch and scales
    nothing, as report C does. Report C's dropped blocks have no gradients, so that its SGD skips their weights in that step;
    ours are 0, and momentum and decay go on: a multiplication needs no host wait, a branch would.
    """

    def __init__(self, drop_probability: float, mode: StochasticDepthMode = "sample") -> None:
        super().__init__()
        self.drop_probability, self.mode = drop_probability, mode

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_probability == 0:
            return branch
        survival = 1 - self.drop_probability
        shape = (1 if self.mode == "batch" else len(branch), 1, 1, 1)
        if self.is_keyed:
            kept = self.drop(torch.ones(shape, device=branch.device), self.drop_probability, by_step=self.mode == "batch") > 0
        else:
            kept = torch.rand(shape, device=branch.device) < survival
        return branch * (kept if self.mode == "batch" else kept / survival).to(branch.dtype)

    def extra_repr(self) -> str:
        return f"p={self.drop_probability:.3g}, mode={self.mode}"


def dropout(probability: float) -> nn.Module:
    """Dropout, or nothing at all when the probability is 0."""
    return Dropout(probability) if probability else nn.Identity()


def norm_act(
    x: Tensor,
    bn: nn.Module,
    activation: nn.Module,
    kernels: Kernels,
    *,
    se: nn.Module | None = None,
    shortcut: Tensor | None = None,
    shortcut_bn: nn.Module | None = None,
    se_last: bool = False,
) -> Tensor:
    """activation(shortcut_bn(shortcut) + se(bn(x))), each where given: by the modules themselves or as one fused operation.

    se_last: se(activation(bn(x))), which is one operation where both are Triton's.
    """
    squeezing = se if isinstance(se, SqueezeExcitation) else None
    se_last = se_last and squeezing is not None
    name = ACTIVATIONS.get(type(activation), "none")
    kind = variant(shortcut, None if se_last else squeezing, name)
    form = _form(kind, kernels, x, activation, *([squeezing.activation] if squeezing else []))
    if isinstance(bn, BatchNorm2d) and bn.world.size > 1:  # the kernels know one process's statistics only
        form = "torch"
    if squeezing and se_last and {form, form_of(kernels, "squeeze_excite")} != {"triton"}:
        return squeezing(norm_act(x, bn, activation, kernels))
    if shortcut is not None and shortcut_bn is not None and form != "triton":
        shortcut, shortcut_bn = shortcut_bn(shortcut), None
    if form == "torch":
        y = bn(x) if se is None else se(bn(x))
        return activation(y if shortcut is None else shortcut + y)
    assert isinstance(bn, nn.BatchNorm2d)
    tail: Callable[..., Tensor] = partial(residual_tail, backend=form)
    return tail(
        x, shortcut, *_vectors(bn), shortcut_bn=None if shortcut_bn is None else _vectors(shortcut_bn),
        training=bn.training, momentum=bn.momentum, eps=bn.eps, activation=name,
        se=squeezing.parameters_of_kernels if squeezing else None,
        se_activation=ACTIVATIONS[type(squeezing.activation)] if squeezing else "relu", se_last=se_last,
    )  # fmt: skip


def _vectors(bn: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, bias, running mean and variance, as the kernels take them."""
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def idle(*layers: nn.Module) -> bool:
    """Whether dropout and stochastic depth of these layers do nothing now."""
    return not any(layer.training and not isinstance(layer, nn.Identity) for layer in layers)


def form_of(kernels: Kernels, kind: str) -> Form:
    """The form that `kernels` names for a kind of operation."""
    return kernels if isinstance(kernels, str) else kernels.get(kind, kernels.get("*", "auto"))


def require_known(kernels: Kernels) -> None:
    """Raise InputError, with the nearest name, for a form or a kind of operation that is none."""
    for kind, form in (kernels if isinstance(kernels, dict) else {"*": kernels}).items():
        if kind not in KINDS:
            raise unknown("kind of kernel", kind, KINDS)
        if form not in get_args(Form):
            raise unknown("kernels", str(form), get_args(Form))


def _form(kind: str, kernels: Kernels, x: Tensor, *activations: nn.Module) -> Literal["torch", "numba", "triton", "fusable"]:
    """Which implementation of `kind` serves x: "torch" where the kernels lack one of the activations."""
    form = form_of(kernels, kind)
    if form == "torch" or any(type(activation) not in ACTIVATIONS for activation in activations):
        return "torch"
    return "fusable" if form == "fusable" else resolve(kind, form, x)
