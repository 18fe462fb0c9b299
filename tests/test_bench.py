"""Measuring: interleaving, ratios with intervals that mean something, and the pipeline benchmark in small."""

import json

import numpy as np
import pytest

from bench.timing import Timings, bootstrap_ratio, interleaved
from tests.conftest import run_cli


def test_peers_take_turns_in_changing_order():
    calls = []
    timings = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=8, warmup=1)
    turns = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(turns) == 9
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert all(len(seconds) == 8 for seconds in timings.seconds.values())


def test_a_known_ratio_lies_in_its_interval_and_an_equal_pair_claims_nothing():
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 3, 40)  # a machine that slows and recovers hits both peers of a round
    slow, fast, same = (factor * drift * rng.normal(1, 0.05, 40) for factor in (2.0, 1.0, 1.0))
    ratio = bootstrap_ratio(slow.tolist(), fast.tolist())
    assert ratio.low < 2 < ratio.high
    assert ratio.low > 1.8
    assert ratio.high < 2.2
    equal = bootstrap_ratio(same.tolist(), fast.tolist())
    assert equal.low < 1 < equal.high


def test_rates_are_units_over_seconds():
    timings = Timings({"x": [1.0, 2.0, 4.0]})
    rate = timings.rate("x", 100)
    assert rate["median"] == 50
    assert rate["p10"] == pytest.approx(30)  # 25, 50, 100 interpolated
    assert rate["rounds"] == 3


def test_the_pipeline_benchmark_writes_what_it_measured(betons, tmp_path):
    out = tmp_path / "pipeline.json"
    small = ("--batch-size", "16", "--rounds", "3", "--starts", "1", "--no-input")
    process = run_cli("bench/pipeline.py", "--data", betons, "--out", out, *small)
    assert process.returncode == 0, process.stderr
    results = json.loads(out.read_text())
    assert set(results["step"]["images_per_second"]) == {"fastcifar", "--kernels torch", "eager fp32 NCHW"}
    assert len(results["step"]["seconds"]["fastcifar"]) == 3
    assert results["step"]["speedup"]["low"] <= results["step"]["speedup"]["median"] <= results["step"]["speedup"]["high"]
    assert 0 < results["first_step"]["median"] < 60
    assert results["versions"]["torch"]
    assert "img/s" in process.stdout
