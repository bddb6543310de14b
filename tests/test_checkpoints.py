"""Checkpoints of weights that collapsed: out of the way, and gone first where room is short.

How checkpoints are written and rotated is tested in test_trainer.py and test_interrupts.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.trainer_utils import get_last_checkpoint

from agentr1.checkpoints import between_batches, put_aside, surplus_collapsed


def folders(place: Path, *names: str) -> None:
    for name in names:
        (place / name).mkdir()
        (place / name / "of").write_text(name)


def names(paths: Any) -> list[str]:
    return sorted(path.name for path in paths)


@pytest.mark.parametrize("best", [None, "checkpoint-30"])
def test_what_is_put_aside_is_not_resumed_from(tmp_path: Path, best: str | None) -> None:
    steps = ("checkpoint-9", "checkpoint-10", "checkpoint-30", "checkpoint-100")
    folders(tmp_path, *steps, "collapsed-100", "checkpoint-old")
    put_aside(tmp_path, 10, best and str(tmp_path / best))
    kept = [best] if best else ["collapsed-30"]
    expected = ["checkpoint-9", "checkpoint-10", "checkpoint-old", "collapsed-100", *kept]
    assert names(tmp_path.iterdir()) == sorted(expected)
    assert (tmp_path / "collapsed-100" / "of").read_text() == "checkpoint-100"  # the newer of two
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / (best or "checkpoint-10"))


@pytest.mark.parametrize(
    ("limit", "surplus"),
    [
        (None, []),
        (0, []),
        (9, []),
        (4, ["collapsed-9"]),
        (3, ["collapsed-9", "collapsed-10"]),
        (1, ["collapsed-9", "collapsed-10", "collapsed-30"]),
    ],
)
def test_those_put_aside_are_the_first_to_go(
    tmp_path: Path, limit: int | None, surplus: list[str]
) -> None:
    folders(tmp_path, "checkpoint-1", "checkpoint-2")
    folders(tmp_path, "collapsed-9", "collapsed-10", "collapsed-30")
    assert [path.name for path in surplus_collapsed(tmp_path, limit)] == surplus


@pytest.mark.parametrize(
    ("generation", "iterations", "accumulation", "steps"),
    [(1, 1, 1, 1), (2, 1, 1, 2), (2, 1, 2, 1), (4, 1, 2, 2), (2, 3, 1, 6), (None, 2, 1, 2)],
)
def test_a_batch_ends_after_its_updates(
    generation: int | None, iterations: int, accumulation: int, steps: int
) -> None:
    args: Any = SimpleNamespace(
        steps_per_generation=generation,
        num_iterations=iterations,
        gradient_accumulation_steps=accumulation,
    )
    states: list[Any] = [SimpleNamespace(global_step=step) for step in range(13)]
    found = [state.global_step for state in states if between_batches(args, state)]
    assert found == list(range(0, 13, steps))
