"""Schedules, optimizers and the loss, as the recipes name them.

Learning rate and momentum are pure functions of the step, with nothing to save or restore. Epochs in a schedule are those of
the report it comes from (`schedule_epochs` in all). A run of another length stretches them: three epochs of a 250-epoch recipe
with 15 epochs of warm-up spend the same 6 % of their steps warming up.
"""

import inspect
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fastcifar.errors import require
from fastcifar.muon import Muon
from kernels.operators import spare_compiler

ScheduleKind = Literal["multi_step", "one_cycle", "warmup_cosine", "cosine", "cosine_restarts", "linear"]


@dataclass(frozen=True)
class Schedule:
    """How the learning rate runs from the first step to the last."""

    schedule: ScheduleKind = "warmup_cosine"  # shape of the learning rate over training
    schedule_step: Literal["batch", "epoch"] = "batch"  # when the rate moves: with every batch, or once an epoch
    schedule_epochs: float = 200  # length in epochs in which the next fields are given; --epochs stretches them
    peak_lr: float = 0.1  # highest learning rate
    initial_lr: float = 0.0  # learning rate from which the warm-up rises
    final_lr: float = 0.0  # learning rate at the end of a cosine or of the straight line of linear
    warmup_epochs: float = 0.0  # linear rise from initial_lr (one_cycle: half a cosine), in epochs of schedule_epochs
    milestones: tuple[float, ...] = ()  # multi_step: epochs at which the rate is multiplied by lr_factor
    lr_factor: float = 0.1  # multi_step: factor at each milestone, above 0, at most 1
    min_momentum: float | None = None  # one_cycle: momentum falls to this as the rate rises, and back, 0 to below 1
    restart_epochs: float = 10.0  # cosine_restarts: length of the first cycle, in epochs of schedule_epochs
    restart_growth: float = 2.0  # cosine_restarts: each cycle is this many times as long as the one before, 1 or more

    def __post_init__(self) -> None:
        require(self, self.schedule in get_args(ScheduleKind), "schedule", f"one of {', '.join(get_args(ScheduleKind))}")
        require(self, self.schedule_step in ("batch", "epoch"), "schedule_step", "batch or epoch")
        require(self, 0 < self.schedule_epochs < math.inf, "schedule_epochs", "above 0")
        require(self, 0 < self.peak_lr < math.inf, "peak_lr", "above 0")
        require(self, 0 <= self.initial_lr <= self.peak_lr, "initial_lr", f"0..peak_lr ({self.peak_lr})")
        require(self, 0 <= self.final_lr <= self.peak_lr, "final_lr", f"0..peak_lr ({self.peak_lr})")
        require(
            self,
            0 <= self.warmup_epochs < self.schedule_epochs,
            "warmup_epochs",
            f"0 to below {self.schedule_epochs} epochs",
        )
        require(self, list(self.milestones) == sorted(self.milestones), "milestones", "in rising order")
        require(self, all(0 <= epoch < math.inf for epoch in self.milestones), "milestones", "0 or more epochs")
        require(self, 0 < self.lr_factor <= 1, "lr_factor", "above 0, at most 1")
        require(
            self, self.restart_epochs >= self.schedule_epochs / 1000, "restart_epochs", "at least a thousandth of all epochs"
        )
        require(self, 1 <= self.restart_growth < math.inf, "restart_growth", "1 or more")
        require(self, self.min_momentum is None or 0 <= self.min_momentum < 1, "min_momentum", "0 to below 1")
        cycles = self.schedule == "one_cycle"
        require(self, self.min_momentum is None or cycles, "min_momentum", "left out unless schedule is one_cycle")


def epoch_rates(schedule: Schedule, epoch: int, steps: int, epochs: int) -> list[float]:
    """The learning rates of the `steps` batches of epoch `epoch` in 0..epochs-1."""
    if schedule.schedule_step == "epoch":
        return [learning_rate(schedule, epoch, epochs)] * steps
    return [learning_rate(schedule, epoch * steps + step, epochs * steps) for step in range(steps)]


