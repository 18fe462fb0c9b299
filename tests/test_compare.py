"""Two results compared: what is a regression, what is noise, what is not judged, and what the exit code says."""

from dataclasses import replace

import pytest

from bench.compare import Options, compare, warnings
from bench.schema import Cell, write_results
from tests.bench_results import make_results
from tests.conftest import assert_user_error, run_cli


@pytest.fixture
def options(tmp_path):
    return Options(tmp_path, tmp_path)


def slowed(results, factor):
    """The same results with every epoch and round taking `factor` times as long."""
    cells = [
        replace(cell, epochs=[replace(epoch, train_seconds=epoch.train_seconds * factor) for epoch in cell.epochs])
        for cell in results.cells
    ]
    rungs = [
        replace(rung, images_per_second=[rate / factor for rate in rung.images_per_second]) for rung in results.ladder.rungs
    ]
    return replace(results, cells=cells, ladder=replace(results.ladder, rungs=rungs))


def less_accurate(results, points):
    return replace(results, cells=[replace(c, final_top1=max(c.final_top1 - points / 100, 0)) for c in results.cells])


def written(path, results):
    path.mkdir()
    write_results(path / "results.json", results)
    return path


def test_a_result_against_itself_shows_no_change(options):
    rows = list(compare(make_results(), make_results()))
    assert len(rows) == 2 * 9 + 5
    assert all(row.change == pytest.approx(0, abs=1e-12) for row in rows)
    assert not any(row.worse(options) for row in rows)


def test_equal_machines_seldom_raise_an_alarm(options):
    rows = [row for seed in range(20) for row in compare(make_results(seed=2 * seed), make_results(seed=2 * seed + 1))]
    claimed = sum(row.low is not None and not row.low <= 0 <= row.high for row in rows)
    assert claimed / len(rows) < 0.07
    assert sum(row.worse(options) for row in rows) / len(rows) < 0.02


def test_a_slowdown_is_measured_and_judged_by_the_threshold(options):
    before = make_results(seeds=4)
    rows = [row for row in compare(before, slowed(make_results(seeds=4, seed=1), 1.25)) if row.what == "images/s"]
    assert all(row.change == pytest.approx(-0.2, abs=0.04) for row in rows)
    assert all(row.low < -0.2 + 0.04 and row.high < 0 for row in rows)
    assert all(row.worse(options) for row in rows)
    assert not any(row.worse(replace(options, threshold=30.0)) for row in rows)


def test_lost_accuracy_is_judged_over_seeds(options):
    before, after = make_results(seeds=5), less_accurate(make_results(seeds=5, seed=1), 4)
    rows = [row for row in compare(before, after) if row.what == "top-1"]
    assert all(row.worse(options) for row in rows)
    assert not any(row.worse(replace(options, accuracy_threshold=6.0)) for row in rows)
    one_seed = [row for row in compare(make_results(seeds=1), less_accurate(make_results(seeds=1), 4)) if row.what == "top-1"]
    assert all(row.low is None and not row.worse(options) for row in one_seed)
    assert {row.verdict(options) for row in one_seed} == {"no interval: not judged"}
    far = [row for row in compare(make_results(seeds=1), less_accurate(make_results(seeds=1), 6)) if row.what == "top-1"]
    assert {row.verdict(options) for row in far} == {"WORSE"}  # 5 x 1 point without an interval
    assert not any(row.worse(replace(options, accuracy_threshold=1.5)) for row in far)


def with_levers(results, *levers):
    return replace(results, cells=[replace(cell, levers=list(levers)) for cell in results.cells])


def test_other_levers_are_compared_where_there_is_one_set_on_each_side(options):
    before, after = make_results(), slowed(with_levers(make_results(seed=1), "channels_last"), 1.5)
    assert sum(row.worse(options) for row in compare(before, after)) >= 9
    told = list(warnings(before, after))
    assert "levers differ: resnet18 (channels_last + bf16) in A is compared with resnet18 (channels_last) in B" in told
    two_sets = replace(after, cells=[*after.cells, *with_levers(after, "channels_last", "compile").cells])
    assert not any(row.name == "resnet18" for row in compare(before, two_sets))
    (missing,) = [line for line in warnings(before, two_sets) if line.startswith("only in A: ")]
    assert "resnet18 (channels_last + bf16)" in missing


def test_what_b_lacks_is_a_warning():
    before, after = make_results(seeds=2), make_results(seeds=1)
    assert not list(warnings(before, before))
    assert "resnet18 (channels_last + bf16): finished seeds differ: 0, 1 in A, 0 in B" in list(warnings(before, after))
    told = list(warnings(before, replace(before, ladder=None, peers=None, ablations=[])))
    assert told == ["only in A: the ladder", "only in A: the peers", "ablations only in A: report D"]
    fewer = replace(before, ladder=replace(before.ladder, rungs=before.ladder.rungs[1:]))
    assert list(warnings(before, fewer)) == ["only in A's ladder: eager fp32 NCHW, DataLoader"]


def test_what_fails_now_is_worse(options):
    before = make_results()
    broken = Cell("x", "resnet18", 1, ["channels_last", "bf16"], error="crashed")
    ladder = replace(before.ladder, rungs=[*before.ladder.rungs[:3], replace(before.ladder.rungs[3], error="crashed")])
    after = replace(before, cells=[c for c in before.cells if (c.arch, c.seed) != ("resnet18", 1)] + [broken], ladder=ladder)
    assert [row.name for row in compare(before, after) if row.worse(options)] == ["resnet18, seed 1", "ladder: bf16"]


def test_other_epochs_are_not_compared_in_accuracy():
    rows = list(compare(make_results(epochs=12), make_results(epochs=6)))
    assert {row.what for row in rows} == {"images/s"}


def test_the_command_ends_with_its_verdict(tmp_path):
    before, after = make_results(), slowed(make_results(seed=1), 1.5)
    versions = {"versions": {**before.environment["versions"], "torch": "2.12.0"}, "hardware": "[bold]other[/]\x1b[31m"}
    a, b = written(tmp_path / "a", before), written(tmp_path / "b", replace(after, environment=after.environment | versions))
    worse = run_cli("bench/compare.py", a, b / "results.json")
    assert worse.returncode == 1, worse.stderr
    assert "WORSE" in worse.stdout
    assert "warning: hardware differs: AMD EPYC, 2 threads in A, [bold]other[/]" in worse.stdout
    assert "versions differ: torch 2.11.0 in A, 2.12.0 in B" in worse.stdout
    assert "\x1b" not in worse.stdout
    better = run_cli("bench/compare.py", b, a, "--threshold", "2")
    assert better.returncode == 0, better.stderr
    assert "better" in better.stdout
    assert "0 of 23 rows were not" in better.stdout.replace("\n", " ")
    empty = written(tmp_path / "empty", replace(before, cells=[], ladder=None))
    nothing = run_cli("bench/compare.py", a, empty)
    assert nothing.returncode == 2
    assert "warning: only in A: dropout_resnet24 (channels_last + bf16)" in nothing.stdout
    assert nothing.stderr.startswith("error: nothing of ")
    assert len(nothing.stderr.splitlines()) == 1


def test_bad_input_is_one_line(tmp_path):
    good = written(tmp_path / "good", make_results())
    assert_user_error(run_cli("bench/compare.py", good, tmp_path / "none"), "none is missing")
    assert_user_error(run_cli("bench/compare.py", good, good, "--threshold", "-1"), "threshold must be 0 to below 100")
