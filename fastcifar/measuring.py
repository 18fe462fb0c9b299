"""What a training costs beside time: FLOPs, peak memory, a GPU's energy, seconds of compiling. Recorded for every epoch."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Meter:
    """Reads a device's counters before and after an epoch; what the device does not count is None."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._joules = gpu_energy(device)
        self._began: float | None = None

    def start(self) -> None:
        """An epoch of training begins."""
        self._began = self._joules()

    def stop(self) -> dict[str, Any]:
        """The epoch's part of the metrics. The energy is that of training only; the peak is the process's so far."""
        now = self._joules()
        used = None if now is None or self._began is None else now - self._began
        return {"peak_memory_bytes": peak_memory(self.device), "energy_joules": used}


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary's part: highest peak, summed energy and FLOPs of all epochs, None where one was not counted; the first's
    compiling.

    rows: one dict an epoch; those of runs from before this was recorded have none of it.
    """
    peaks: list[Any] = [row.get("peak_memory_bytes") for row in rows]
    joules: list[Any] = [row.get("energy_joules") for row in rows]
    flops: list[Any] = [row.get("flops") for row in rows]
    return {
        "compile_seconds": rows[0].get("compile_seconds"),
        "flops": None if None in flops else sum(flops),
        "peak_memory_bytes": None if None in peaks else max(peaks),
        "energy_joules": None if None in joules else sum(joules),
    }


def compile_seconds(first_step: float, epoch: float, steps: int) -> float | None:
    """Seconds the first step took beyond the mean of the epoch's later ones; None with one step, which has no later ones."""
    return max(0.0, first_step - (epoch - first_step) / (steps - 1)) if steps > 1 else None


def peak_memory(device: torch.device) -> int | None:
    """Most bytes the device's allocator held; on a CPU the largest resident set of this process, None where it is not told.

    Not getrusage's: a child counts its parent's resident set from before it became another program.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def gpu_energy(device: torch.device) -> Callable[[], float | None]:
    """A function that tells the joules a GPU has used since its driver started; None on a CPU, or without such a counter."""
    if device.type == "cuda":
        try:
            import pynvml  # here: only a GPU has a use for it

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception:  # no NVML, an old GPU: one figure less, not a failure
            return lambda: None
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # it counts millijoules
    return lambda: None
