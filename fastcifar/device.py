"""The device a run uses, its precision, and what the hardware is called."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastcifar.errors import InputError


def choose_device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device; auto takes CUDA where there is one. Raises InputError when CUDA is asked for and absent."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for and PyTorch finds none: use --device cpu, or check the driver")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(choice: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype | None:
    """Return bfloat16 for autocast, or None for float32 throughout; auto takes bf16 where the hardware computes in it."""
    if choice == "auto":
        return torch.bfloat16 if computes_bf16(device) else None
    return torch.bfloat16 if choice == "bf16" else None


def require_kernels(kernels: str | Mapping[str, str], device: torch.device) -> None:
    """Raise InputError where kernels are asked for that the device cannot run."""
    forms = [kernels] if isinstance(kernels, str) else kernels.values()
    if "triton" in forms and device.type != "cuda":
        raise InputError("kernels triton needs a CUDA device, this run is on the CPU: use --kernels auto, or --device cuda")
    if "numba" in forms and device.type != "cpu":
        raise InputError(f"kernels numba needs the CPU, this run is on {device.type}: use --kernels auto, or --device cpu")


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic: emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def set_up_process(device: torch.device, *, deterministic: bool) -> None:
    """Choose algorithms once for the whole process; deterministic ones give the same bits on the same machine every time."""
    torch.set_float32_matmul_precision("highest")  # float32 means float32: speed is bf16's part
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; the CPU is done when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to `device` without waiting for it: a GPU takes it from pinned memory when its turn comes."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of PyTorch's generators, which serve dropout and stochastic depth."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Set them as `generator_states` found them."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


# What a virtual machine calls just "AMD EPYC" is told by family and model. (vendor, family, model): microarchitecture
CPUS = {
    ("AuthenticAMD", 23, 1): "Zen",
    ("AuthenticAMD", 23, 49): "Zen 2",
    ("AuthenticAMD", 25, 1): "Zen 3",
    ("AuthenticAMD", 25, 17): "Zen 4",
    ("AuthenticAMD", 25, 160): "Zen 4c",
    ("AuthenticAMD", 26, 2): "Zen 5",
    ("GenuineIntel", 6, 79): "Broadwell",
    ("GenuineIntel", 6, 85): "Skylake or Cascade Lake",
    ("GenuineIntel", 6, 106): "Ice Lake",
    ("GenuineIntel", 6, 143): "Sapphire Rapids",
    ("GenuineIntel", 6, 207): "Emerald Rapids",
}


def device_name(device: torch.device) -> str:
    """What a report calls the hardware: the GPU's name, or the CPU's with the number of threads."""
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{hardware_name(device)}{threads}"


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        cpuinfo = ""
    return cpu_name(cpuinfo)


def cpu_name(cpuinfo: str) -> str:
    """The CPU's name in the text of /proc/cpuinfo; where it names no model, with microarchitecture, family and model number."""
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())  # the first processor's
    name, family, model = facts.get("model name") or "CPU", facts.get("cpu family", ""), facts.get("model", "")
    if any(c.isdigit() for c in name) or not (family.isdigit() and model.isdigit()):
        return name
    known = CPUS.get((facts.get("vendor_id", ""), int(family), int(model)))
    return f"{name} ({f'{known}, ' if known else ''}family {family} model {model})"
