"""A device enters; the levers of training speed leave: which it has, why it lacks the others, what a run sets for each.

One table, in the order of the ladder: every rung adds a lever to those before it. The real training path always has the first
two; the others are options of a run.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcifar.device import computes_bf16
from fastcifar.errors import InputError, unknown
from fastcifar.recipes import RunOptions

BASELINE = "loader"  # no lever at all: torchvision's DataLoader, eager, float32, NCHW
ALWAYS = ("resident", "channels_last")  # part of the real training path

# What lets the compiler keep more in registers and recompute less (PERFORMANCE.md, "Compile settings"): 29 % fewer bytes on
# mish_se_resnet18, 21 % and 16 % more on se_resnet18 and robust_resnet64, so it is on by default only where it pays.
TUNED = {"realize_opcount_threshold": 200, "realize_reads_threshold": 32}
TUNING_PAYS = ("mish_se_resnet18",)


@dataclass(frozen=True)
class Lever:
    """One row of the table."""

    name: str
    title: str  # of its rung
    what: str
    cpu: str = ""  # why a CPU does not have it; "" = it has
    cuda: str = ""  # why CUDA does not have it
    cpu_default: bool = True  # on in a CPU's runs when none are named


LEVERS: dict[str, Lever] = {
    row.name: row
    for row in (
        Lever("resident", "resident data", "uint8 set on the device, whole batches augmented there"),
        Lever("channels_last", "channels_last", "weights and activations NHWC"),
        Lever("bf16", "bf16 autocast", "convolutions and linear layers in bfloat16 by autocast"),
        Lever("compile", "torch.compile", "torch.compile of augmentation, network and loss", cpu_default=False),
        Lever(
            "tuned",
            "tuned compile",
            "compiler thresholds that move fewer bytes",
            cpu="the thresholds are made for a GPU's memory traffic",
        ),
        Lever(
            "kernels", "fused kernels", "fused kernels where they measured faster: Triton on CUDA, Numba augmentation on a CPU"
        ),
        Lever(
            "captured",
            "whole step captured",
            "the whole step one CUDA graph",
            cpu="CUDA graphs need a GPU",
            cuda="fastcifar/step.py does not capture the step yet",
        ),
    )
}


def why_not(name: str, device: torch.device) -> str:
    """Why `device` does not have the lever; "" when it has."""
    if name == "bf16" and not computes_bf16(device):
        return f"this {device.type} has no bf16 arithmetic: emulated, it is slower"
    row = LEVERS[name]
    return row.cuda if device.type == "cuda" else row.cpu


def default_levers(arch: str, device: torch.device) -> list[str]:
    """What a run has when none are named: all that pay on this device."""
    names = [name for name, row in LEVERS.items() if not why_not(name, device) and (row.cpu_default or device.type == "cuda")]
    return [name for name in names if name != "tuned" or arch in TUNING_PAYS]


def chosen_levers(named: Iterable[str] | None, arch: str, device: torch.device) -> list[str]:
    """The levers of a run in the table's order. Raises InputError for an unknown one, or one the device does not have."""
    if named is None:
        return default_levers(arch, device)
    wanted = set(named)
    for name in wanted:
        if name not in LEVERS:
            raise unknown("lever", name, LEVERS)
        if reason := why_not(name, device):
            raise InputError(f"lever {name} does not exist on {device.type}: {reason}")
    if "tuned" in wanted and "compile" not in wanted:
        raise InputError("lever tuned needs lever compile: name both, or neither")
    return [name for name in LEVERS if name in wanted or name in ALWAYS]


def run_options(levers: list[str], *, data: Path, seed: int = 0, **others: Any) -> RunOptions:
    """The options of a training run with these levers: any size of model, nothing drawn at the end."""
    return RunOptions(
        data=data,
        seed=seed,
        precision="bf16" if "bf16" in levers else "fp32",
        compile="compile" in levers,
        kernels="auto" if "kernels" in levers else "torch",
        max_parameters=0,
        plots=False,
        **others,
    )


def compiler_settings(levers: list[str]) -> AbstractContextManager[object]:
    """A context in which to run the first steps, whose compiling then follows the levers."""
    if "tuned" not in levers:
        return nullcontext()
    import torch._functorch.config  # here, since importing the compiler takes a second
    import torch._inductor.config

    settings = ExitStack()
    settings.enter_context(torch._inductor.config.patch(TUNED))
    settings.enter_context(torch._functorch.config.patch(ban_recompute_used_far_apart=False))
    return settings
