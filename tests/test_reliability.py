"""Short forms of the trials under tests/reliability, and faults of the machine: memory, disk, clock."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib

import pytest
import torch
from rich.console import Console

from data_prep import write_beton
from fastcifar import evaluate, predict
from fastcifar.command import parse_command
from fastcifar.device import generator_states
from fastcifar.errors import InputError
from fastcifar.state import EpochState
from fastcifar.train import main, train
from tests.conftest import REPOSITORY, assert_user_error, run_cli
from tests.reliability import soak

OPTIONS = "--arch dropout_resnet24 --epochs 2 --limit-train 40 --limit-test 20 --batch-size 20 --no-plots"


def run(betons, out, *more):
    """Start a run in this process."""
    return train(parse_command([*OPTIONS.split(), *more, "--data", str(betons), "--out", str(out)]), Console(quiet=True))


def trial(name, *options):
    """The figures of a trial in its own process, whose children must not inherit pytest's threads."""
    process = run_cli("-m", f"tests.reliability.{name}", *options)
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(process.stdout)


@pytest.mark.slow
def test_every_mistake_is_refused_in_one_line():
    figures = trial("mistakes", "--count", 54)
    assert figures["failures"] == []
    assert figures["tried"] > 30


@pytest.mark.slow
def test_killed_processes_leave_what_goes_on_to_the_same_bits():
    figures = trial("soak", "--kills", 10)
    assert figures["differences"] == []
    assert figures["killed"]["training"] >= 5


KILLED = """
import os, signal, sys, threading
from fastcifar import saving, train
from fastcifar.errors import run_command
calls = int(sys.argv.pop(1))

def counted(original):
    def call(*arguments, **keywords):
        global calls
        calls -= threading.current_thread().name == "epoch writer"
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)
    return call

for name in ("fsync", "link", "replace"):
    setattr(os, name, counted(getattr(os, name)))

class Writer(saving.EpochWriter):
    def __init__(self, folder, device, background):
        super().__init__(folder, device, background=True, interval=0.0)

    def save(self, *epoch):
        super().save(*epoch)
        with self._changed:  # until it writes this one, while training goes on: slow writing would pass over epochs
            self._changed.wait_for(lambda: self._waiting is None)

train.EpochWriter = Writer
run_command(train.main)
"""


@pytest.mark.slow
def test_a_kill_while_the_background_writes_leaves_what_goes_on_to_the_same_bits(betons, tmp_path):
    """At calls of the thread that writes: the best's replacement, the metrics', last.pt's link; then of later epochs."""
    options, out = [*OPTIONS.replace("--epochs 2", "--epochs 5").split(), "--data", str(betons), "--out"], tmp_path / "run"
    wanted = soak.outcome(train(parse_command([*options, str(tmp_path / "whole")]), Console(quiet=True)).path)
    for calls in (2, 5, 8, 11, 14):
        killed = run_cli("-c", KILLED, calls, *(["--resume", out] if out.exists() else [*options, out]))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    got = soak.outcome(train(parse_command(["--resume", str(out)]), Console(quiet=True)).path)
    assert [part for part in wanted if not soak.same(wanted[part], got[part])] == []


