"""Compiled loops on PyTorch's threads: every turn once, whoever runs it; what goes wrong in a thread is told."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import njit
from numba.core import caching

from kernels import threads
from kernels.threads import KEPT, run


@njit(**KEPT)
def count_turns(first, last, turns, step):
    for i in range(first, last):
        if turns[i] < 0:
            raise ValueError("a negative number of turns")
        turns[i] += step


@pytest.fixture
def three():
    torch.set_num_threads(3)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 1000])
def test_every_turn_runs_once(three, count):
    turns = np.zeros(count + 2, np.int64)
    run(count_turns, count, turns[1:-1], 2)
    assert turns.tolist() == [0] + [2] * count + [0]


def test_a_smaller_team_does_all_parts(three):
    """As where OpenMP's limit of threads is lower than what PyTorch asks for."""
    openmp = ctypes.CDLL(torch._C.__file__)
    levels = openmp.omp_get_max_active_levels()
    turns = np.zeros(100, np.int64)
    try:
        openmp.omp_set_max_active_levels(0)
        run(count_turns, 100, turns, 1)
    finally:
        openmp.omp_set_max_active_levels(levels)
    assert (turns == 1).all()


def test_what_fails_in_a_thread_is_told(three):
    turns = np.zeros(9, np.int64)
    turns[8] = -1
    with pytest.raises(RuntimeError, match="failed in one of its threads"):
        run(count_turns, 9, turns, 1)
    run(count_turns, 8, turns, 1)
    assert (turns[:8] == 2).all()


def test_a_forked_process_runs_alone(three):
    turns = np.zeros(100, np.int64)
    run(count_turns, 100, turns, 1)  # its threads are not in the child
    child = os.fork()
    if not child:
        run(count_turns, 100, turns, 1)
        os._exit(int((turns == 2).all()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert (turns == 1).all()


def test_what_two_processes_compile_at_once_is_kept_apart(tmp_path, monkeypatch):
    caches = [caching.IndexDataCacheFile(str(tmp_path), "loop", "of the same source") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(caching.IndexDataCacheFile, "_load_index", lambda _: {})  # neither has seen the other's
        for cache, key in zip(caches, ("float32", "uint8"), strict=True):
            cache.save(key, f"code for {key}")
    assert (caches[0].load("float32"), caches[0].load("uint8")) == (None, "code for uint8")
    assert len(list(tmp_path.glob("*.nbc"))) == 2  # or the index of one could name what the other wrote last


def test_threads_of_our_own_call_each_part():
    seen = []
    part = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(seen.append)
    threads._python_team(ctypes.cast(part, ctypes.c_void_p).value, 7, 3, 0)
    assert seen == [7, 7, 7]


MODULE = """
import numpy as np, torch
from numba import njit
from numba.core import caching
from kernels.threads import KEPT, _launcher, run
torch.set_num_threads(2)

@njit(**KEPT)
def fill(first, last, values):
    values[first:last] = NUMBER

values = np.zeros(10)
run(fill, 10, values)
print(values.sum(), sum(_launcher(fill).stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_compiled_code_is_kept_until_the_loop_changes(tmp_path):
    file, said = tmp_path / "loops.py", []
    for number in ("1", "1", "20"):
        file.write_text(MODULE.replace("NUMBER", number))
        command = [sys.executable, "-c", "import loops"]
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}", "NUMBA_CACHE_DIR": ""}
        said.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split())
    assert said == [["10.0", "0"], ["10.0", "1"], ["200.0", "0"]]
