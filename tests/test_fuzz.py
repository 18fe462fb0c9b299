"""A short run of the fuzzer over every target, and proof that it notices what it is there to notice."""

import os
import random
import signal
import time

import numpy as np
import pytest

from fastcifar.errors import InputError
from fastcifar.models import ARCHITECTURES
from tests.reliability import fuzz, run_cases

TARGETS = [pytest.param(name, marks=pytest.mark.slow) if name == "results" else name for name in fuzz.targets()]


@pytest.mark.parametrize("target", TARGETS)
def test_almost_valid_and_hostile_files_are_read_rightly_or_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "narrow", run_cases.NARROW)
    cases = 25 if target == "results" else 100  # of results a page is made, which takes time
    tally = fuzz.run_here(target, 2, range(cases))
    assert tally.failures == []
    assert min(tally.read, tally.refused, len(tally.reasons)) >= cases // 10  # neither all nonsense nor all honest


def refuse(folder: object) -> None:
    raise InputError("file: broken, get it again")


def wrong(folder: object) -> None:
    np.testing.assert_array_equal([1], [2])


def allocate(folder: object) -> None:
    np.ones(200 << 20, np.uint8)


def leave_a_file(folder: object) -> None:
    open("mark", "w").close()


def talk(folder: object) -> None:
    raise InputError("x" * 2000)


def divide(folder: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (refuse, None),
        (lambda folder: None, None),
        (wrong, "AssertionError"),
        (divide, "ZeroDivisionError"),
        (allocate, "MB instead of"),
        (leave_a_file, "files appeared or vanished: ['mark']"),
        (talk, "a message of 2000 characters"),
    ],
)
def test_what_may_not_happen_is_a_failure(read, problem: str | None) -> None:
    tally = fuzz.Tally()
    fuzz.attempt(fuzz.Case("made up", {"file": b"content"}, read), tally, "name")
    problems = [failure["problem"] for failure in tally.failures]
    assert not problems if problem is None else len(problems) == 1 and problem in problems[0]


def make_trouble(rng: random.Random) -> fuzz.Case:
    """Some cases kill their process, some hang, most are harmless."""
    trouble = rng.choice([lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: time.sleep(60), lambda: None, lambda: None])
    return fuzz.Case("made up", {}, lambda folder: trouble())


def test_a_crash_and_a_case_without_end_are_failures_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "targets", lambda: {"trouble": make_trouble})
    monkeypatch.setattr(fuzz, "SECONDS", 2)  # a busy machine may take one for nothing
    monkeypatch.setattr(fuzz, "PATIENCE", 1)
    result = fuzz.run("trouble", 0, 4, 6)  # one hangs
    problems = [failure["problem"] for failure in result["failures"]]
    killed, hung = (sum(text in problem for problem in problems) for text in ("status 9", "Timeout"))
    assert min(killed, hung) >= 1
    assert killed + hung == len(problems) == 6 - result["read"]
