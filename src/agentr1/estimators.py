"""The estimators without a critic: what a batch was paid, made into one advantage per turn.

Layer 1: tensors in, tensors out; the parts are those of `advantages.py`. Knows no model, config or
process. `algorithms.py` names one of these functions per algorithm, the trainer calls it on the
*global* batch. All give (B, K), exactly 0 at absent turns.

Here outcome and process rewards meet. They are added, never scaled against each other: the weight
between them is part of the rewards. The outcome counts for every turn of its trajectory and is
compared over all trajectories; it is not discounted (except where GiGPO compares states). A
trajectory without an outcome reward has an outcome part of 0. What "unbiased" means, and what is
done about rows that have nothing to compare with, says `advantages.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from agentr1.advantages import (
    STD_EPSILON,
    TurnRewards,
    batch_deviation,
    greedy_baseline,
    group_mean,
    group_standardised,
    leave_one_out,
    present_turns,
    process_returns,
    refuse_non_finite,
    returns_to_go,
    scored_outcome,
    total_returns,
    turn_leave_one_out,
    with_outcome,
)


def group_relative(outcome_advantages: Tensor, rewards: TurnRewards) -> Tensor:
    """An outcome advantage made elsewhere, by TRL, plus return to go minus the group's mean of it.

    A_{i,k} = A_i + R_{i,k} - mean_j R_{j,k} over the G of the group, R_{j,k} = 0 where j had ended
    before turn k. Beside an outcome minus its group's mean (Dr. GRPO) unbiased up to (G - 1) / G,
    the constant of both parts; beside one divided by a deviation (GRPO) biased, as that is.

    Args:
        outcome_advantages: (B,).
        rewards: of the same B.
    """
    process = group_mean(process_returns(rewards), rewards.group_size)  # (B, K)
    return _at_turns(rewards, outcome_advantages.unsqueeze(1) + process)


def rloo(rewards: TurnRewards) -> Tensor:
    """Total return minus the mean total return of the others of the group.

    A_{i,k} = S_i - sum_{j != i} S_j / (G - 1), S = outcome + all process rewards, discounted per
    turn: one reward per trajectory, as the paper has it. Unbiased, with more variance than
    `turn_loo`: a turn is also credited with what was paid before it. RLOO (arXiv 2402.14740).
    """
    outcome = leave_one_out(total_returns(rewards), rewards.group_size)  # (B,)
    return _at_turns(rewards, outcome.unsqueeze(1))


def turn_loo(rewards: TurnRewards) -> Tensor:
    """Outcome plus return to go, minus the same of the others of the group.

    A_{i,k} = (o_i - mean_{j != i} o_j) + (R_{i,k} - sum_{j != i} R_{j,k} / (G - 1)), R_{j,k} = 0
    where j had ended before turn k. Unbiased although the policy decides when to stop, because
    every trajectory but i is in the baseline of i at every turn; see `turn_leave_one_out`. Without
    process rewards exactly RLOO (arXiv 2402.14740).
    """
    outcome = leave_one_out(rewards.outcome, rewards.group_size)  # (B,)
    process = turn_leave_one_out(
        rewards.process, rewards.turn_counts, rewards.group_size, rewards.discount
    )  # (B, K)
    return _at_turns(rewards, outcome.unsqueeze(1) + process)


def reinforce_pp(rewards: TurnRewards) -> Tensor:
    """Outcome plus return to go, centred over the batch at each turn, by the batch's deviation.

    A'_{i,k} = o_i - mean_j o_j + R_{i,k} - mean_j R_{j,k}, means over all B, R = 0 at absent turns;
    A = A' / (s + eps), s^2 = sum_i mean_k A'^2_{i,k} / (B - 1), the inner mean over the turns of i.
    Biased: s depends on the row's own reward (A' is unbiased up to (B - 1) / B). Without process
    rewards s is the standard deviation of the outcomes. REINFORCE++ (arXiv 2501.03262), with
    statistics in which every trajectory counts once, however many tokens it has, and the KL penalty
    left to the loss.
    """
    whole = max(len(rewards.outcome), 1)
    outcome = group_mean(rewards.outcome, whole)  # (B,)
    process = group_mean(process_returns(rewards), whole)  # (B, K)
    return _over_deviation(rewards, outcome.unsqueeze(1) + process)


def reinforce_pp_baseline(rewards: TurnRewards) -> Tensor:
    """Outcome plus return to go, centred over the group at each turn, by the batch's deviation.

    A' as in `reinforce_pp`, but with means over the G of the group; A = A' / (s + eps) with s over
    the batch as there. Biased: s depends on the row's own reward (A' is unbiased up to
    (G - 1) / G). Without process rewards s is the standard deviation of the o_i - mean_group o.
    REINFORCE++ with baseline (arXiv 2501.03262).
    """
    outcome = group_mean(rewards.outcome, rewards.group_size)  # (B,)
    process = group_mean(process_returns(rewards), rewards.group_size)  # (B, K)
    return _over_deviation(rewards, outcome.unsqueeze(1) + process)


def remax(rewards: TurnRewards) -> Tensor:
    """Outcome plus return to go, minus the same of the group's first row, sampled greedily.

    A_{i,k} = (o_i - o_greedy) + (R_{i,k} - R_{greedy,k}), R = 0 at absent turns, and 0 for the
    greedy row itself. Unbiased up to (G - 1) / G, the share of rows that are samples: the greedy
    row depends on nothing that the others did. ReMax (arXiv 2310.10505).
    """
    outcome = greedy_baseline(rewards.outcome, rewards.group_size)  # (B,)
    process = greedy_baseline(process_returns(rewards), rewards.group_size)  # (B, K)
    return _at_turns(rewards, outcome.unsqueeze(1) + process)


def gigpo(
    rewards: TurnRewards, *, anchor_weight: float = 1.0, scale: Literal["none", "std"] = "none"
) -> Tensor:
    """Total return against the group's, plus each turn's return against those from equal states.

    A_{i,k} = A^E_i + anchor_weight * A^S_{i,k}. A^E_i = (S_i - mean_group S) / F over total
    returns without discount; A^S_{i,k} = (Q_{i,k} - mean Q) / F over all turns of the group taken
    from the state of (i, k), Q the discounted return to go with the outcome paid at the last turn.
    F is 1 ("none", the default of the authors' code) or the deviation of the same numbers ("std").
    A state that was met once gives 0. GiGPO (arXiv 2505.10978).

    A^E is unbiased up to (G - 1) / G with F = 1. The whole is biased: the mean over a state holds
    the turn itself, one of a random number n, so each state counts by the expectation of
    (n - 1) / n; and a state met twice in one episode holds returns that depend on the action.

    Args:
        rewards: with anchors.
        anchor_weight: of the comparison of states beside that of episodes.
        scale: F.
    """
    compare = group_mean if scale == "none" else group_standardised
    totals = total_returns(dataclasses.replace(rewards, discount=1.0))  # (B,)
    episodes = compare(totals, rewards.group_size).unsqueeze(1)  # (B, 1)
    return _at_turns(rewards, episodes + anchor_weight * _from_equal_states(rewards, scale))


def mt_grpo(rewards: TurnRewards) -> Tensor:
    """Standardised outcome plus the sum to go of standardised process rewards.

    A_{i,k} = std(o)_i + sum_{l >= k} discount^(l - k) std(r_l)_i, where std(.) subtracts the mean
    and divides by deviation + eps: of the outcome over the group, of the process rewards of turn l
    over those trajectories of the group that reached it. MT-GRPO (arXiv 2505.11821), whose turns
    are fixed in number, carried over to any number.

    Biased, and not only in scale where the policy decides when to stop: rewards are centred over
    the survivors of a turn and then summed, so a turn that is worse than other survivors' but worth
    having reached is punished. `turn_loo` is the remedy.
    """
    present = present_turns(rewards.process, rewards.turn_counts)  # (B, K)
    refuse_non_finite(rewards.process, rewards.turn_counts)
    reached = rewards.process.masked_fill(~present, torch.nan)  # (B, K)
    turns = group_standardised(reached, rewards.group_size)  # (B, K)
    process = returns_to_go(turns, rewards.turn_counts, rewards.discount)  # (B, K)
    outcome = group_standardised(rewards.outcome, rewards.group_size)  # (B,)
    return _at_turns(rewards, outcome.unsqueeze(1) + process)


def _at_turns(rewards: TurnRewards, advantages: Tensor) -> Tensor:
    """(B, K) or (B, 1) -> (B, K), exactly 0 at absent turns."""
    present = present_turns(rewards.process, rewards.turn_counts)  # (B, K)
    return torch.where(present, advantages, 0.0)


def _over_deviation(rewards: TurnRewards, centred: Tensor) -> Tensor:
    """Centred credit (B, K) divided by its deviation over the batch.

    Taken over every turn: totals may agree where turns differ, and nothing would bound the quotient
    by a deviation of totals.
    """
    first = centred[:, 0].square()  # (B,)
    # As a difference, so that turns that agree leave the first one's square to the last bit.
    others = _at_turns(rewards, centred.square() - first.unsqueeze(1))  # (B, K)
    squares = first + others.sum(dim=1) / rewards.turn_counts  # (B,)
    silent = scored_outcome(rewards).isnan()  # (B,)
    deviation = batch_deviation(squares.masked_fill(silent, torch.nan))  # ()
    return _at_turns(rewards, (centred / deviation).nan_to_num(nan=0.0))


def _from_equal_states(rewards: TurnRewards, scale: str) -> Tensor:
    """GiGPO's A^S, (B, K)."""
    anchors = rewards.anchors
    if anchors is None:
        raise ValueError(
            "gigpo compares turns taken from equal states, got rewards without anchors; pass "
            "TurnRewards.anchors, (B, K), -1 for a state that is compared with no other"
        )
    paid = with_outcome(rewards, scored_outcome(rewards))  # (B, K)
    returns = returns_to_go(paid, rewards.turn_counts, rewards.discount)  # (B, K)
    present = present_turns(rewards.process, rewards.turn_counts)  # (B, K)
    compared = present & (anchors >= 0) & ~returns.isnan()  # (B, K)
    groups = torch.arange(len(anchors), device=anchors.device) // rewards.group_size  # (B,)
    pairs = torch.stack([groups.unsqueeze(1).expand_as(anchors), anchors], dim=-1)  # (B, K, 2)
    states, state = pairs[compared].unique(dim=0, return_inverse=True)  # (S, 2), (N,)
    met = returns[compared]  # (N,)
    empty = met.new_zeros(len(states))  # (S,)
    counts = empty.index_add(0, state, torch.ones_like(met))  # (S,)
    centred = met - (empty.index_add(0, state, met) / counts)[state]  # (N,)
    if scale == "std":
        squares = empty.index_add(0, state, centred.square())  # (S,)
        centred = centred / ((squares / (counts - 1)).sqrt() + STD_EPSILON)[state]  # (N,)
    placed = torch.zeros_like(returns)  # (B, K)
    placed[compared] = centred.nan_to_num(nan=0.0)
    return placed
