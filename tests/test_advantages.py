"""The parts of credit: hand-computed values, slow references, gaps and errors.

What is unbiased is shown in `test_bias.py`, whole estimators are in `test_estimators.py`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentr1.advantages import (
    TurnRewards,
    batch_deviation,
    greedy_baseline,
    group_mean,
    group_standardised,
    leave_one_out,
    place_turns,
    prime_scaled,
    returns_to_go,
    scored_outcome,
    total_returns,
    turn_leave_one_out,
    turn_mean_log_ratio,
)

NAN, INF = float("nan"), float("inf")
BY_COLUMN = [group_mean, group_standardised, leave_one_out, greedy_baseline]
ESTIMATORS = [group_mean, group_standardised, leave_one_out]


def doubles(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Outcome estimators, by hand


def test_group_mean_by_hand():
    result = group_mean(doubles([1, 0, 0, 3, 5, 7]), 3)
    torch.testing.assert_close(result, doubles([2 / 3, -1 / 3, -1 / 3, -2, 0, 2]))


def test_group_standardised_by_hand_divides_by_the_sample_deviation():
    # mean 5, squares 4 + 0 + 4 over 3 - 1: std 2.
    result = group_standardised(doubles([3, 5, 7]), 3)
    torch.testing.assert_close(result, doubles([-2, 0, 2]) / (2 + 1e-4))


def test_leave_one_out_by_hand():
    result = leave_one_out(doubles([1, 0, 0, 3, 5, 7]), 3)
    torch.testing.assert_close(result, doubles([1, -0.5, -0.5, -3, 0, 3]))


def test_greedy_baseline_by_hand():
    result = greedy_baseline(doubles([1, 0, 4, NAN, 2, 3]), 3)
    assert result.tolist() == [0, -1, 3, 0, 0, 0]


@pytest.mark.parametrize("estimator", BY_COLUMN)
def test_columns_are_compared_each_by_itself(estimator):
    first, second = doubles([1, 0, 4, 2]), doubles([0, NAN, 7, 7])
    both = estimator(torch.stack([first, second], dim=1), 2)
    assert torch.equal(both, torch.stack([estimator(first, 2), estimator(second, 2)], dim=1))


def test_batch_deviation_leaves_out_what_is_no_number():
    torch.testing.assert_close(batch_deviation(doubles([4, 0, NAN, 4])), doubles(2 + 1e-4))
    assert not batch_deviation(doubles([3, NAN])).isfinite()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_row_without_a_reward_gets_zero_and_leaves_the_others_as_if_it_were_absent(estimator):
    with_gap = estimator(doubles([1, NAN, 4]), 3)
    without = estimator(doubles([1, 4]), 2)
    torch.testing.assert_close(with_gap, doubles([without[0], 0, without[1]]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_to_compare_with_gives_zero(estimator):
    for rewards in ([NAN, NAN], [NAN, 3.0], [0.7, 0.7]):
        assert estimator(doubles(rewards), 2).tolist() == [0.0, 0.0]
    assert estimator(doubles([3.0]), 1).tolist() == [0.0]
    assert estimator(doubles([]), 2).tolist() == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_of_broken_groups_is_refused(estimator):
    with pytest.raises(ValueError, match="5 rows do not fall into groups of 2"):
        estimator(torch.zeros(5), 2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_infinite_reward_is_refused_by_row(estimator):
    with pytest.raises(ValueError, match=r"infinite one in rows \[2\]"):
        estimator(torch.tensor([0.0, 1.0, float("inf"), 0.0]), 2)


def test_equal_rewards_that_are_no_binary_fractions_stay_silent_in_single_precision():
    rewards = torch.full((12,), 0.1)
    for estimator in ESTIMATORS:
        assert estimator(rewards, 4).abs().max() < 1e-3


# Turns, by hand


def test_returns_to_go_by_hand_and_padding_is_ignored():
    rewards = doubles([[1, 2, 4], [3, NAN, 99]])
    result = returns_to_go(rewards, torch.tensor([3, 1]), 0.5)
    torch.testing.assert_close(result, doubles([[3, 4, 4], [3, 0, 0]]))
    assert rewards[0].tolist() == [1, 2, 4]  # the argument is not written to


def test_turn_leave_one_out_by_hand():
    rewards = doubles([[1, 2, 4], [3, NAN, 9], [0, 6, 0]])
    result = turn_leave_one_out(rewards, torch.tensor([3, 1, 2]), 3)
    # Returns: [7, 6, 4], [3, 0, 0], [6, 6, 0]; absent turns count 0 for the others.
    expected = doubles([[7 - 4.5, 6 - 3, 4 - 0], [3 - 6.5, 0, 0], [6 - 5, 6 - 3, 0]])
    torch.testing.assert_close(result, expected)


def test_turn_leave_one_out_keeps_groups_apart():
    rewards = doubles([[1.0], [2.0], [10.0], [30.0]])
    result = turn_leave_one_out(rewards, torch.tensor([1, 1, 1, 1]), 2)
    assert result.flatten().tolist() == [-1, 1, -20, 20]


def test_turn_leave_one_out_without_siblings_is_zero():
    assert turn_leave_one_out(doubles([[1, 2]]), torch.tensor([2]), 1).tolist() == [[0, 0]]


def test_a_process_reward_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="row 1 at turn 0"):
        turn_leave_one_out(doubles([[1, 2], [NAN, 0]]), torch.tensor([2, 1]), 2)


def paid(outcome, process, counts, discount=1.0) -> TurnRewards:
    return TurnRewards(doubles(outcome), doubles(process), torch.tensor(counts), 1, discount)


def test_total_returns_by_hand_discount_turns_but_not_the_outcome():
    rewards = paid([10, 20], [[1, 2, 4], [3, INF, NAN]], [3, 1], 0.5)
    assert total_returns(rewards).tolist() == [10 + 1 + 1 + 1, 20 + 3]


def test_an_outcome_nobody_gave_counts_as_zero_only_where_a_turn_was_paid():
    rewards = paid([NAN, NAN, 2, 0], [[0, -1], [0, 5], [0, 0], [1, 0]], [2, 1, 2, 2])
    assert scored_outcome(rewards).nan_to_num(nan=-99).tolist() == [0, -99, 2, 0]
    assert total_returns(rewards).nan_to_num(nan=-99).tolist() == [-1, -99, 2, 1]


def test_prime_scaled_by_hand():
    # Returns to go at discount 0.5: [1 - 4, -8] and [6]; the largest is 8.
    rewards = doubles([[1, -8], [6, NAN]])
    result = prime_scaled(rewards, torch.tensor([2, 1]), 0.5)
    assert result.tolist() == [[1 / 8, -1], [6 / 8, 0]]
    assert prime_scaled(doubles([[0, INF]]), torch.tensor([1])).tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="row 0 at turn 0"):
        prime_scaled(doubles([[NAN, 0]]), torch.tensor([1]))


quarters = st.integers(-8, 8).map(lambda n: n / 4)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(quarters, min_size=1, max_size=4), min_size=1, max_size=4),
    discount=st.sampled_from([1.0, 0.9, 0.5]),
)
def test_prime_scaled_equals_its_slow_reference(rows, discount):
    largest = 0.0
    for row in rows:
        running = 0.0
        for reward in reversed(row):
            running = reward + discount * running
            largest = max(largest, abs(running))
    width = max(len(row) for row in rows)
    expected = [[r / (largest or 1.0) for r in row] + [0.0] * (width - len(row)) for row in rows]
    padded = doubles([row + [NAN] * (width - len(row)) for row in rows])
    result = prime_scaled(padded, torch.tensor([len(row) for row in rows]), discount)
    torch.testing.assert_close(result, doubles(expected), rtol=1e-10, atol=1e-10)


TURN_IDS = torch.tensor([[0, 0, -1, 1, -1], [0, -1, -1, -1, -1]])


def test_place_turns_by_hand():
    placed = place_turns(doubles([[1, 2], [3, NAN]]), TURN_IDS)
    assert placed.tolist() == [[1, 1, 0, 2, 0], [3, 0, 0, 0, 0]]


def test_place_turns_refuses_a_turn_without_a_value():
    with pytest.raises(ValueError, match="turn_ids go up to 1, but there are values for 1 turns"):
        place_turns(doubles([[1], [3]]), TURN_IDS)


def test_place_turns_is_zero_off_the_policy_tokens_even_for_values_that_are_no_numbers():
    placed = place_turns(doubles([[NAN, NAN], [1, NAN]]), TURN_IDS)
    assert placed[TURN_IDS == -1].tolist() == [0.0] * 6
    assert placed[1, 0] == 1


# One ratio per turn


def test_turn_mean_log_ratio_by_hand_ignores_observations():
    log_ratio = doubles([[1, 3, NAN, 5, INF], [7, 9, 9, 9, 9]])
    result = turn_mean_log_ratio(log_ratio, TURN_IDS)
    assert result.tolist() == [[2, 2, 0, 5, 0], [7, 0, 0, 0, 0]]


def test_turn_mean_log_ratio_of_rows_that_begin_at_a_later_turn():
    """A row after a rewritten context knows only the later turns, and more turns than tokens."""
    log_ratio, turn_ids = doubles([[1, 2], [4, 8]]), torch.tensor([[6, 6], [-1, -1]])
    assert turn_mean_log_ratio(log_ratio, turn_ids).tolist() == [[1.5, 1.5], [0, 0]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 6).flatmap(
        lambda width: st.lists(
            st.lists(st.tuples(st.integers(-1, 3), quarters), min_size=width, max_size=width),
            min_size=1,
            max_size=4,
        )
    )
)
def test_turn_mean_log_ratio_equals_its_slow_reference(rows):
    expected = [
        [
            0.0
            if turn < 0
            else sum(r for t, r in row if t == turn) / sum(t == turn for t, _ in row)
            for turn, _ in row
        ]
        for row in rows
    ]
    turn_ids = torch.tensor([[turn for turn, _ in row] for row in rows], dtype=torch.long)
    result = turn_mean_log_ratio(doubles([[ratio for _, ratio in row] for row in rows]), turn_ids)
    torch.testing.assert_close(result, doubles(expected), rtol=1e-10, atol=1e-10)


def test_gradients_of_the_mean_log_ratio_reach_the_turn_s_tokens_alone():
    log_ratio = doubles([[1, 3, NAN, 5, 0], [7, 9, 9, 9, 9]]).requires_grad_()
    turn_mean_log_ratio(log_ratio, TURN_IDS)[0, 0].backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == [[0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 0]]
