"""What training records beside time, and what the hardware is called."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fastcifar import measuring
from fastcifar.device import cpu_name
from fastcifar.measuring import Meter, compile_seconds, totals

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_tells_its_peak_memory_and_no_energy():
    meter = Meter(CPU)
    meter.start()
    told = meter.stop()
    assert told["energy_joules"] is None
    assert told["peak_memory_bytes"] is None or 2**24 < told["peak_memory_bytes"] < 2**40


def test_a_gpus_energy_is_what_its_counter_gained_during_the_epoch(monkeypatch):
    counter = iter([7_000, 10_000, 12_500])  # millijoules since the driver started; the first only shows that it counts
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter) if handle == "GPU-x" else None,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="x"))
    monkeypatch.setattr(measuring, "peak_memory", lambda device: 5)
    meter = Meter(CUDA)
    meter.start()
    assert meter.stop() == {"peak_memory_bytes": 5, "energy_joules": 2.5}
    monkeypatch.setattr(nvml, "nvmlInit", lambda: 1 / 0)  # no driver
    assert Meter(CUDA).stop()["energy_joules"] is None


def test_totals_are_the_first_compile_the_highest_peak_and_all_energy_and_flops():
    rows = [
        {"compile_seconds": 2.0, "peak_memory_bytes": 7, "energy_joules": 1.5, "flops": 10},
        {"peak_memory_bytes": 9, "energy_joules": 2.0, "flops": 20},
    ]
    assert totals(rows) == {"compile_seconds": 2.0, "peak_memory_bytes": 9, "energy_joules": 3.5, "flops": 30}
    old = {"compile_seconds": None, "peak_memory_bytes": None, "energy_joules": None, "flops": None}
    assert totals([{}, rows[0]]) == old  # resumed from before it was recorded: part of it is not known


@pytest.mark.parametrize(("first", "epoch", "steps", "expected"), [(5, 14, 10, 4), (1, 12, 10, 0), (3, 3, 1, None)])
def test_compiling_is_the_first_step_less_a_later_one(first, epoch, steps, expected):
    assert compile_seconds(first, epoch, steps) == expected


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "expected"),
    [
        ("AuthenticAMD", 25, 17, "AMD EPYC", "AMD EPYC (Zen 4, family 25 model 17)"),  # as virtual machines say
        ("GenuineIntel", 6, 143, "Intel Xeon Processor", "Intel Xeon Processor (Sapphire Rapids, family 6 model 143)"),
        ("GenuineIntel", 6, 999, "Intel Xeon Processor", "Intel Xeon Processor (family 6 model 999)"),
        ("AuthenticAMD", 25, 33, "AMD Ryzen 9 5950X", "AMD Ryzen 9 5950X"),
    ],
)
def test_a_cpu_is_called_by_what_it_is(vendor, family, model, name, expected):
    lines = [
        f"vendor_id\t: {vendor}",
        f"cpu family\t: {family}",
        f"model\t\t: {model}",
        f"model name\t: {name}",
        "",
        "model\t: 1",
    ]
    assert cpu_name("\n".join(lines)) == expected
    assert cpu_name("") == "CPU"
