"""Statistics against published examples, tables and closed forms; equal peers are told apart about as often as stated."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.intervals import (
    MIN_ROUNDS,
    change_apart,
    change_in_turns,
    describe_mean,
    describe_median,
    holm,
    paired,
    pareto_front,
    t_quantile,
    two_sided_p,
    welch,
)

# Student's sleep data (Biometrika 1908): hours gained by ten patients with either drug. R's `t.test(..., data = sleep)`.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (20, 2.086), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_printed_table(freedom, quantile):
    assert t_quantile(0.95, freedom) == pytest.approx(quantile, abs=5e-4)


@given(st.floats(0, 1e4))
def test_probabilities_follow_the_closed_forms(t):
    assert two_sided_p(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-12)  # Cauchy
    assert two_sided_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)


@given(st.floats(1, 500), st.floats(0.01, 0.999))
def test_a_quantile_has_its_probability(freedom, confidence):
    assert two_sided_p(t_quantile(confidence, freedom), freedom) == pytest.approx(1 - confidence, abs=1e-10)


def test_mean_deviation_and_interval_of_a_known_sample():
    mean = describe_mean([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert (mean.n, mean.mean) == (8, 5.0)
    assert mean.deviation == pytest.approx(math.sqrt(32 / 7))
    reach = 2.3646 * math.sqrt(32 / 7 / 8)  # t(0.975, 7)
    assert mean.interval == pytest.approx((5 - reach, 5 + reach), abs=1e-4)


@pytest.mark.parametrize(("values", "deviation"), [([0.7], None), ([0.7, 0.7], 0.0), ([0.1 + 0.2, 0.3], 0.0)])
def test_one_value_or_equal_ones_have_no_interval(values, deviation):
    mean = describe_mean(values)
    assert mean.deviation == deviation
    assert mean.interval is None


def test_the_paired_test_is_students_own():
    difference = paired(SLEEP_1, SLEEP_2)
    assert difference.n == 10
    assert difference.mean == pytest.approx(-1.58)
    assert difference.p == pytest.approx(0.002833, abs=1e-6)
    assert difference.interval == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)


def test_welchs_test_of_the_same_data():
    difference = welch(SLEEP_1, SLEEP_2)
    assert difference.p == pytest.approx(0.07939, abs=1e-5)
    assert difference.interval == pytest.approx((-3.3654832, 0.2054832), abs=1e-6)


@pytest.mark.parametrize("compare", [paired, welch])
@pytest.mark.parametrize(("treated", "control"), [([0.5], [0.4]), ([0.5, 0.6], [0.4, 0.5]), ([0.4, 0.4], [0.4, 0.4])])
def test_a_comparison_without_spread_claims_nothing(compare, treated, control):
    difference = compare(treated, control)
    assert difference.mean == pytest.approx(treated[0] - control[0])
    if len(treated) == 1 or compare is paired or len(set(treated)) == 1:
        assert difference.interval is None
        assert difference.p is None


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="at least one pair"):
        paired([], [])
    with pytest.raises(ValueError, match="zip"):
        paired([1.0, 2.0], [1.0])


def test_a_median_has_an_interval_from_six_rounds_on():
    few, enough = [describe_median(list(range(1, n + 1))) for n in (MIN_ROUNDS - 1, 101)]
    assert few.interval is None
    assert (few.median, few.p10, few.p90) == (3, pytest.approx(1.4), pytest.approx(4.6))
    assert enough.median == 51
    assert 36 <= enough.interval.low < 51 < enough.interval.high <= 66  # by the binomial: ranks 41 to 61
    assert change_in_turns([2.0] * 5, [1.0] * 5).interval is None


def test_holms_correction_of_a_worked_example():
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_front_holds_what_nothing_beats():
    assert pareto_front([(1, 9), (3, 7), (2, 7), (5, 1), (4, 0)]) == [0, 1, 3]
    assert pareto_front([(1, 1), (1, 1)]) == [0, 1]  # equals do not beat each other
    assert pareto_front([]) == []


def test_a_known_change_lies_in_its_interval():
    rng = random.Random(0)
    slow = [100 * rng.gauss(1, 0.02) for _ in range(20)]
    fast = [130 * rng.gauss(1, 0.02) for _ in range(20)]
    change = change_apart(fast, slow)
    assert change.interval.low < 1.3 < change.interval.high
    assert change.shown


@pytest.mark.parametrize(
    ("claims", "highest"),
    [
        (lambda a, b: describe_mean(a - b).interval.excludes(0), 0.065),
        (lambda a, b: paired(a, b).p < 0.05, 0.065),
        (lambda a, b: change_apart(np.exp(a), np.exp(b)).shown, 0.065),
        (lambda a, b: change_in_turns(np.exp(a), np.exp(b)).shown, 0.09),  # the bootstrap of a median is a little bold
    ],
    ids=["mean", "paired", "apart", "in turns"],
)
@pytest.mark.parametrize("n", [6, 12])
def test_equal_peers_are_told_apart_in_about_one_case_of_twenty(claims, highest, n):
    rng = np.random.default_rng(n)
    trials = 1000
    found = sum(bool(claims(*rng.normal(0, 0.03, (2, n)))) for _ in range(trials)) / trials
    assert 0.03 <= found <= highest