def epoch_momenta(schedule: Schedule, momentum: float, epoch: int, steps: int, epochs: int) -> list[float] | None:
    """The same of the momentum, or None: the schedule does not cycle it, and every group of the optimizer keeps its own."""
    if schedule.min_momentum is None:
        return None
    low, every = schedule.min_momentum, schedule.schedule_step == "epoch"
    points = [epoch] * steps if every else range(epoch * steps, (epoch + 1) * steps)
    total = epochs if every else epochs * steps
    heights = (_one_cycle(schedule, point, total) for point in points)
    return [momentum - (momentum - low) * height for _, height in heights]


def epoch_mean_weights(schedule: Schedule, start: float, epoch: int, steps: int, epochs: int) -> list[float]:
    """What the weights after each batch of epoch `epoch` count in their mean from `start` on, in epochs of the schedule.

    1 / k for the k-th of them, and 1 for those before: then the mean is the newest.
    """
    total = epochs * steps
    first = min(round(start / schedule.schedule_epochs * total), total - 1)
    return [1 / max(1, step - first + 1) for step in range(epoch * steps, (epoch + 1) * steps)]


def learning_rate(schedule: Schedule, step: int, total_steps: int) -> float:
    """Return the learning rate of step `step` in 0..total_steps-1.

    The first step of a linear warm-up already moves: step t has the share (t + 1) / warm-up steps, so that none is wasted at 0.
    """
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    if schedule.schedule == "one_cycle":
        low, height = _one_cycle(schedule, step, total_steps)
        return low + (schedule.peak_lr - low) * height
    epoch = step / total_steps * schedule.schedule_epochs
    warmup_steps = schedule.warmup_epochs / schedule.schedule_epochs * total_steps
    if step < warmup_steps:
        share = min(1.0, (step + 1) / warmup_steps)
        return schedule.initial_lr + (schedule.peak_lr - schedule.initial_lr) * share
    if schedule.schedule == "multi_step":
        return schedule.peak_lr * schedule.lr_factor ** bisect_right(schedule.milestones, epoch)
    since_warmup = epoch - schedule.warmup_epochs
    if schedule.schedule == "cosine_restarts":
        return _cosine(schedule, _share_of_cycle(since_warmup, schedule.restart_epochs, schedule.restart_growth))
    share = since_warmup / (schedule.schedule_epochs - schedule.warmup_epochs)
    if schedule.schedule == "linear":
        return schedule.peak_lr + (schedule.final_lr - schedule.peak_lr) * share
    return _cosine(schedule, share)


def _one_cycle(schedule: Schedule, step: int, total_steps: int) -> tuple[float, float]:
    """The rate at the foot of the slope on which `step` lies, and the height on it, 0..1: PyTorch's OneCycleLR.

    Half a cosine from initial_lr up to the peak in step w = warm-up steps - 1, half a cosine down to final_lr in the last step.
    """
    top = max(0.0, schedule.warmup_epochs / schedule.schedule_epochs * total_steps - 1)
    if step <= top:
        share = step / top if top else 1.0
        return schedule.initial_lr, (1 - math.cos(math.pi * share)) / 2
    share = (step - top) / (total_steps - 1 - top)
    return schedule.final_lr, (1 + math.cos(math.pi * share)) / 2


def _cosine(schedule: Schedule, share: float) -> float:
    """Half a cosine from peak_lr at share 0 to final_lr at share 1 (Loshchilov and Hutter, "SGDR", ICLR 2017)."""
    return schedule.final_lr + (schedule.peak_lr - schedule.final_lr) * (1 + math.cos(math.pi * share)) / 2


def _share_of_cycle(epoch: float, length: float, growth: float) -> float:
    """How far `epoch` lies inside its cycle, 0..1; cycle k is length * growth^k epochs long."""
    while epoch >= length:
        epoch, length = epoch - length, length * growth
    return epoch / length


