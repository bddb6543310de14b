"""Credit: from rewards to one advantage per trained token.

Layer 1: tensors in, tensors out, nothing of the package but one constant. Nothing here knows a
model, a config, a row or a process; the trainer calls these functions on the *global* batch, whose
rows stand in contiguous groups of one prompt. Capital letters are B trajectories (or segments),
G per group, K turns, T completion tokens.

An outcome reward of NaN means "no reward function had an opinion", as in TRL: the row is left out
of every mean and deviation and its own advantage is 0. A row or group without anything to compare
with (one scored row, a group of one in evaluation) gets 0, also as in TRL.

"Unbiased" means: the expected sum of advantage times score is the gradient of the expected reward
(times the stated constant) when every sampled token counts alike, so at discount 1 and under a
loss normaliser that does not depend on the sampled lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentr1.types import OBSERVATION_TURN

STD_EPSILON = 1e-4
"""Added to every standard deviation; TRL's value, so that a silent group stays silent."""


def group_mean(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the group's mean, unscaled.

    A_i = r_i - mean(r_1..r_G). Unbiased up to the constant (G - 1) / G, because the mean holds
    the row itself. GRPO without its deviation, Dr. GRPO (arXiv 2503.20783).
    """
    grouped = _grouped(rewards, group_size)  # (B/G, G)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)  # (B/G, G)
    return centred.nan_to_num(nan=0.0).flatten()  # (B,)


def group_standardised(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the group's mean, divided by the group's standard deviation.

    A_i = (r_i - mean) / (std + eps), std with ddof 1 as in TRL. GRPO, DeepSeekMath
    (arXiv 2402.03300). The deviation depends on the row's own reward: not unbiased.
    """
    grouped = _grouped(rewards, group_size)  # (B/G, G)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)  # (B/G, G)
    scaled = centred / (_nan_std(grouped) + STD_EPSILON)  # (B/G, G)
    return scaled.nan_to_num(nan=0.0).flatten()  # (B,)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the mean of the *other* rewards of the group.

    A_i = r_i - sum_{j != i} r_j / (G - 1). Unbiased. RLOO (arXiv 2402.14740).
    """
    grouped = _grouped(rewards, group_size)  # (B/G, G)
    siblings = (~grouped.isnan()).sum(dim=1, keepdim=True) - 1  # (B/G, 1)
    baseline = (grouped.nansum(dim=1, keepdim=True) - grouped) / siblings  # (B/G, G)
    return (grouped - baseline).nan_to_num(nan=0.0).flatten()  # (B,)


def batch_whitened(rewards: Tensor, group_size: int = 1) -> Tensor:
    """Reward minus the mean of the whole batch, divided by its standard deviation.

    A_i = (r_i - mean(r_1..r_B)) / (std(r_1..r_B) + eps). REINFORCE++ (arXiv 2501.03262), with
    statistics over trajectories: each one counts once, however many tokens it has.

    Args:
        rewards: (B,).
        group_size: not needed, the batch is one group; checked all the same, so that every
            outcome estimator is called alike.
    """
    _grouped(rewards, group_size)
    return group_standardised(rewards, max(len(rewards), 1))  # (B,)


def group_baseline_whitened(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the group's mean, divided by the batch's deviation of that difference.

    A'_i = r_i - mean(group);  A_i = A'_i / (std(A'_1..A'_B) + eps). REINFORCE++ with baseline
    (arXiv 2501.03262).
    """
    grouped = _grouped(rewards, group_size)  # (B/G, G)
    centred = (grouped - grouped.nanmean(dim=1, keepdim=True)).view(1, -1)  # (1, B)
    scaled = centred / (_nan_std(centred) + STD_EPSILON)  # (1, B)
    return scaled.nan_to_num(nan=0.0).flatten()  # (B,)


def returns_to_go(rewards: Tensor, turn_counts: Tensor, discount: float) -> Tensor:
    """Sum of this and all later process rewards, discounted per turn.

    R_k = r_k + discount * R_{k+1}; whatever `rewards` holds at absent turns is ignored and the
    result there is 0.

    Args:
        rewards: (B, K), rows shorter than K padded with anything.
        turn_counts: (B,), turns each trajectory really has.
        discount: factor per turn, never per token.
    """
    present = _present(rewards, turn_counts)  # (B, K)
    returns = torch.where(present, rewards, 0.0)  # (B, K)
    for turn in range(rewards.shape[1] - 2, -1, -1):
        returns[:, turn] += discount * returns[:, turn + 1]
    return returns


def turn_leave_one_out(
    process_rewards: Tensor, turn_counts: Tensor, group_size: int, discount: float = 1.0
) -> Tensor:
    """Return-to-go of each turn minus the siblings' mean return-to-go at the same turn index.

    A_{i,k} = R_{i,k} - sum_{j != i} R_{j,k} / (G - 1), with R_{j,k} = 0 where trajectory j had
    ended before turn k, and A_{i,k} = 0 where i itself had. Not divided by any deviation.

    Unbiased at discount 1 although the policy decides when to stop: the baseline of a trajectory
    is made of other trajectories only, all of them at every turn. Averaging over the survivors of
    a turn instead, and summing afterwards, pays a hidden bonus for staying alive.

    Args:
        process_rewards: (B, K), rows shorter than K padded with anything.
        turn_counts: (B,), turns each trajectory really has.
        group_size: G; with G = 1 there are no siblings and the result is 0.
        discount: factor per turn, never per token.
    """
    _refuse_non_finite(process_rewards, turn_counts)
    returns = returns_to_go(process_rewards, turn_counts, discount)  # (B, K)
    grouped = _grouped(returns, group_size)  # (B/G, G, K)
    baseline = (grouped.sum(dim=1, keepdim=True) - grouped) / (group_size - 1)  # (B/G, G, K)
    advantages = (grouped - baseline).nan_to_num(nan=0.0).flatten(0, 1)  # (B, K)
    return torch.where(_present(process_rewards, turn_counts), advantages, 0.0)


def place_turns(turn_values: Tensor, turn_ids: Tensor) -> Tensor:
    """Give every sampled token the value of its turn, and exactly 0 to all others.

    Args:
        turn_values: (B, K).
        turn_ids: (B, T), index of the turn that sampled the token, -1 on observations and padding.
    """
    if turn_ids.numel() and int(turn_ids.max()) >= turn_values.shape[1]:
        raise ValueError(
            f"turn_ids go up to {int(turn_ids.max())}, but there are values for "
            f"{turn_values.shape[1]} turns; pass one value for every turn of the longest trajectory"
        )
    placed = turn_values.gather(1, turn_ids.clamp(min=0))  # (B, T)
    return torch.where(turn_ids != OBSERVATION_TURN, placed, 0.0)  # (B, T)


def combine(outcome: Tensor, process: Tensor | None, turn_ids: Tensor) -> Tensor:
    """Outcome advantage plus the turn's process advantage on every sampled token.

    The one function where outcome and process rewards meet. They are added, never scaled against
    each other: the weight between them is part of the rewards. A sum of unbiased estimators is
    unbiased. Exactly 0 where `turn_ids` is -1, whatever the inputs hold.

    Args:
        outcome: (B,), one advantage per trajectory.
        process: (B, K), one advantage per turn, or None.
        turn_ids: (B, T), index of the turn that sampled the token, -1 on observations and padding.
    """
    advantages = outcome.unsqueeze(1).expand(turn_ids.shape)  # (B, T)
    if process is not None:
        advantages = advantages + place_turns(process, turn_ids)  # (B, T)
    return torch.where(turn_ids != OBSERVATION_TURN, advantages, 0.0)  # (B, T)


def _grouped(values: Tensor, group_size: int) -> Tensor:
    """(B, ...) -> (B/G, G, ...); refuses a batch that does not fall into whole groups."""
    if group_size < 1 or len(values) % group_size:
        raise ValueError(
            f"{len(values)} rows do not fall into groups of {group_size}; pass the gathered global "
            "batch, whose size is a multiple of num_generations"
        )
    if values.isinf().any():
        rows = values.isinf().nonzero()[:, 0].unique().tolist()
        raise ValueError(
            f"rewards must be finite (or NaN for no opinion), got an infinite one in rows {rows}; "
            "bound the reward function"
        )
    return values.reshape(-1, group_size, *values.shape[1:])


def _nan_std(values: Tensor) -> Tensor:
    """Standard deviation over dim 1 with ddof 1, NaN left out; NaN for fewer than two values."""
    count = (~values.isnan()).sum(dim=1, keepdim=True)  # (N, 1)
    squares = (values - values.nanmean(dim=1, keepdim=True)) ** 2  # (N, M)
    return (squares.nansum(dim=1, keepdim=True) / (count - 1)).sqrt()  # (N, 1)


def _present(values: Tensor, turn_counts: Tensor) -> Tensor:
    """(B, K) mask of the turns that took place."""
    turns = torch.arange(values.shape[1], device=values.device)  # (K,)
    return turns < turn_counts.unsqueeze(1)  # (B, K)


def _refuse_non_finite(process_rewards: Tensor, turn_counts: Tensor) -> None:
    """A process reward that is no number would spread to the whole group: name it instead."""
    bad = ~process_rewards.isfinite() & _present(process_rewards, turn_counts)  # (B, K)
    if bad.any():
        row, turn = bad.nonzero()[0].tolist()
        raise ValueError(
            f"process rewards must be finite, got {process_rewards[row, turn].item()} in row {row} "
            f"at turn {turn}; return 0.0 from the environment where a turn earns nothing"
        )
