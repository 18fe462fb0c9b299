"""Command lines: what is wrong is one line that names the option and what to do."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from fastcifar import errors
from fastcifar.command import parse_command
from fastcifar.errors import InputError, Stopped, run_command
from tests.conftest import REPOSITORY, assert_user_error, run_cli

WRONG = {
    "--epochs x": "--epochs 'x' is not a whole number",
    "--epochs 1.5": "--epochs '1.5' is not a whole number",
    "--peak-lr abc": "--peak-lr 'abc' is not a number",
    "--epoch 3": "unknown option --epoch: did you mean --epochs?",
    "--no-plot": "unknown option --no-plot: did you mean",
    "--bogus": "unknown option --bogus",
    "-x": "unknown option -x",
    "stray": "'stray' belongs to no option",
    "--seed": "--seed needs 1 value",
    "--device gpu": "--device 'gpu' is none of its choices: 'auto', 'cpu', 'cuda'",
    "--std 1 2": "--std '1', '2' is not of the form .*FLOAT FLOAT FLOAT",
    "--milestones a": "--milestones 'a' is not of its form",
    "--milestones -1": "milestones must be 0 or more epochs",
    "--plots --no-plots": "--plots is given more than once",
    "--arch resnet42 --arch se_resnet18": "--arch is given more than once",
    "--arch=resnet42 --arch se_resnet18": "--arch is given more than once",
    "--limit-train 5 --limit_train 6": "--limit-train is given more than once",
    "--out=": "the value after --out is empty",
    "--peak-lr inf": "peak_lr must be above 0, got inf",
    "--weight-decay inf": "weight_decay must be a finite number",
    "--momentum nan": "momentum must be",
    "--limit-train 1" + 30 * "0": "limit_train must be below 2^63",
    "--epochs " + 5000 * "9": "--epochs has too many digits",
}


@pytest.mark.parametrize("line", WRONG, ids=lambda line: line[:30])
def test_a_mistake_is_named_in_one_line(line):
    with pytest.raises(InputError) as caught:
        parse_command(line.split())
    message = str(caught.value)
    assert re.search(WRONG[line].replace("^", r"\^"), message), message
    assert "\n" not in message
    assert len(message) < 600


def test_empty_and_undecodable_values_are_refused():
    with pytest.raises(InputError, match="the value after --out is empty"):
        parse_command(["--out", ""])
    with pytest.raises(InputError, match="is not UTF-8"):
        parse_command(["--out", os.fsdecode(b"\xff")])


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (MemoryError(), 2, "memory is used up: lower --batch-size"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 2, "memory is used up"),
        (OSError(36, "File name too long", "x"), 2, "shorten the name"),
        (Stopped(signal.SIGTERM, "go on"), 143, "interrupted: go on"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_the_boundary_turns_what_may_happen_into_one_line(capsys, raised, code, said):
    def main():
        raise raised

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == code
    assert said in capsys.readouterr().err
    assert errors.is_out_of_memory(raised) == ("memory" in said)


def test_a_defect_is_not_hidden():
    def main():
        raise RuntimeError("a defect of ours")

    with pytest.raises(RuntimeError, match="a defect of ours"):
        run_command(main)


def test_ctrl_c_while_libraries_are_imported_ends_in_one_line():
    """At the moment numpy or torch is mapped, long before training."""
    command = [sys.executable, "-m", "fastcifar.train", "--data", "nowhere"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = f"/proc/{process.pid}/maps"
    while "numpy" not in open(maps).read() and process.poll() is None:  # noqa: SIM115
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=900)
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted")


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_command_quietly():
    command = f"{sys.executable} -m fastcifar.models | head -1; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert process.returncode == 0
    assert process.stderr == ""


def test_a_real_command_line_with_a_mistake_prints_one_line():
    assert_user_error(run_cli("-m", "fastcifar.train", "--epoch", "3"), "did you mean --epochs?", "--help")
