"""A residual tail as a test case: its inputs, its result with every gradient, and their errors against float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from kernels.residual_tail import reference, residual_tail
from tests.kernel_checks import DEVICE, FLOOR, SLACK, error

Form = Callable[..., Tensor]
TRITON: Form = partial(residual_tail, backend="triton")
NUMBA: Form = partial(residual_tail, backend="numba")
FORMS = {name: partial(residual_tail, backend=name) for name in ("triton", "fusable")}
FLOAT32 = 1.3e-6  # torch.testing's relative tolerance


@dataclass(frozen=True)
class Case:
    """One kind of tail on one shape. units: of the squeeze's bottleneck, 0 = no squeeze-excitation; biases: of its linears."""

    shape: tuple[int, int, int, int]
    activation: str = "relu"
    units: int = 0
    shortcut: bool = True
    training: bool = True
    se_activation: str = "relu"
    biases: bool = False
    se_last: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        se = f"se{self.units}{self.se_activation}{'+biases' * self.biases}{'-last' * self.se_last}" if self.units else "plain"
        return "-".join(
            [shape, self.activation, se, "shortcut" if self.shortcut else "alone", "train" if self.training else "eval"]
        )

    def inputs(self, dtype: torch.dtype, kind: str = "plain") -> dict[str, Tensor]:
        """Maps in `dtype`, parameters and statistics in float32. kind: what the convolution's output is like."""
        torch.manual_seed(0)
        n, c, h, w = self.shape
        units = max(self.units, 1)
        conv_out = 2 * torch.randn(self.shape) + torch.randn(c, 1, 1)
        if kind == "large":  # up to 1e4; half the channels far from 0
            conv_out = conv_out.clamp(-8, 8) * 600 + torch.where(torch.arange(c) % 2 == 0, 5e3, 0.0)[:, None, None]
        if kind == "tiny":
            conv_out *= 1e-6
        if kind == "constant":  # variance 0 in every third channel
            conv_out[:, ::3] = (10 * torch.randn(c))[::3, None, None]
        maps = {"conv_out": conv_out, "shortcut": torch.randn(self.shape), "gradient": torch.randn(self.shape)}
        maps = {name: x.to(dtype).contiguous(memory_format=torch.channels_last) for name, x in maps.items()}
        if kind == "strided":  # parts of larger contiguous maps, and the gradient that a mean over rows sends
            for name in ("conv_out", "shortcut"):
                maps[name] = torch.randn(n, c, 2 * h, w + 1).to(dtype)[:, :, ::2, 1:]
            maps["gradient"] = torch.randn(n, c, 1, w).to(dtype).expand(self.shape)
        var, mean = torch.var_mean(conv_out, (0, 2, 3), correction=0)
        parameters = {
            "bn_weight": torch.randn(c), "bn_bias": torch.randn(c),
            "running_mean": mean + 0.1 * var.sqrt() * torch.randn(c), "running_var": var * (0.5 + torch.rand(c)),
            "w_reduce": torch.randn(units, c) / c**0.5, "w_expand": torch.randn(c, units),
            "b_reduce": torch.randn(units) / 2, "b_expand": torch.randn(c),
        }  # fmt: skip
        return {name: x.to(DEVICE) for name, x in (maps | parameters).items()}

    def run(self, form: Form, inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The result, the moved statistics and the gradients; with everything in `dtype` first, where one is given."""
        leaves = {name: (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_() for name, x in inputs.items()}
        mean, var = (leaves[name].detach().clone() for name in ("running_mean", "running_var"))
        biases = (leaves["b_reduce"], leaves["b_expand"]) if self.biases else ()
        out = form(
            leaves["conv_out"], leaves["shortcut"] if self.shortcut else None, leaves["bn_weight"], leaves["bn_bias"],
            mean, var,
            training=self.training, momentum=0.1, eps=1e-5, activation=self.activation, se_activation=self.se_activation,
            se_last=self.se_last,
            se=(leaves["w_reduce"], leaves["w_expand"], *biases) if self.units else None,
        )  # fmt: skip
        out.backward(leaves["gradient"].detach())
        gradients = {f"gradient of {name}": x.grad for name, x in leaves.items() if x.grad is not None}
        return {"result": out.detach(), "running_mean": mean, "running_var": var} | gradients

    def errors(self, form: Form, dtype: torch.dtype, kind: str = "plain") -> dict[str, tuple[float, float, float]]:
        """For everything that leaves `form`: its error against float64, eager PyTorch's, and what is forgiven to both."""
        inputs = self.inputs(dtype, kind)
        ours, eager = self.run(form, inputs), self.run(reference.residual_tail, inputs)
        exact = self.run(reference.residual_tail, inputs, torch.float64)
        assert ours.keys() == eager.keys()
        assert ours["result"].is_contiguous(memory_format=torch.channels_last)
        found = {}
        for name, value in ours.items():
            assert (value.shape, value.dtype) == (eager[name].shape, eager[name].dtype), name
            forgiven = FLOAT32 if value.dtype == torch.float32 else FLOOR * torch.finfo(value.dtype).eps / 2
            found[name] = error(value, exact[name]), error(eager[name], exact[name]), forgiven
        return found

    def check(self, form: Form, dtype: torch.dtype, kind: str = "plain") -> None:
        """Assert that `form` is as exact as eager PyTorch; where eager overflows in half precision, as exact as half can be."""
        for name, (ours, theirs, forgiven) in self.errors(form, dtype, kind).items():
            bound = max(SLACK * theirs, forgiven) if isfinite(theirs) else forgiven
            assert ours <= bound, f"{name}: error {ours:.3g} against float64, eager's is {theirs:.3g}"
