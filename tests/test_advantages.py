"""Advantages: hand-computed values, and exactness against an enumerable decision process.

The process is small enough to list every trajectory and every group of them, so the expectation of
an estimator is a sum, not a sample: unbiased means equal to the gradient to rounding.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from agentr1.advantages import (
    batch_whitened,
    combine,
    group_baseline_whitened,
    group_mean,
    group_standardised,
    leave_one_out,
    place_turns,
    returns_to_go,
    turn_leave_one_out,
)

NAN = float("nan")
ESTIMATORS = [
    group_mean,
    group_standardised,
    leave_one_out,
    batch_whitened,
    group_baseline_whitened,
]


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


def test_batch_whitened_ignores_groups():
    # mean 2, squares 4 + 0 + 0 + 4 over 3.
    rewards = doubles([0, 2, 2, 4])
    expected = doubles([-2, 0, 0, 2]) / ((8 / 3) ** 0.5 + 1e-4)
    torch.testing.assert_close(batch_whitened(rewards, 2), expected)
    torch.testing.assert_close(batch_whitened(rewards), expected)


def test_group_baseline_whitened_divides_by_the_deviation_of_the_centred_rewards():
    # Centred: -1, 1, -3, 3; squares 20 over 3. The raw rewards' deviation is far larger.
    result = group_baseline_whitened(doubles([0, 2, 100, 106]), 2)
    torch.testing.assert_close(result, doubles([-1, 1, -3, 3]) / ((20 / 3) ** 0.5 + 1e-4))


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


TURN_IDS = torch.tensor([[0, 0, -1, 1, -1], [0, -1, -1, -1, -1]])


def test_place_turns_by_hand():
    placed = place_turns(doubles([[1, 2], [3, NAN]]), TURN_IDS)
    assert placed.tolist() == [[1, 1, 0, 2, 0], [3, 0, 0, 0, 0]]


def test_place_turns_refuses_a_turn_without_a_value():
    with pytest.raises(ValueError, match="turn_ids go up to 1, but there are values for 1 turns"):
        place_turns(doubles([[1], [3]]), TURN_IDS)


def test_combine_by_hand():
    both = combine(doubles([10, 20]), doubles([[1, 2], [3, 0]]), TURN_IDS)
    assert both.tolist() == [[11, 11, 0, 12, 0], [23, 0, 0, 0, 0]]
    alone = combine(doubles([10, 20]), None, TURN_IDS)
    assert alone.tolist() == [[10, 10, 0, 10, 0], [20, 0, 0, 0, 0]]


def test_combine_is_zero_off_the_policy_tokens_even_for_values_that_are_no_numbers():
    both = combine(doubles([NAN, 1]), doubles([[NAN, NAN], [1, NAN]]), TURN_IDS)
    assert both[TURN_IDS == -1].tolist() == [0.0] * 6
    assert both[1, 0] == 2


# Exactness: a decision process whose policy chooses when to stop


class Process(NamedTuple):
    """Every trajectory of the process, N of them, under one policy.

    A turn is one token "stop", or "go" followed by "left" or "right"; then comes one observation
    token. At most three turns, so N = 1 + 2 (1 + 2 * 3) = 15. The policy has its own logits after
    every history and for every token.
    """

    probabilities: Tensor  # (N,)
    scores: Tensor  # (N, T, P): gradient of each sampled token's log-probability, 0 elsewhere
    turn_ids: Tensor  # (N, T)
    process_rewards: Tensor  # (N, K), NaN at absent turns
    turn_counts: Tensor  # (N,)
    outcomes: Tensor  # (N,)
    outcome_gradient: Tensor  # (P,) of the expected outcome reward, by autograd
    process_gradient: Tensor  # (P,) of the expected sum of process rewards, by autograd


MAX_TURNS = 3
TURN_TOKENS = 3  # go, left or right, observation


def histories() -> list[tuple[str, ...]]:
    """All trajectories as the moves of their turns: L or R, S last unless the turns run out."""
    ended = [
        (*moves, "S")
        for length in range(MAX_TURNS)
        for moves in itertools.product("LR", repeat=length)
    ]
    return ended + list(itertools.product("LR", repeat=MAX_TURNS))


def decision_process(seed: int = 0) -> Process:
    generator = torch.Generator().manual_seed(seed)
    trajectories = histories()
    states = sorted({t[:k] for t in trajectories for k in range(len(t))})
    logits = torch.randn(len(states), 2, 2, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    log_policy = logits.log_softmax(-1)  # [state, token of the turn, choice]

    shape = (len(trajectories), MAX_TURNS * TURN_TOKENS)
    turn_ids = torch.full(shape, -1)
    token_logprobs: dict[tuple[int, int], Tensor] = {}
    for n, moves in enumerate(trajectories):
        for k, move in enumerate(moves):
            state, place = states.index(moves[:k]), k * TURN_TOKENS
            token_logprobs[n, place] = log_policy[state, 0, int(move != "S")]
            if move != "S":
                token_logprobs[n, place + 1] = log_policy[state, 1, int(move == "R")]
    scores = torch.zeros(*shape, logits.numel(), dtype=torch.float64)
    for (n, place), logprob in token_logprobs.items():
        turn_ids[n, place] = place // TURN_TOKENS
        (gradient,) = torch.autograd.grad(logprob, logits, retain_graph=True)
        scores[n, place] = gradient.flatten()

    counts = torch.tensor([len(moves) for moves in trajectories])
    # A turn's reward depends on the history up to it and on nothing later, or no return-to-go would
    # be right. All are far from 0 and of one sign, so that staying alive matters.
    pasts = sorted({t[: k + 1] for t in trajectories for k in range(len(t))})
    sums = 1 + torch.rand(len(pasts), generator=generator, dtype=torch.float64)
    paid = dict(zip(pasts, sums.tolist(), strict=True))
    process = torch.full((len(trajectories), MAX_TURNS), NAN, dtype=torch.float64)
    for n, moves in enumerate(trajectories):
        process[n, : len(moves)] = doubles([paid[moves[: k + 1]] for k in range(len(moves))])
    outcomes = torch.randn(len(trajectories), generator=generator, dtype=torch.float64)

    log_probabilities = torch.stack(
        [
            torch.stack([v for (m, _), v in token_logprobs.items() if m == n]).sum()
            for n in range(len(trajectories))
        ]
    )
    probabilities = log_probabilities.exp()
    gradients = [
        torch.autograd.grad(probabilities @ value, logits, retain_graph=True)[0].flatten()
        for value in (outcomes, process.nansum(dim=1))
    ]
    return Process(probabilities.detach(), scores, turn_ids, process, counts, outcomes, *gradients)


def expected_gradient(process: Process, group_size: int, advantages_of) -> Tensor:
    """Expectation of the estimator over all groups: sum of p(group) * mean of A * score.

    Args:
        process: every trajectory of the decision process.
        group_size: G.
        advantages_of: `(outcomes (B,), process rewards (B, K), turn counts (B,), turn ids (B, T))`
            to advantages (B, T), on the batch of all groups.
    """
    members = range(len(process.probabilities))
    groups = torch.tensor(list(itertools.product(members, repeat=group_size)))  # (M, G)
    rows = groups.flatten()
    advantages = advantages_of(
        process.outcomes[rows],
        process.process_rewards[rows],
        process.turn_counts[rows],
        process.turn_ids[rows],
    )  # (M * G, T)
    weights = process.probabilities[groups].prod(dim=1)  # (M,)
    per_row = weights.repeat_interleave(group_size)[:, None] * advantages / group_size
    per_trajectory = torch.zeros_like(process.scores[:, :, 0]).index_add_(0, rows, per_row)
    return torch.einsum("nt,ntp->p", per_trajectory, process.scores)


def error(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).abs().max())


def cosine(estimate: Tensor, exact: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(estimate, exact, dim=0))


def turn_level(group_size: int):
    def advantages_of(outcomes, process, counts, turn_ids):
        credit = turn_leave_one_out(process, counts, group_size)
        return combine(torch.zeros_like(outcomes), credit, turn_ids)

    return advantages_of


def outcome_level(estimator, group_size: int):
    return lambda outcomes, process, counts, turn_ids: combine(
        estimator(outcomes, group_size), None, turn_ids
    )


@pytest.fixture(scope="module")
def process() -> Process:
    return decision_process()


def test_the_process_is_a_process(process):
    assert len(process.probabilities) == 15
    assert process.probabilities.sum().item() == pytest.approx(1, abs=1e-14)
    # Two ways to the same gradient: autograd, and the sum of p * return * score.
    returns = process.outcomes * process.probabilities
    by_scores = torch.einsum("n,ntp->p", returns, process.scores)
    assert error(by_scores, process.outcome_gradient) < 1e-14


@pytest.mark.parametrize("group_size", [2, 3])
def test_leave_one_out_is_unbiased(process, group_size):
    estimate = expected_gradient(process, group_size, outcome_level(leave_one_out, group_size))
    assert error(estimate, process.outcome_gradient) < 1e-10


@pytest.mark.parametrize("group_size", [2, 3])
def test_turn_leave_one_out_is_unbiased(process, group_size):
    estimate = expected_gradient(process, group_size, turn_level(group_size))
    assert error(estimate, process.process_gradient) < 1e-10


@pytest.mark.parametrize("group_size", [2, 3])
def test_outcome_and_turn_credit_together_are_unbiased(process, group_size):
    def both(outcomes, rewards, counts, turn_ids):
        credit = turn_leave_one_out(rewards, counts, group_size)
        return combine(leave_one_out(outcomes, group_size), credit, turn_ids)

    estimate = expected_gradient(process, group_size, both)
    exact = process.outcome_gradient + process.process_gradient
    assert error(estimate, exact) < 1e-10


@pytest.mark.parametrize("group_size", [2, 3])
def test_group_mean_is_unbiased_up_to_its_constant(process, group_size):
    estimate = expected_gradient(process, group_size, outcome_level(group_mean, group_size))
    constant = (group_size - 1) / group_size
    assert error(estimate, constant * process.outcome_gradient) < 1e-10
    assert error(estimate, process.outcome_gradient) > 1e-3


def test_dividing_by_the_group_deviation_changes_the_direction(process):
    estimate = expected_gradient(process, 3, outcome_level(group_standardised, 3))
    assert cosine(estimate, process.outcome_gradient) < 0.999


@pytest.mark.parametrize("group_size", [2, 3])
def test_the_trap_fails_the_same_test(process, group_size):
    """Centre each turn's reward over the rollouts that reached it, then sum to the end."""

    def trap(outcomes, rewards, counts, turn_ids):
        grouped = rewards.view(-1, group_size, MAX_TURNS)
        centred = (grouped - grouped.nanmean(dim=1, keepdim=True)).flatten(0, 1)
        return combine(torch.zeros_like(outcomes), returns_to_go(centred, counts, 1.0), turn_ids)

    estimate = expected_gradient(process, group_size, trap)
    assert error(estimate, process.process_gradient) > 1e-2
    # No constant saves it either: the direction is wrong.
    assert cosine(estimate, process.process_gradient) < 0.95