LIMITED = """
import resource, sys
import psutil
from fastcifar import train
from fastcifar.errors import run_command
if sys.argv[1] == "memory":
    room = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
del sys.argv[1]
run_command(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("what", "said"), [("memory", "memory is used up"), ("disk", "file size limit")])
def test_a_limit_of_the_machine_ends_in_one_line_and_the_run_goes_on_without_it(betons, tmp_path, what, said):
    whole = run(betons, tmp_path / "whole")
    part = run(betons, tmp_path / "part", "--stop-after", "1")
    before = part.last.read_bytes()
    assert_user_error(run_cli("-c", LIMITED, what, "--resume", part.path), said)
    assert part.last.read_bytes() == before
    assert not list(part.path.glob("*.partial"))
    resumed = train(parse_command(["--resume", str(part.path)]), Console(quiet=True))
    assert resumed.read_summary()["final"] == whole.read_summary()["final"]


def test_a_full_disk_says_how_to_go_on(betons, tmp_path, monkeypatch, refused):
    part = run(betons, tmp_path / "part", "--stop-after", "1")

    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert f"go on with: python -m fastcifar.train --resume {part.path}" in refused(main, "--resume", part.path)
    assert train(parse_command(["--resume", str(part.path)]), Console(quiet=True)).read_summary()["epochs_trained"] == 2


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(betons, tmp_path, monkeypatch):
    whole, now = run(betons, tmp_path / "whole"), time.time
    folder = run(betons, tmp_path / "backwards", "--stop-after", "1")
    monkeypatch.setattr(time, "time", lambda: now() - 86400)
    resumed = train(parse_command(["--resume", str(folder.path)]), Console(quiet=True))
    assert soak.outcome(resumed.path)["TensorBoard"] == soak.outcome(whole.path)["TensorBoard"]
    assert resumed.read_summary()["final"] == whole.read_summary()["final"]


def test_a_folder_that_cannot_be_written_is_named(betons, tmp_path, monkeypatch, refused):
    def read_only(*arguments, **keywords):
        raise OSError(30, "Read-only file system", str(tmp_path / "run"))

    monkeypatch.setattr("tempfile.mkstemp", read_only)
    said = refused(main, *OPTIONS.split(), "--data", betons, "--out", tmp_path / "run")
    assert "config.json: Read-only file system; the file system is read-only: choose another folder" in said


@pytest.mark.parametrize("images", [1, 2])
def test_an_epoch_of_one_step_works_and_one_of_none_is_refused(betons, tmp_path, images):
    if images == 1:
        with pytest.raises(InputError, match=r"one image is too few to train on"):
            run_few(betons, tmp_path, images)
    else:
        assert run_few(betons, tmp_path, images).read_summary()["epochs_trained"] == 2


def run_few(betons, tmp_path, images):
    """Two epochs of so many images."""
    options = f"--arch dropout_resnet24 --epochs 2 --limit-train {images} --limit-test 1 --batch-size 2 --no-plots"
    return train(parse_command([*options.split(), "--data", str(betons), "--out", str(tmp_path / "few")]), Console(quiet=True))


@pytest.mark.slow
def test_nothing_but_the_asked_for_download_uses_the_network(betons, tmp_path, monkeypatch, call):
    def refuse(*arguments):
        raise AssertionError(f"connects to {arguments[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    folder = run(betons, tmp_path / "run")
    call(evaluate.main, "--checkpoint", folder.best, "--data", betons)
    call(predict.main, "--checkpoint", folder.best, "--input", betons / "test.beton", "--out", tmp_path / "x.csv")
    monkeypatch.chdir(tmp_path)  # the synthetic dataset's pickles go into data/
    call(write_beton.main, "--out", tmp_path / "betons", "--synthetic", "--train-images", 10, "--test-images", 2)


def test_every_locked_artifact_has_a_hash():
    lock = tomllib.loads((REPOSITORY / "uv.lock").read_text())
    artifacts = [part for package in lock["package"] for part in [*package.get("wheels", []), package.get("sdist")] if part]
    assert len(artifacts) > 100
    assert all(part["hash"].startswith("sha256:") for part in artifacts)
    assert all(package["source"].keys() & {"registry", "editable"} for package in lock["package"])


@pytest.mark.slow
def test_training_whose_reader_goes_away_says_how_to_go_on(betons, tmp_path):
    line = f"{sys.executable} -m fastcifar.train {OPTIONS} --data {betons} --out {tmp_path / 'run'}"
    command = f"{line} | head -1; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert process.returncode == 141
    assert process.stderr.strip() == (
        f"interrupted: nobody reads the output any more; go on with: python -m fastcifar.train --resume {tmp_path / 'run'}"
    )


def test_a_state_inside_an_epoch_of_another_device_is_refused():
    state = EpochState.begin(3, torch.device("cpu"))
    state.step, state.generators = 2, generator_states(torch.device("cpu"))
    assert EpochState.load(state.save(), 3, torch.device("cpu")).step == 2
    for wrong in ({}, state.generators | {"cuda": torch.zeros(16, dtype=torch.uint8)}, {"cpu": torch.zeros(3)}):
        with pytest.raises(ValueError, match="generators of another device"):
            EpochState.load(state.save() | {"generators": wrong}, 3, torch.device("cpu"))
