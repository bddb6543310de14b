"""Means with intervals: what may be said about a metric from the rows at hand.

Layer 1: numbers in, numbers out, numpy alone. Evaluation, benchmarks and the model card call it;
it knows no metric by name. Intervals are percentile bootstrap, deterministic for one seed. The
unit is one value per row: where a row was rolled out several times, average those first, since
rollouts of one row are not independent.

A bootstrap sees only the spread it is given: for a single value, or values that are all equal,
the interval has zero width. That is lack of evidence, not certainty, so show `n` beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
"""Enough for the ends of a 95% interval to be stable to about 1% of its width."""

_DRAWS_AT_ONCE = 2_000_000  # bounds the memory of one block of resamples to some 32 MB


class Interval(NamedTuple):
    """A mean and its confidence interval.

    Attributes:
        mean: the estimate.
        low: lower end.
        high: upper end.
        n: values behind it: rows, pairs of rows, or the rows of both samples together.
    """

    mean: float
    low: float
    high: float
    n: int


def mean_ci(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of one value per row, with its bootstrap interval."""
    sample = _checked(values, "values")
    means = _resampled_means(sample, np.random.default_rng(seed))
    return _interval(float(sample.mean()), means, confidence, len(sample))


def paired_difference(
    a: Mapping[str, float], b: Mapping[str, float], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of a - b over the same rows, resampling rows.

    Pairing takes the difficulty of the rows out of the comparison: use it whenever both sides were
    measured on the same rows. The order of the mappings does not matter.

    Args:
        a: value by row id.
        b: value by row id, for exactly the same ids.
        confidence: share of the resamples inside the interval.
        seed: of the resampling.
    """
    if a.keys() != b.keys():
        raise ValueError(
            f"a paired difference needs the same row ids on both sides, got {len(a)} and {len(b)} "
            f"ids of which {len(a.keys() & b.keys())} are shared; restrict both to the shared ids "
            "or use unpaired_difference"
        )
    ids = sorted(a, key=str)
    first = _checked([a[i] for i in ids], "a")
    second = _checked([b[i] for i in ids], "b")
    return mean_ci((first - second).tolist(), confidence, seed)


class McNemar(NamedTuple):
    """Rows on which exactly one of two sides was right.

    Attributes:
        only_a: right on side a alone.
        only_b: right on side b alone.
        p: chance of a split at least as uneven, were both sides equally good.
    """

    only_a: int
    only_b: int
    p: float


def mcnemar(a: Mapping[str, float], b: Mapping[str, float]) -> McNemar | None:
    """The exact two-sided McNemar test of two sides' rights and wrongs on the same rows.

    Args:
        a: 0 or 1 by row id.
        b: 0 or 1 by row id, for exactly the same ids.

    Returns:
        None where a value is neither 0 nor 1: the test is not made for it.
    """
    if a.keys() != b.keys():
        raise ValueError(
            f"McNemar's test needs the same row ids on both sides, got {len(a)} and {len(b)} ids "
            f"of which {len(a.keys() & b.keys())} are shared; restrict both to the shared ids"
        )
    if not {*a.values(), *b.values()} <= {0.0, 1.0}:
        return None
    only_a, only_b = sum(a[i] > b[i] for i in a), sum(a[i] < b[i] for i in a)
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**n))


def unpaired_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Difference of the means of two independent samples, resampling each on its own."""
    first, second = _checked(a, "a"), _checked(b, "b")
    rng = np.random.default_rng(seed)
    differences = _resampled_means(first, rng) - _resampled_means(second, rng)
    estimate = float(first.mean() - second.mean())
    return _interval(estimate, differences, confidence, len(first) + len(second))


def mean_over_runs(
    runs: Sequence[Mapping[str, float]], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over runs that were evaluated on the same rows, resampling runs and rows.

    A run that is drawn twice counts twice on every row, a row that is drawn twice in every run: the
    interval holds the luck of the seeds as well as that of the rows. A bootstrap of so few values
    as there are seeds is rough: with three it knows about two thirds of their variance.

    Args:
        runs: value by row id, one mapping per run, all for exactly the same ids.
        confidence: share of the resamples inside the interval.
        seed: of the resampling.

    Returns:
        The mean; `n` counts rows.
    """
    if not runs or any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError(
            f"a mean over runs needs the same row ids in every run, got runs of "
            f"{[len(run) for run in runs]} rows; evaluate all of them on the same rows"
        )
    ids = sorted(runs[0], key=str)
    table = np.stack([_checked([run[i] for i in ids], "a run") for run in runs])  # (S, N)
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWS_AT_ONCE // table.size)
    means = []
    for start in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - start)
        drawn = table[rng.integers(len(runs), size=(count, len(runs)))].mean(1)  # (count, N)
        rows = rng.integers(len(ids), size=drawn.shape)
        means.append(np.take_along_axis(drawn, rows, axis=1).mean(1))
    return _interval(float(table.mean()), np.concatenate(means), confidence, len(ids))


def paired_difference_over_runs(
    a: Sequence[Mapping[str, float]],
    b: Sequence[Mapping[str, float]],
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of a - b, paired run by run and row by row, resampling both; see `mean_over_runs`.

    Args:
        a: one mapping per run, in the order of the seeds.
        b: the runs they are compared with, of the same seeds, on the same rows.
        confidence: share of the resamples inside the interval.
        seed: of the resampling.
    """
    if len(a) != len(b) or any(x.keys() != y.keys() for x, y in zip(a, b, strict=True)):
        raise ValueError(
            f"a paired difference needs the same runs and row ids on both sides, got {len(a)} and "
            f"{len(b)} runs; compare the seeds and rows that both have"
        )
    differences = [{i: x[i] - y[i] for i in x} for x, y in zip(a, b, strict=True)]
    return mean_over_runs(differences, confidence, seed)


def _checked(values: Sequence[float], name: str) -> NDArray[np.float64]:
    """The values as an array; refuses what has no mean."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(
            f"{name} must be at least one finite number, one per row, got shape {sample.shape} "
            f"with {int((~np.isfinite(sample)).sum())} not finite; leave rows without a value out "
            "and report how many they are"
        )
    return sample


def _resampled_means(sample: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of RESAMPLES samples drawn with replacement, in blocks that fit in memory."""
    block = max(1, _DRAWS_AT_ONCE // len(sample))
    means = [
        sample[rng.integers(len(sample), size=(min(block, RESAMPLES - start), len(sample)))].mean(1)
        for start in range(0, RESAMPLES, block)
    ]
    return np.concatenate(means)


def _interval(estimate: float, means: NDArray[np.float64], confidence: float, n: int) -> Interval:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}; 0.95 is usual")
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(estimate, float(low), float(high), n)
