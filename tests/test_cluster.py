"""Sweeps on a Ray cluster of two nodes on this machine, each started by `ray start`, one of them killed in the middle."""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from fastcifar.checkpoint import load_checkpoint
from fastcifar.device import choose_device
from fastcifar.run_folder import RunFolder
from tests.conftest import REPOSITORY, run_cli

ray = pytest.importorskip("ray", reason="uv sync --extra cluster")

FLAGS = "--limit-train 192 --limit-test 40 --batch-size 64 --held-out 0 --precision fp32"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "the-tests-own-token-of-more-than-sixteen-characters",
}  # fmt: skip
GRID = ("--archs", "se_resnet18", "light_resnet18", "--seeds", "0", "1", "--set", "peak_lr=0.01,0.02", "--epochs", "3")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Node:
    """A node of a cluster: `ray start`, which stays."""

    def __init__(self, *options: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus", "1", "--block", *options]
        environment = os.environ | ENVIRONMENT
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def trains(self) -> bool:
        """Whether a training runs on it."""
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid).children(recursive=True)
            return any("fastcifar.train" in process.cmdline() for process in started)
        return False

    def kill(self) -> None:
        """SIGKILL for it and all that it started: what a power cut leaves."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


@pytest.fixture
def cluster():
    """[head, other] and their address."""
    address = f"127.0.0.1:{free_port()}"
    nodes = [Node("--head", "--port", address.rpartition(":")[2], "--include-dashboard", "false")]
    for _ in range(300):
        time.sleep(1)
        with suppress(OSError), socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=1):
            break
    nodes.append(Node("--address", address))
    time.sleep(8)
    yield nodes, address
    for node in nodes:
        node.kill()


def sweep_command(betons: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "fastcifar.sweep", *GRID, f"--flags={FLAGS}", "--data", str(betons), "--out", str(out),
        "--cores", "1", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_sweep_survives_the_loss_of_a_node_with_the_bits_of_undisturbed_runs(betons, tmp_path, cluster):
    (_, other), address = cluster
    out = tmp_path / "sweep"
    environment = os.environ | ENVIRONMENT
    command = sweep_command(betons, out, "--on", address)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:  # fmt: skip
        said = []
        for line in driver.stdout:
            said.append(line)
            if other.process.poll() is None and sum(": epoch " in each for each in said) >= 2 and other.trains():
                other.kill()
        code = driver.wait()
    assert code == 0, "".join(said)
    assert any("its worker was lost" in path.read_text() for path in (out / "runs").glob("*.log")), "".join(said)
    alone = tmp_path / "alone"
    command = sweep_command(betons, alone, "--on", "none")[1:]
    command.remove("light_resnet18")  # half of them tell it
    run_cli(*command, env={"OMP_NUM_THREADS": "1"})
    for path in sorted(alone.glob("runs/*/")):
        pair = [path, out / "runs" / path.name]
        weights = [load_checkpoint(each / "last.pt", choose_device("cpu")).model for each in pair]
        assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in weights), strict=True)), path.name
        tops = [RunFolder(each).read_summary()["final"]["top1"] for each in pair]
        assert tops[0] == tops[1]
    assert [len(list(folder.glob("runs/*/summary.json"))) for folder in (alone, out)] == [4, 8]


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(betons, tmp_path):
    result = run_cli(*sweep_command(betons, tmp_path / "a", "--on", f"127.0.0.1:{free_port()}")[1:])
    assert result.returncode == 2
    assert result.stderr.startswith("error: no Ray cluster at 127.0.0.1:")
    assert result.stderr.count("\n") == 1
    assert not list((tmp_path / "a").rglob("config.json"))
