"""The user's choice of device and precision enters; a torch.device and an autocast dtype leave."""

from typing import Literal

import torch

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


def require_kernels(kernels: str, device: torch.device) -> None:
    """Raise InputError where Triton's kernels are asked for and the device cannot run them."""
    if kernels == "triton" and device.type != "cuda":
        raise InputError("kernels triton needs a CUDA device, this run is on the CPU: use --kernels auto, or --device cuda")


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


def device_name(device: torch.device) -> str:
    """What a report calls the hardware: the GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:  # not Linux
        model = "CPU"
    return f"{model}, {torch.get_num_threads()} threads"
