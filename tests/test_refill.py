"""Dynamic sampling: groups without differences are replaced, whole, on all processes alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentr1.refill import PlayedBatch, draw_rows, refill
from trainers import ROWS, inputs, make_trainer, planned

SIZE = 2


def batch_of(differs: Sequence[bool], name: str) -> PlayedBatch:
    """One group per flag; a group that differs pays 0 and 1."""
    rows = [{"id": f"{name}{g}"} for g in range(len(differs)) for _ in range(SIZE)]
    paid = [float(flag * member) for flag in differs for member in range(SIZE)]
    trajectories: list[Any] = [f"{row['id']}/{i % SIZE}" for i, row in enumerate(rows)]
    return PlayedBatch(rows, trajectories, torch.tensor(paid).unsqueeze(1))


def silent(batch: PlayedBatch) -> list[int]:
    grouped = batch.rewards.view(-1, SIZE)
    return [g for g, paid in enumerate(grouped.tolist()) if len(set(paid)) == 1]


@given(
    first=st.lists(st.booleans(), min_size=1, max_size=6),
    luck=st.lists(st.booleans(), min_size=1, max_size=9),
    rounds=st.integers(0, 4),
    elsewhere=st.integers(0, 3),
)
def test_only_silent_groups_are_replaced_and_only_by_groups_that_differ(
    first: list[bool], luck: list[bool], rounds: int, elsewhere: int
) -> None:
    flags = itertools.cycle(luck)
    asked: list[int] = []

    def play(groups: int, number: int) -> PlayedBatch:
        asked.append(groups)
        return batch_of([next(flags) for _ in range(groups)], f"round{number}-")

    batch = batch_of(first, "first")
    left = refill(batch, SIZE, rounds, silent=silent, most=lambda n: max(n, elsewhere), play=play)
    assert left == len(silent(batch))
    assert len(asked) <= rounds
    if elsewhere:  # another process still misses groups: this one takes part in every round
        assert len(asked) == rounds
        assert all(groups >= elsewhere for groups in asked)
    elif all(luck) and rounds:
        assert left == 0
    for g, kept in enumerate(first):
        members = batch.trajectories[g * SIZE : (g + 1) * SIZE]
        ids = {row["id"] for row in batch.rows[g * SIZE : (g + 1) * SIZE]}
        assert len(ids) == 1  # groups stay whole
        assert [str(m).split("/")[0] for m in members] == [*ids] * SIZE
        if kept:
            assert ids == {f"first{g}"}
    names = [row["id"] for row in batch.rows[::SIZE]]
    assert len(set(names)) == len(names)  # no group is used twice


def test_processes_draw_different_rows_and_a_place_draws_the_same_again() -> None:
    data = [{"id": i} for i in range(20)]

    def draw(process: int, step: int = 5) -> list[int]:
        found = draw_rows(data, 3, data[:4], share=(process, 4), place=(0, step, 1))
        return [row["id"] for row in found]

    ids = [i for process in range(4) for i in draw(process)]
    assert len(set(ids)) == len(ids) == 12
    assert min(ids) >= 4  # those of the batch are not drawn again
    assert draw(1) == draw(1) != draw(1, step=6)
    few = draw_rows(data[:2], 3, data[:1], share=(0, 1), place=(0,))
    assert len(few) == 3
    assert few[0] == data[1]  # the new one first


@pytest.fixture
def build(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    def build(rewards: Any, **settings: Any) -> Any:
        trainer = make_trainer(
            tmp_path,
            make_model(),
            tokenizer,
            rewards=rewards,
            env_factory=planned([0.0]),
            settings=settings,
        )
        trainer.model.train()
        return trainer

    return build


def test_a_silent_group_leaves_the_batch_and_its_reward_is_asked_for_once(
    build: Callable[..., Any],
) -> None:
    asked: list[str] = []

    def differs_unless_first(trajectories: Sequence[Any], **_: object) -> list[float]:
        ids = [t.row["id"] for t in trajectories]
        asked.extend(ids)
        return [0.0 if row == "r0" else float(i % 2) for i, row in enumerate(ids)]

    trainer = build(differs_unless_first, refill_rounds=8)
    batch = trainer._generate_and_score_completions(inputs(trainer))
    played = [episode.row["id"] for episode in trainer._episodes]
    assert "r0" not in played
    assert played[2:] == ["r1", "r1"]
    assert batch["advantages"].ne(0).all()
    assert trainer._logs["rewards"]["differs_unless_first"][0] == 0.0
    rounds = 1 + (len(asked) - 4) // 2
    assert len(asked) == 4 + 2 * (rounds - 1)


def test_what_rewards_log_belongs_to_the_episodes_that_were_kept(build: Callable[..., Any]) -> None:
    def logs(trajectories: Sequence[Any], log_extra: Any = None, **_: object) -> list[float]:
        ids = [t.row["id"] for t in trajectories]
        log_extra("row", list(ids))
        return [0.0 if row == "r0" else float(i % 2) for i, row in enumerate(ids)]

    trainer = build(logs, refill_rounds=8)
    trainer._generate_and_score_completions(inputs(trainer))
    assert list(trainer._logs["extra"]["row"]) == [e.row["id"] for e in trainer._episodes]


def test_a_resumed_run_draws_the_rows_of_the_uninterrupted_one(
    tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    def run(checkpoint: str | None) -> list[str]:
        drawn: list[str] = []

        def seldom_differs(trajectories: Sequence[Any], **_: object) -> list[float]:
            ids = [t.row["id"] for t in trajectories]
            drawn.append(" ".join(ids))
            return [float(i % 2) * (row in ("r3", "r6")) for i, row in enumerate(ids)]

        trainer = make_trainer(
            tmp_path,
            make_model(),
            tokenizer,
            rewards=seldom_differs,
            env_factory=planned([0.0]),
            settings={
                **{"refill_rounds": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3},
                "collapse_guard": "off",
            },
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return drawn

    whole = run(None)  # eight rows, two a step: the fifth step begins the second epoch
    for step in (3,):
        rest = run(str(tmp_path / f"checkpoint-{step}"))
        assert rest == whole[-len(rest) :]
        assert 3 <= len(rest) < len(whole)


def test_rounds_are_bounded(build: Callable[..., Any]) -> None:
    calls = []

    def equal(trajectories: Sequence[Any], **_: object) -> list[float]:
        calls.append(len(trajectories))
        return [1.0] * len(trajectories)

    trainer = build(equal, refill_rounds=3)
    batch = trainer._generate_and_score_completions(inputs(trainer))
    assert calls == [4, 4, 4, 4]
    assert not batch["advantages"].any()
    assert {row["id"] for row in ROWS} >= {e.row["id"] for e in trainer._episodes}
