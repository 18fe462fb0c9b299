"""What `python -m fastcifar.train` does while it imports: the data read ahead is the data, and is refused as ever."""

import gc
import importlib
import shutil
import signal
import sys

import numpy as np
import pytest

import fastcifar
from fastcifar import ahead
from fastcifar.beton import read_beton
from fastcifar.errors import InputError, run_command
from fastcifar.recipes import RunOptions
from tests.conftest import run_cli


@pytest.fixture(autouse=True)
def nothing_begun(monkeypatch):
    monkeypatch.setattr(ahead, "_begun", {})


def paths():
    return {(str(path), verify) for path, verify in ahead._begun}


def test_what_is_read_ahead_is_taken_once(betons, monkeypatch):
    ahead.begin(["--arch", "resnet42", "--data", f"{betons}/", "--epochs", "1"])
    path = betons / "train.beton"
    assert paths() == {(str(betons / f"{split}.beton"), True) for split in ("train", "test")}
    begun = ahead._begun[path, True].result()
    assert ahead.beton(path, verify=True) is begun
    again = ahead.beton(path, verify=True)
    assert again is not begun
    for found in (begun, again):
        expected = read_beton(path)
        assert found.manifest == expected.manifest
        for name in ("images", "labels", "index"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {("data/beton/train.beton", True), ("data/beton/test.beton", True)}),
        (["--no-verify", "--data=no/where"], {("no/where/train.beton", False), ("no/where/test.beton", False)}),
        (["--resume", "run"], set()),
        (["--stream"], set()),
        (["--arch", "x", "--help"], set()),
    ],
)
def test_what_a_command_reads_is_known_from_its_arguments(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ahead.begin(arguments)
    assert paths() == expected
    assert RunOptions().data == ahead.DATA


@pytest.mark.parametrize("damage", ["a byte", "missing"])
def test_what_is_wrong_is_said_where_the_data_is_asked_for(betons, tmp_path, damage):
    folder = shutil.copytree(betons, tmp_path / "betons")
    path = folder / "train.beton"
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-40_000] ^= 1
        path.write_bytes(content)
    with pytest.raises(InputError) as plain:
        read_beton(path)
    ahead.begin(["--data", str(folder)])
    with pytest.raises(InputError) as ours:
        ahead.beton(path, verify=True)
    assert str(ours.value) == str(plain.value)
    assert len(ahead.beton(folder / "test.beton", verify=True).labels) == 50


def test_options_are_found_in_both_forms():
    assert [ahead.option(given, "data") for given in (["--data", "x"], ["--data=x=y"], ["--data"], ["data", "x"])] == [
        "x", "x=y", None, None,
    ]  # fmt: skip


@pytest.fixture
def as_before():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    gc.enable()


@pytest.mark.parametrize(("module", "begun"), [("fastcifar.train", [["--seed", "3"]]), ("fastcifar.evaluate", [])])
def test_training_reads_ahead_and_garbage_is_collected_once_a_command_runs(module, begun, monkeypatch, as_before):
    calls = []
    monkeypatch.setattr(ahead, "begin", calls.append)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", module, "--seed", "3"])
    importlib.reload(fastcifar)  # as a library it does nothing
    assert gc.isenabled()
    monkeypatch.setattr(sys, "argv", ["-m", "--seed", "3"])
    importlib.reload(fastcifar)
    assert calls == begun
    assert not gc.isenabled()
    frozen = gc.get_freeze_count()
    run_command(lambda: None)
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen


@pytest.mark.slow
def test_loops_are_compiled_without_scipys_algebra_which_remains_to_be_had():
    code = "import kernels.map_loops, sys; from numba.np import arraymath; assert not arraymath._HAVE_BLAS"
    done = run_cli("-c", f"{code}; assert 'scipy.linalg' not in sys.modules; import scipy.linalg.cython_blas")
    assert done.returncode == 0, done.stderr
