"""Advantages and returns from values, by hand on two small episodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from agentr1.advantages import TurnRewards
from agentr1.alignment import line_up
from agentr1.types import Segment
from agentr1.valuation import Episodes, value_loss, value_tokens, value_turns

NAN = float("nan")


def segment(*turn_ids: int) -> Segment:
    zeros = (0,) * len(turn_ids)
    return Segment((1,), zeros, zeros, (0.0,) * len(turn_ids), turn_ids)


# The first episode ends by itself after two turns; the second is cut in its second row.
SEGMENTS = [segment(0, 0, -1, 1), segment(0, -1), segment(1, 1, -1)]
LIKE = torch.zeros(3, 4)
STATES = torch.tensor(
    [[0.5, 0.25, 9.0, 0.75, 9.0], [1.0, 9.0, 9.0, 9.0, 9.0], [0.5, 2.0, 9.0, 4.0, 9.0]]
)


def episodes(
    outcome: tuple[float, float] = (3.0, 0.0),
    trained: torch.Tensor = LIKE + 1,
    penalties: torch.Tensor = LIKE,
    process: tuple[tuple[float, float], ...] = ((1.0, 0.0), (0.0, -1.0)),
) -> Episodes:
    return Episodes(
        line=line_up(SEGMENTS, [0, 1, 1], 2),
        rewards=TurnRewards(
            outcome=torch.tensor(outcome),
            process=torch.tensor(process),
            turn_counts=torch.tensor([2, 2]),
            group_size=1,
            discount=0.5,
        ),
        cut=torch.tensor([False, True]),
        trained=trained,
        penalties=penalties,
    )


@pytest.mark.parametrize("value", [value_tokens, value_turns])
def test_an_infinite_outcome_is_named(value: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"infinite one in rows \[1\]"):
        value(STATES, episodes(outcome=(1.0, float("inf"))), lam=1.0)


def test_token_by_token_with_lambda_1() -> None:
    found = value_tokens(STATES, episodes(), lam=1.0)
    # Backwards: 3; then 1 + 3/2; then the same again, since nothing is discounted inside a turn.
    # The second: -1 + 4/2 from the state behind the last observation, and half of it a turn before.
    returns = torch.tensor([[2.5, 2.5, 3.0], [0.5, 1.0, 1.0]])
    torch.testing.assert_close(found.returns, returns)
    values = torch.tensor([[0.5, 0.25, 0.75], [1.0, 0.5, 2.0]])
    torch.testing.assert_close(found.values, values)
    torch.testing.assert_close(found.advantages, returns - values)


def test_token_by_token_with_lambda_0_looks_one_token_ahead() -> None:
    found = value_tokens(STATES, episodes(), lam=0.0)
    # What is paid plus the next token's value, whatever was observed in between.
    expected = torch.tensor([[0.25, 1 + 0.75 / 2, 3.0], [0.5 / 2, 2.0, -1 + 4.0 / 2]])
    torch.testing.assert_close(found.returns, expected)


def test_turn_by_turn() -> None:
    found = value_turns(STATES, episodes(), lam=0.5)
    values = torch.tensor([[0.5, 0.75], [1.0, 0.5]])  # at the first token of each turn
    last = torch.tensor([3.0, -1 + 4.0 / 2]) - values[:, 1]
    first = torch.tensor([1.0, 0.0]) + values[:, 1] / 2 - values[:, 0] + last / 4
    torch.testing.assert_close(found.values, values)
    torch.testing.assert_close(found.advantages, torch.stack([first, last], 1))
    assert found.on_tokens(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), LIKE).tolist() == [
        [1, 1, 0, 2],
        [3, 0, 0, 0],
        [4, 4, 0, 0],
    ]
    assert found.on_states(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), LIKE).tolist() == [
        [1, 0, 0, 2],
        [3, 0, 0, 0],
        [4, 0, 0, 0],
    ]


def test_a_penalty_is_taken_off_its_tokens_reward_or_its_turns() -> None:
    costs = torch.tensor([[0.0, 0.5, 7.0, 0.0], [0.0, 7.0, 0.0, 0.0], [0.25, 0.0, 7.0, 0.0]])
    tokens = value_tokens(STATES, episodes(penalties=costs), lam=1.0).returns
    torch.testing.assert_close(tokens, torch.tensor([[2.0, 2.0, 3.0], [0.375, 0.75, 1.0]]))
    turns = value_turns(STATES, episodes(penalties=costs), lam=1.0).returns
    torch.testing.assert_close(turns, torch.tensor([[2.0, 3.0], [0.375, 0.75]]))


def test_what_is_not_trained_still_counts_for_what_came_before() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    for function, trained in (
        (value_tokens, [[True, True, False], [True, True, True]]),
        (value_turns, [[True, False], [True, True]]),
    ):
        found, whole = (function(STATES, episodes(trained=m), 1.0) for m in (mask, LIKE + 1))
        assert found.trained.tolist() == trained
        assert torch.equal(found.advantages, whole.advantages)


def test_an_episode_that_nobody_paid_is_left_out() -> None:
    for function in (value_tokens, value_turns):
        silent = episodes(outcome=(NAN, NAN), process=((0.0, 0.0), (0.0, -1.0)))
        found = function(STATES, silent, 1.0)
        assert found.trained.any(1).tolist() == [False, True]
        assert not found.advantages.isnan().any()


def test_with_observations_in_the_line_their_values_count() -> None:
    through = episodes()
    line = line_up(SEGMENTS, [0, 1, 1], 2, observations=True)
    found = value_tokens(STATES, Episodes(line, *_rest(through)), lam=0.0)
    expected = torch.tensor([0.25, 1 + 9.0 / 2, 0.75, 3.0])  # the observation is worth 9
    torch.testing.assert_close(found.returns[0, :4], expected)


def _rest(given: Episodes) -> tuple[TurnRewards, torch.Tensor, torch.Tensor, torch.Tensor]:
    return given.rewards, given.cut, given.trained, given.penalties


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [
        (0.1, 0.0, 1.0, 0.9**2 / 2, False),  # within the clip
        (0.5, 0.0, 1.0, 0.8**2 / 2, True),  # moved far towards its return: left alone
        (-0.5, 0.0, 1.0, 1.5**2 / 2, False),  # moved far away from it: still pulled back
    ],
)
def test_a_value_moves_a_clip_at_a_time(
    value: float, old: float, target: float, loss: float, clipped: bool
) -> None:
    values = torch.tensor([value], requires_grad=True)
    found, where = value_loss(values, torch.tensor([old]), torch.tensor([target]), 0.2)
    assert found.item() == pytest.approx(loss)
    assert where.item() is clipped
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert gradient.item() == pytest.approx(0.0 if clipped else value - target)


def test_without_a_clip_it_is_the_squared_error() -> None:
    found, where = value_loss(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([1.0]), None)
    assert found.tolist() == [2.0]
    assert not where.any()
