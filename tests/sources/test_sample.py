"""Rows drawn by seed do not depend on the order they come in."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from agentr1.sources.sample import Sample, mixed

ROWS = [{"id": f"q{i}", "source": "a", "question": "é"} for i in range(60)]


def drawn(rows: list[dict], n: int, seed: int = 0) -> list[str]:
    sample = Sample(n, seed, "a")
    for row in rows:
        sample.offer(row)
    assert len(sample) == min(n, len(rows))
    return [row["id"] for _, row in mixed([sample])]


@given(st.randoms(), st.integers(1, 70), st.integers(0, 3))
def test_the_order_of_reading_changes_nothing(shuffler: random.Random, n: int, seed: int) -> None:
    rows = list(ROWS)
    shuffler.shuffle(rows)
    assert drawn(rows, n, seed) == drawn(ROWS, n, seed)


def test_a_smaller_sample_is_the_beginning_of_a_larger_one() -> None:
    assert drawn(ROWS, 40)[:15] == drawn(ROWS, 15)


def test_the_seed_decides() -> None:
    assert drawn(ROWS, 20, 0) != drawn(ROWS, 20, 1)
    assert drawn(ROWS, 60, 0) != [row["id"] for row in ROWS]


def test_every_row_has_the_same_chance() -> None:
    counts = dict.fromkeys((row["id"] for row in ROWS), 0)
    for seed in range(300):
        for identity in drawn(ROWS, 20, seed):
            counts[identity] += 1
    # 100 expected of each, standard deviation 8.
    assert min(counts.values()) > 65
    assert max(counts.values()) < 135


def test_two_sets_are_mixed_evenly() -> None:
    samples = [Sample(500, 0, name) for name in "ab"]
    for name, sample in zip("ab", samples, strict=True):
        for i in range(500):
            sample.offer({"id": str(i), "source": name})
    drawn = list(mixed(samples))
    assert all(name == row["source"] for name, row in drawn)
    names = [name for name, _ in drawn]
    assert len(names) == 1000
    assert 200 < names[:500].count("a") < 300
