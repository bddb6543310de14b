"""Micro-batches by length: no row is lost, changed or moved out of its window, nothing is wide."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from agentr1.microbatches import Batch, regrouped, trimmed

LENGTHS = st.tuples(st.integers(1, 5), st.integers(0, 9))  # prompt, completion


def batch(lengths: list[tuple[int, int]], start: int = 0) -> Batch:
    """Rows named by their position: every prompt id is 100 + row, every completion id 200 + row."""
    prompt_width, width = 6, 11
    rows: dict[str, Any] = {
        "prompt_ids": torch.zeros(len(lengths), prompt_width, dtype=torch.long),
        "prompt_mask": torch.zeros(len(lengths), prompt_width, dtype=torch.long),
        "completion_ids": torch.zeros(len(lengths), width, dtype=torch.long),
        "completion_mask": torch.zeros(len(lengths), width, dtype=torch.long),
        "advantages": torch.arange(start, start + len(lengths)).float(),
        "ratio": torch.arange(start, start + len(lengths)).float()[:, None],
        "num_items_in_batch": torch.tensor(7),
        "absent": None,
    }
    for i, (prompt, completion) in enumerate(lengths):
        rows["prompt_ids"][i, prompt_width - prompt :] = 100 + start + i
        rows["prompt_mask"][i, prompt_width - prompt :] = 1
        rows["completion_ids"][i, :completion] = 200 + start + i
        rows["completion_mask"][i, :completion] = 1
    return rows


def content(rows: Batch) -> list[tuple[Any, ...]]:
    """What each row says, without padding."""
    return [
        (
            rows["prompt_ids"][i][rows["prompt_mask"][i].bool()].tolist(),
            rows["completion_ids"][i][rows["completion_mask"][i].bool()].tolist(),
            rows["advantages"][i].item(),
            rows["ratio"][i].tolist(),
        )
        for i in range(len(rows["advantages"]))
    ]


@given(st.lists(LENGTHS, min_size=8, max_size=8), st.sampled_from([1, 2, 4]))
def test_rows_stay_whole_within_their_window(lengths: list[tuple[int, int]], window: int) -> None:
    batches = [batch(lengths[i : i + 2], start=i) for i in range(0, 8, 2)]
    found = regrouped(batches, window)
    assert [len(b["advantages"]) for b in found] == [2] * 4
    for start in range(0, 4, window):
        before = [row for b in batches[start : start + window] for row in content(b)]
        after = [row for b in found[start : start + window] for row in content(b)]
        assert sorted(before, key=str) == sorted(after, key=str)
        sizes = [len(row[0]) + len(row[1]) for row in after]
        assert sizes == sorted(sizes, reverse=True)


@given(st.lists(LENGTHS, min_size=1, max_size=4))
def test_a_trimmed_batch_is_as_wide_as_its_longest_row(lengths: list[tuple[int, int]]) -> None:
    rows = batch(lengths)
    found = trimmed(rows)
    assert content(found) == content(rows)
    assert found["prompt_ids"].shape == (len(lengths), max(p for p, _ in lengths))
    width = max(1, max(c for _, c in lengths))  # TRL takes no batch without a completion column
    assert found["completion_ids"].shape == found["completion_mask"].shape == (len(lengths), width)


def test_what_is_no_rectangle_of_tokens_is_left_alone() -> None:
    found = trimmed(batch([(1, 1), (2, 3)]))
    assert found["ratio"].shape == (2, 1)
    assert found["num_items_in_batch"] == 7
    assert found["absent"] is None


def test_a_per_token_tensor_is_trimmed_with_its_completions() -> None:
    rows = batch([(1, 2), (1, 4)]) | {"old": torch.arange(22.0).view(2, 11)}
    assert trimmed(rows)["old"].tolist() == [[0.0, 1.0, 2.0, 3.0], [11.0, 12.0, 13.0, 14.0]]
