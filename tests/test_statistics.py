"""Intervals: right where theory knows, deterministic, and defined for awkward samples."""

import numpy as np
import pytest

from agentr1.statistics import (
    Interval,
    McNemar,
    mcnemar,
    mean_ci,
    mean_over_runs,
    paired_difference,
    paired_difference_over_runs,
    unpaired_difference,
)


def test_mean_ci_agrees_with_normal_theory_on_a_large_sample():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    interval = mean_ci(values.tolist())
    half = 1.96 * values.std() / 400**0.5
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert interval.n == 400


def test_mean_ci_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    samples = rng.random((60, 50)) < 0.4
    intervals = [mean_ci(sample.astype(float).tolist()) for sample in samples]
    covered = sum(i.low <= 0.4 <= i.high for i in intervals)
    assert 52 <= covered <= 60


def test_more_confidence_is_a_wider_interval():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    narrow, wide = mean_ci(values, confidence=0.5), mean_ci(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(3).random(30).tolist()
    assert mean_ci(values, seed=1) == mean_ci(values, seed=1)
    assert mean_ci(values, seed=1) != mean_ci(values, seed=2)


@pytest.mark.parametrize("values", [[0.7], [0.0] * 5, [1.0] * 5])
def test_without_spread_the_interval_has_no_width(values):
    assert mean_ci(values) == Interval(values[0], values[0], values[0], len(values))


def test_blocks_of_resamples_do_not_change_the_result(monkeypatch):
    values = np.random.default_rng(4).random(40).tolist()
    whole = mean_ci(values)
    monkeypatch.setattr("agentr1.statistics._DRAWS_AT_ONCE", 1_000)
    assert mean_ci(values) == whole


def test_pairing_finds_a_small_difference_that_the_unpaired_interval_cannot():
    rng = np.random.default_rng(5)
    difficulty = rng.normal(0, 10, size=50)
    gain = rng.normal(1.0, 0.5, size=50)
    b = {str(i): float(x) for i, x in enumerate(difficulty)}
    a = {str(i): float(x) for i, x in enumerate(difficulty + gain)}
    paired = paired_difference(a, b)
    unpaired = unpaired_difference(list(a.values()), list(b.values()))
    assert paired.mean == pytest.approx(gain.mean())
    assert unpaired.mean == pytest.approx(gain.mean())
    assert 0 < paired.low < paired.high
    assert unpaired.low < 0 < unpaired.high
    assert (paired.n, unpaired.n) == (50, 100)


def test_the_order_of_the_rows_does_not_matter_to_a_pair():
    a = {"x": 1.0, "y": 0.0, "z": 1.0}
    b = {"z": 0.0, "x": 1.0, "y": 1.0}
    assert paired_difference(a, b) == paired_difference(dict(reversed(a.items())), b)
    assert paired_difference(a, b).mean == pytest.approx(0.0)


def test_unpaired_agrees_with_normal_theory():
    rng = np.random.default_rng(6)
    a, b = rng.normal(2, 1, size=300), rng.normal(1, 3, size=200)
    interval = unpaired_difference(a.tolist(), b.tolist())
    half = 1.96 * (a.var() / 300 + b.var() / 200) ** 0.5
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)


def test_different_rows_are_no_pairs():
    with pytest.raises(ValueError, match="2 and 2 ids of which 1 are shared"):
        paired_difference({"x": 1.0, "y": 1.0}, {"x": 1.0, "z": 0.0})


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")], [[1.0], [2.0]]])
def test_values_without_a_mean_are_refused(values):
    with pytest.raises(ValueError, match="at least one finite number"):
        mean_ci(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_ci([1.0, 2.0], confidence=confidence)


def test_runs_and_rows_are_both_resampled():
    """Without noise of its own a value is seed + row, and the variances of both means add."""
    rng = np.random.default_rng(7)
    seeds, rows = rng.normal(0, 1, size=40), rng.normal(3, 2, size=300)
    runs = [{str(i): float(seed + row) for i, row in enumerate(rows)} for seed in seeds]
    interval = mean_over_runs(runs)
    assert interval.mean == pytest.approx(seeds.mean() + rows.mean())
    half = 1.96 * (seeds.var() / 40 + rows.var() / 300) ** 0.5
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)
    assert interval.n == 300


def test_one_run_is_an_ordinary_mean_and_difference():
    rng = np.random.default_rng(8)
    a = {str(i): float(x) for i, x in enumerate(rng.normal(size=100))}
    b = {str(i): float(x) for i, x in enumerate(rng.normal(size=100))}
    one, plain = mean_over_runs([a]), mean_ci(list(a.values()))
    assert one.mean == pytest.approx(plain.mean)
    assert (one.low, one.high) == pytest.approx((plain.low, plain.high), abs=0.01)
    over, paired = paired_difference_over_runs([a], [b]), paired_difference(a, b)
    assert (over.low, over.high) == pytest.approx((paired.low, paired.high), abs=0.01)


def test_a_difference_over_runs_is_paired_within_each_run():
    """Every run and row has another level, the difference is everywhere the same."""
    b = [{"x": 1.0, "y": 5.0}, {"x": 2.0, "y": 9.0}]
    a = [{row: value + 0.5 for row, value in run.items()} for run in b]
    assert paired_difference_over_runs(a, b)[:3] == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="got 2 and 1 runs"):
        paired_difference_over_runs(a, b[:1])
    with pytest.raises(ValueError, match="same row ids"):
        mean_over_runs([{"x": 1.0}, {"z": 1.0}])


def test_mcnemar_is_the_exact_binomial_test_of_the_rows_that_differ():
    a = dict(enumerate([1.0] * 8 + [0.0] * 2 + [1.0] * 5 + [0.0] * 7))
    b = dict(enumerate([0.0] * 8 + [1.0] * 2 + [1.0] * 5 + [0.0] * 7))
    # 2 x P(at most 2 heads of 10 throws) = 2 x (1 + 10 + 45) / 1024.
    assert mcnemar(a, b) == McNemar(8, 2, pytest.approx(112 / 1024))
    assert mcnemar(b, a) == McNemar(2, 8, pytest.approx(112 / 1024))
    even = {0: 1.0, 1: 0.0}, {0: 0.0, 1: 1.0}
    assert mcnemar(*even) == McNemar(1, 1, 1.0)
    assert mcnemar(a, a) == McNemar(0, 0, 1.0)


def test_mcnemar_holds_for_thousands_of_rows_and_only_for_rights_and_wrongs():
    n = 7405
    a = {i: float(i % 2) for i in range(n)}
    b = {i: float(i % 3 == 0) for i in range(n)}
    found = mcnemar(a, b)
    assert found is not None
    assert 0.0 < found.p < 1e-60
    assert mcnemar({0: 0.5}, {0: 1.0}) is None
    with pytest.raises(ValueError, match="same row ids"):
        mcnemar({0: 1.0}, {1: 1.0})
