"""Two results compared: what is a regression, what is noise, what is not judged, and what the exit code says."""

from dataclasses import replace

import pytest

from bench.compare import Options, compare, main, warnings
from bench.results import Run, write_results
from tests.bench_results import make_results


@pytest.fixture
def options(tmp_path):
    return Options(tmp_path, tmp_path)


def slowed(results, factor):
    """The same results with every epoch and round taking `factor` times as long."""

    def slower(comparison):
        timings = [replace(t, images_per_second=[rate / factor for rate in t.images_per_second]) for t in comparison.timings]
        return replace(comparison, timings=timings)

    runs = [replace(run, train_seconds=[seconds * factor for seconds in run.train_seconds]) for run in results.runs]
    comparisons = {name: slower(comparison) for name, comparison in results.comparisons().items()}
    return replace(results, runs=runs, **comparisons)


def less_accurate(results, points):
    return replace(results, runs=[replace(run, top1=max(run.top1 - points / 100, 0)) for run in results.runs])


def judged(before, after, options, what=None):
    return {row.verdict(options) for row in compare(before, after) if what is None or row.what == what}


def test_a_result_against_itself_shows_no_change(options):
    rows = list(compare(make_results(), make_results()))
    assert len(rows) == 9 + 5 + 9 + 5  # speeds, optimizations, accuracies, arms
    assert all(row.change.estimate == pytest.approx(0, abs=1e-12) for row in rows)
    assert not any(row.worse(options) for row in rows)


def test_equal_machines_seldom_raise_an_alarm(options):
    rows = [row for seed in range(10) for row in compare(make_results(seed=2 * seed), make_results(seed=2 * seed + 1))]
    claimed = sum(row.change.excludes(0) for row in rows)
    assert claimed / len(rows) < 0.08
    assert sum(row.worse(options) for row in rows) / len(rows) < 0.02


def test_a_slowdown_is_measured_and_judged_by_the_threshold(options):
    rows = [row for row in compare(make_results(), slowed(make_results(seed=1), 1.25)) if row.what == "images/s"]
    assert all(row.change.estimate == pytest.approx(-0.2, abs=0.04) and row.change.high < 0 for row in rows)
    assert all(row.worse(options) for row in rows)
    assert not any(row.worse(replace(options, threshold=30.0)) for row in rows)


def test_a_large_drop_of_two_repetitions_is_worse_and_a_small_one_is_not_judged(options):
    def two_epochs(rates):
        run = replace(make_results().runs[0], train_seconds=[10.0, *(1e4 / rate for rate in rates)], epoch_top1=[0.1] * 3)
        return make_results(runs=[run], speeds=None, optimizations=None, baselines=None)

    before = two_epochs([600.0, 700.0])
    assert judged(before, two_epochs([42.0, 49.0]), options, "images/s") == {"WORSE"}  # -93 % read "no change shown"
    assert judged(before, two_epochs([590.0, 640.0]), options, "images/s") == {"no change shown"}
    assert judged(before, two_epochs([1.0e4, 40.0]), options, "images/s") == {"no change shown"}  # one epoch above


@pytest.mark.parametrize(
    ("seeds", "images", "points", "verdict"),
    [
        (5, 10_000, 4, "WORSE"),
        (1, 500, 5, "no change shown"),  # 25 images: other test images could do that
        (1, 10_000, 5, "WORSE"),
        (1, 10_000, 0.2, "no change shown"),
        (2, 10_000, 30, "WORSE"),  # whatever the interval of two seeds says
    ],
)
def test_lost_accuracy_is_judged_by_seeds_and_by_the_number_of_test_images(options, seeds, images, points, verdict):
    before = make_results(seeds=seeds, ablations=[])
    before = replace(before, runs=[replace(run, test_images=images) for run in before.runs if "/" not in run.name])
    assert judged(before, less_accurate(before, points), options, "top-1") == {verdict}


def test_what_b_lacks_or_did_otherwise_is_a_warning():
    before, after = make_results(seeds=2), make_results(seeds=1)
    assert not list(warnings(before, before))
    assert "resnet18: finished seeds differ: 0, 1 in A, 0 in B" in list(warnings(before, after))
    fewer = replace(before.optimizations, timings=before.optimizations.timings[1:])
    assert list(warnings(before, replace(before, optimizations=fewer))) == ["only in A: optimizations: eager fp32 NCHW"]
    told = list(warnings(before, replace(before, runs=[run for run in before.runs if run.arch != "resnet42"], speeds=None)))
    assert len(told) == 1
    assert told[0].startswith("only in A: resnet42, speeds: ")
    shorter = make_results(epochs=6)
    assert any(line.startswith("resnet18 was trained differently") for line in warnings(before, shorter))
    assert {row.name for row in compare(before, shorter) if row.what == "top-1"} == {f"report_d/{arm}" for arm in range(5)}


def test_what_fails_now_is_worse(options):
    before = make_results()
    runs = [Run("resnet18-seed1", error="crashed") if run.name == "resnet18-seed1" else run for run in before.runs]
    timings = [
        replace(t, images_per_second=[], error="crashed") if t.name == "bf16" else t for t in before.optimizations.timings
    ]
    after = replace(before, runs=runs, optimizations=replace(before.optimizations, timings=timings))
    assert [row.name for row in compare(before, after) if row.worse(options)] == ["optimizations: bf16", "resnet18-seed1"]


def test_the_command_ends_with_its_verdict(tmp_path, capsys, call, refused):
    before, after = make_results(), slowed(make_results(seed=1), 1.5)
    versions = {"versions": {**before.environment["versions"], "torch": "2.12.0"}, "hardware": "[bold]other[/]\x1b[31m"}
    a, b, empty = tmp_path / "a", tmp_path / "b", tmp_path / "empty"
    write_results(a, before)
    write_results(b, replace(after, environment=after.environment | versions))
    write_results(empty, replace(before, runs=[], speeds=None, optimizations=None))
    with pytest.raises(SystemExit, match="1"):
        call(main, a, b / "results.json")
    said = capsys.readouterr().out
    assert "WORSE" in said
    assert "warning: hardware differ: AMD EPYC (Zen 4, family 25 model 17), 2 threads in A, [bold]other[/]" in said
    assert "versions differ: {'torch': '2.11.0'} in A, {'torch': '2.12.0'} in B" in said
    assert "\x1b" not in said
    assert ",?" not in said  # the no-break space of an interval
    assert "better" in call(main, b, a, "--threshold", "2")
    assert "none is missing" in refused(main, a, tmp_path / "none")
    assert "nothing of " in refused(main, a, empty)
