"""Steps of two commits timed in turns: what the other commit lacks or fails at is a line, and both train the same."""

import json
import subprocess

import pytest

from bench.against import Options, Worker, table_of
from bench.results import Timing
from tests.conftest import REPOSITORY, assert_user_error, run_cli


@pytest.mark.slow
def test_an_unknown_commit_is_named_in_a_line(betons):
    assert_user_error(run_cli("bench/against.py", "--commit", "no-such-commit", "--data", betons), "no-such-commit")


@pytest.mark.slow
def test_a_worker_says_what_it_cannot_build_and_goes_on(betons):
    worker = Worker(REPOSITORY, Options("HEAD", data=betons, steps=1, batch_size=8))
    try:
        with pytest.raises(RuntimeError, match="no_such_net"):
            worker.build("no_such_net")
        worker.build("light_resnet18")()
    finally:
        worker.close()
    with pytest.raises((RuntimeError, OSError, ValueError)):
        worker.build("light_resnet18")


def test_ratios_are_of_time_and_failures_stand_in_their_place():
    ours, commit = Timing("fastcifar", "", "", [200.0, 220.0, 210.0]), Timing("commit", "", "", [100.0, 110.0, 105.0])
    failed = Timing("torch", "", error="RuntimeError: no")
    table = table_of({"resnet42": [ours, commit, failed]}, Options("HEAD", loops=("torch",)))
    variant, rate, against, torch = (next(iter(column.cells)) for column in table.columns)
    assert (variant, rate, torch) == ("resnet42", "210", "RuntimeError: no")
    assert against.startswith("2.00x")


@pytest.mark.slow
def test_a_commit_is_timed_in_turns_with_this_tree(betons, tmp_path):
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, check=False).returncode:
        pytest.skip("this tree is not a git repository")
    flags = ["--archs", "light_resnet18", "--loops", "torch", "--rounds", 2, "--steps", 1, "--batch-size", 8]
    done = run_cli("bench/against.py", "--commit", "HEAD", "--data", betons, *flags, "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    names = [(row["name"], len(row["images_per_second"]), row["error"]) for row in written["timings"]["light_resnet18"]]
    assert names == [("fastcifar", 2, ""), ("commit", 2, ""), ("torch", 2, "")]
    assert "light_resnet18" in done.stdout.splitlines()[-1]