OptimizerKind = Literal["sgd", "nesterov", "adam", "adamw", "muon"]
LossReduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Factors:
    """What some parameters have of their own in an optimizer."""

    head_lr_factor: float = 1.0  # learning rate of the classifier over that of the other weights, above 0
    vector_lr_factor: float = 1.0  # learning rate of biases and batch norm over that of the weights, above 0
    # momentum of what muon moves as SGD does, all but the filters of convolutions; default: momentum
    vector_momentum: float | None = None
    muon_steps: int = 3  # of Newton and Schulz, which make muon's updates orthogonal, 1 to 10
    scale_decay: bool = False  # divide weight_decay by a parameter's learning rate factor: all then shrink by the same share

    def __post_init__(self) -> None:
        for name in ("head_lr_factor", "vector_lr_factor"):
            require(self, 0 < getattr(self, name) < math.inf, name, "above 0")
        require(self, self.vector_momentum is None or 0 <= self.vector_momentum < 1, "vector_momentum", "0 to below 1")
        require(self, 1 <= self.muon_steps <= 10, "muon_steps", "1 to 10")


def build_optimizer(
    model: nn.Module,
    kind: OptimizerKind,
    *,
    momentum: float,
    weight_decay: float,
    decay_norm_and_bias: bool,
    factors: Factors = Factors(),
) -> torch.optim.Optimizer:
    """Build SGD, SGD with Nesterov momentum, Adam or AdamW (betas `momentum` and 0.999), one fused kernel a step, or Muon.

    Decay is added to the gradient (`sgd`, `nesterov`, `adam`, and what muon moves by SGD) or decoupled from it
    (`adamw`). decay_norm_and_bias: True decays every parameter, as the reports do; False those with two or more dimensions.
    The learning rate, and a momentum that cycles, are set at every step by `set_step`. The classifier's parameters are those
    named `classifier.*`; muon's are all others of four dimensions.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        head, vector = name.startswith("classifier."), parameter.ndim < 2
        factor = (factors.head_lr_factor if head else 1.0) * (factors.vector_lr_factor if vector else 1.0)
        decay = weight_decay / (factor if factors.scale_decay else 1.0)
        own: dict[str, Any] = {"weight_decay": decay if decay_norm_and_bias or not vector else 0.0}
        own |= {"lr_factor": factor} if factor != 1 else {}
        own |= {"orthogonal": parameter.ndim == 4 and not head} if kind == "muon" else {}
        groups.setdefault(tuple(own.items()), own | {"params": []})["params"].append(parameter)
    rows = list(groups.values())
    if kind == "muon":
        for row in rows:
            if not row["orthogonal"] and factors.vector_momentum is not None:
                row["momentum"] = factors.vector_momentum
        return _eager(Muon)(rows, momentum=momentum, steps=factors.muon_steps)
    if kind in ("adam", "adamw"):
        adam = _eager(torch.optim.Adam if kind == "adam" else torch.optim.AdamW)
        capturable = next(model.parameters()).is_cuda  # changes no bit of the fused kernel, whose step count is a tensor
        return adam(rows, lr=1.0, betas=(momentum, 0.999), fused=True, capturable=capturable)
    return _eager(torch.optim.SGD)(rows, lr=1.0, momentum=momentum, nesterov=kind == "nesterov", fused=True)


def _eager(kind: type[Optimizer]) -> type[Any]:
    """The optimizer without what imports PyTorch's compiler, only to ask it not to look: half a second of a run's start."""
    for method in (kind.add_param_group, kind.zero_grad, kind.state_dict, kind.load_state_dict):
        spare_compiler(method)
    return type(kind.__name__, (kind,), {"step": torch.no_grad()(inspect.unwrap(kind.step))})


def set_step(optimizer: torch.optim.Optimizer, rate: float | Tensor, momentum: float | None) -> None:
    """Set the next step's learning rate, a number or a 0-d tensor, and momentum (Adam's first beta; None: as it is)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"] if "lr_factor" in group else rate
        if momentum is None:
            continue
        if "momentum" in group:
            group["momentum"] = momentum
        else:
            group["betas"] = (momentum, group["betas"][1])


