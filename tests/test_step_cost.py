"""What a training step costs, counted on a device that is not there: the device counts right, and no step may cost more."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from bench import counting_device, step_cost
from bench.roofline import Rates, cost_of_arch
from bench.step_cost import count_epochs, count_steps, main, roofline_share
from tests.conftest import REPOSITORY

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the counting device is built with g++")

KNOWN = """
import json, sys, torch
from bench.counting_device import record
x = torch.zeros(64, 64, device="cuda")
host, pinned = torch.zeros(64, 64), torch.zeros(64, 64).pin_memory()
calls = {
    "sum of two": lambda: x + x,
    "product": lambda: x @ x,
    "compiled at run time": lambda: torch.exp2(x),
    "view": lambda: x.T[0],
    "item": lambda: x[0, 0].item(),
    "from pageable memory": lambda: x.copy_(host, non_blocking=True),
    "from pinned memory": lambda: x.copy_(pinned, non_blocking=True),
}
counted = {}
for name, call in calls.items():
    call()
    events = counted[name] = []
    with record(events):
        call()
json.dump(counted, sys.stdout)
"""


@pytest.mark.slow
@needs_compiler
def test_the_device_counts_what_it_is_asked_for():
    environment = os.environ | counting_device.environment() | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", KNOWN], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)
    assert [event.split()[0] for event in counted["sum of two"]] == ["launch"]
    assert "CUDAFunctor_add<float>" in counted["sum of two"][0]
    assert counted["product"] == ["launch cublasSgemm_v2"]
    assert [event.split()[0] for event in counted["compiled at run time"]] == ["launch"]
    assert counted["view"] == []
    assert counted["item"] == ["copy asynchronous device to host 4", "sync cudaStreamSynchronize"]
    assert counted["from pageable memory"] == ["copy pageable host to device 16384"]
    assert counted["from pinned memory"] == ["copy asynchronous host to device 16384"]


# {network: {form: (launches, KB an image but for convolutions)}}: what each took with torch 2.11, and 2 % for a compiler that
# divides a reduction otherwise.
CEILINGS = {
    "se_resnet18": {"eager": (916, 10108), "combo": (282, 7578)},
    "mish_se_resnet18": {"fusable-tuned": (396, 8172)},
    "dropout_resnet24": {"triton": (288, 12230), "captured": (3, 14510)},
    "robust_resnet64": {"triton": (643, 25086)},
    "light_resnet18": {"triton": (234, 6025)},
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("arch", CEILINGS)
def test_no_step_costs_more_than_it_did(arch):
    for form, counts in count_steps(arch, tuple(CEILINGS[arch]), 512).items():
        assert "error" not in counts, (form, counts)
        launches, kilobytes = CEILINGS[arch][form]
        assert counts["launches"] <= 1.02 * launches, form
        assert counts["pointwise_bytes"] / 512e3 <= 1.02 * kilobytes, form
        assert counts["pointwise_bytes"] / 512e3 >= 0.5 * kilobytes, f"{form}: what was counted?"
        waits = {name: counts[name] for name in ("syncs", "pageable_copies", "graph_breaks")}
        assert waits == dict.fromkeys(waits, 0), form


@needs_compiler
@pytest.mark.slow
def test_an_epoch_waits_for_the_device_twice_and_once_for_evaluation():
    counts = count_epochs("se_resnet18", ("captured",))["captured"]
    assert "error" not in counts, counts
    assert counts["graphs"] == counts["steps"] + 3  # two whole batches of evaluation, and what the epoch draws
    assert counts["syncs"] <= 3
    assert counts["pageable_copies"] == 0
    assert 20e6 < counts["bytes_to_host"] < 25e6  # a checkpoint: was an epoch counted?


@needs_compiler
@pytest.mark.slow
def test_every_kernel_of_the_default_network_compiles_in_time():
    counts = count_steps("se_resnet18", ("triton",), 128, host_time=True)["triton"]
    assert "error" not in counts, counts
    assert counts["first_step_seconds"] < 400  # of this machine's CPU; 46 on two Xeon cores
    assert 0 < counts["host_ms"] < 1e3 * counts["first_step_seconds"]
    assert counts["launches"] <= 1.02 * 244
    assert {"tail_kernel", "sums_kernel", "excite_kernel"} <= set(counts["launched"])


def test_a_step_of_fewest_bytes_is_at_the_roofline():
    rates = Rates(790e12, 4.3e12)
    cost = cost_of_arch("se_resnet18")
    fewest = cost.parts[-1][1]
    assert roofline_share("se_resnet18", fewest, rates) == 1
    seconds = 1 / cost.images_per_second(rates)
    assert roofline_share("se_resnet18", fewest + seconds * rates.bytes_per_second, rates) == pytest.approx(0.5)


def test_what_cannot_be_counted_is_one_line(refused, monkeypatch):
    assert "unknown form 'tunned': did you mean tuned?" in refused(main, "--forms", "tunned")
    with monkeypatch.context() as patch:
        patch.setattr(step_cost, "environment", dict)
        patch.setattr(step_cost, "TIMEOUT", 0.01)
        assert "se_resnet18 was not counted within 0.01 seconds" in refused(main, "--archs", "se_resnet18", "--forms", "eager")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "the counting device needs g++" in refused(main, "--archs", "se_resnet18", "--forms", "eager")