def momentum_factors(
    optimizer: torch.optim.Optimizer, momenta: Sequence[float], steps_before: int
) -> list[tuple[float, float, float]]:
    """What makes an optimizer with a momentum fixed at c take a step with momentum m, where c cannot be set.

    Returns for each step the factors of its learning rate, of the first moments before it, and of them after it:

        SGD     c (m/c b) + g = m b + g
        Adam    c a m (1 - c) / (c (1 - m)) + (1 - c) g = (m a + (1 - m) g) (1 - c) / (1 - m), undone after the step and in
                the rate, which also takes (1 - c^t) / (1 - m^t), t the number of the step from 1

    momenta: of the steps after the first `steps_before`, 0 to below 1. Not for Nesterov's momentum nor a decoupled decay.
    """
    group = optimizer.param_groups[0]
    if "momentum" in group:
        return [(1.0, m / group["momentum"], 1.0) for m in momenta]
    c, factors = group["betas"][0], []
    for t, m in enumerate(momenta, steps_before + 1):
        after = (1 - m) / (1 - c)
        factors.append((after * (1 - c**t) / (1 - m**t), m / (c * after), after))
    return factors


@contextmanager
def rescaled_moments(optimizer: torch.optim.Optimizer, before: Tensor, after: Tensor) -> Iterator[None]:
    """Multiply SGD's momentum buffers or Adam's running means by 0-d tensors, before and after the step inside the block."""

    def rescale(factor: Tensor) -> None:
        moments = (state.get("momentum_buffer", state.get("exp_avg")) for state in optimizer.state.values())
        if present := [moment for moment in moments if moment is not None]:  # before the first step there are none
            torch._foreach_mul_(present, factor.to(present[0].dtype))

    rescale(before)
    yield
    rescale(after)


@torch.no_grad()
def copies(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """{id: copy} of tensors, some of 4 bytes an element and some of 8."""
    made = [torch.empty_like(tensor) for tensor in tensors]
    for now, new in zip(_words(tensors), _words(made), strict=True):
        torch._foreach_copy_(new, now)
    return dict(zip(map(id, tensors), made, strict=True))


@torch.no_grad()
def take_back(tensors: Sequence[Tensor], before: dict[int, Tensor], wrong: Tensor) -> None:
    """Where the 0-d bool `wrong` says so, give tensors the values of their `copies`, and 0 to those made since; nothing waits.

    x - wrong (x - before)    in the integers that their bits are, since NaN times 0 is NaN; what is right keeps every bit
    """
    kept = [before[id(tensor)] if id(tensor) in before else torch.zeros_like(tensor) for tensor in tensors]
    for now, old in zip(_words(tensors), _words(kept), strict=True):
        change = torch._foreach_sub(now, old)
        torch._foreach_mul_(change, wrong.to(now[0].dtype))
        torch._foreach_sub_(now, change)


def _words(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those of 4 and those of 8 bytes an element as integers: lists of one dtype are a few launches."""
    sized = {integer: [x for x in tensors if x.element_size() == integer.itemsize] for integer in (torch.int32, torch.int64)}
    return [[x.detach().view(integer) for x in some] for integer, some in sized.items()]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore a state_dict, whatever device it was saved on. Raises what PyTorch raises for one that does not fit."""
    capturable = [group.get("capturable") for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, capturable, strict=True):
        if before is not None:
            group["capturable"] = before


def mixed_cross_entropy(logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy against `lam` of the label and the rest of the partner's, smoothed once.

        loss = lam * CE(logits, labels) + (1 - lam) * CE(logits, partner_labels)

    Both terms carry the same smoothed floor, so the target lam * y + (1 - lam) * y' sums to 1, smoothed once.
    logits: [B, C] any float, computed in float32. labels, partner_labels: [B] int64. lam: scalar tensor in 0..1.
    """
    logits = logits.float()
    own = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    partner = F.cross_entropy(logits, partner_labels, label_smoothing=label_smoothing)
    return lam * own + (1 - lam) * partner
