"""The parts of credit: rewards, baselines, returns to go, and the way onto the tokens.

Layer 1: tensors in, tensors out, nothing of the package but one constant. Nothing here knows a
model, a config, a row or a process; `estimators.py` makes the algorithms of these parts, and the
trainer calls those on the *global* batch, whose trajectories stand in contiguous groups of one
prompt. Capital letters are B trajectories, G per group, K turns, R training rows (a trajectory has
several where its context was rewritten), T completion tokens.

An outcome reward of NaN means "no reward function had an opinion", as in TRL: the row is left out
of every mean and deviation and its own advantage is 0. A row or group without anything to compare
with (one scored row, a group of one in evaluation) gets 0, also as in TRL. A process reward that is
no finite number is an error.

"Unbiased" means: the expected sum of advantage times score is the gradient of the expected reward
(times the stated constant) when every sampled token counts alike, so at discount 1 and under a
loss normaliser that does not depend on the sampled lengths.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from agentr1.types import OBSERVATION_TURN

STD_EPSILON = 1e-4
"""Added to every standard deviation; TRL's value, so that a silent group stays silent."""


@dataclasses.dataclass(frozen=True, slots=True)
class TurnRewards:
    """What the trajectories of a global batch were paid.

    Attributes:
        outcome: (B,), once per trajectory; NaN means no reward function had an opinion.
        process: (B, K), per turn; rows shorter than K padded with anything.
        turn_counts: (B,), turns each trajectory really has.
        group_size: G; the rows of a group stand together.
        discount: factor per turn, never per token.
        anchors: (B, K), equal numbers within a group mark turns taken from equal states, -1 a
            state that is compared with no other; None where the algorithm compares no states.
    """

    outcome: Tensor
    process: Tensor
    turn_counts: Tensor
    group_size: int
    discount: float = 1.0
    anchors: Tensor | None = None


def group_mean(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the group's mean, unscaled.

    A_i = r_i - mean(r_1..r_G). Unbiased up to the constant (G - 1) / G, because the mean holds
    the row itself. GRPO without its deviation, Dr. GRPO (arXiv 2503.20783).

    Args:
        rewards: (B,) or (B, K); every column by itself.
        group_size: G.
    """
    return _centred(rewards, group_size).nan_to_num(nan=0.0)  # (B, ...)


def group_standardised(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the group's mean, divided by the group's standard deviation.

    A_i = (r_i - mean) / (std + eps), std with ddof 1 as in TRL. GRPO, DeepSeekMath
    (arXiv 2402.03300). The deviation depends on the row's own reward: not unbiased.

    Args:
        rewards: (B,) or (B, K); every column by itself.
        group_size: G.
    """
    grouped = _grouped(rewards, group_size)  # (B/G, G, ...)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)  # (B/G, G, ...)
    scaled = centred / (_nan_std(grouped) + STD_EPSILON)  # (B/G, G, ...)
    return scaled.nan_to_num(nan=0.0).flatten(0, 1)  # (B, ...)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the mean of the *other* rewards of the group.

    A_i = r_i - sum_{j != i} r_j / (G - 1). Unbiased. RLOO (arXiv 2402.14740).

    Args:
        rewards: (B,) or (B, K); every column by itself.
        group_size: G; with G = 1 there are no others and the result is 0.
    """
    grouped = _grouped(rewards, group_size)  # (B/G, G, ...)
    siblings = (~grouped.isnan()).sum(dim=1, keepdim=True) - 1  # (B/G, 1, ...)
    baseline = (grouped.nansum(dim=1, keepdim=True) - grouped) / siblings  # (B/G, G, ...)
    return (grouped - baseline).nan_to_num(nan=0.0).flatten(0, 1)  # (B, ...)


def greedy_baseline(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus that of the group's first row, which was sampled greedily.

    A_i = r_i - r_greedy, and 0 for the greedy row itself. Unbiased up to the constant
    (G - 1) / G, the share of rows that are samples. ReMax (arXiv 2310.10505).

    Args:
        rewards: (B,) or (B, K); every column by itself.
        group_size: G, the greedy row included.
    """
    grouped = _grouped(rewards, group_size)  # (B/G, G, ...)
    return (grouped - grouped[:, :1]).nan_to_num(nan=0.0).flatten(0, 1)  # (B, ...)


def batch_deviation(squares: Tensor) -> Tensor:
    """Standard deviation over the batch plus epsilon, (); not finite for fewer than two rows.

    Args:
        squares: (B,), of what has been centred; NaN where a row is left out.
    """
    return (squares.nansum() / ((~squares.isnan()).sum() - 1)).sqrt() + STD_EPSILON


def returns_to_go(rewards: Tensor, turn_counts: Tensor, discount: float) -> Tensor:
    """Sum of this and all later process rewards, discounted per turn.

    R_k = r_k + discount * R_{k+1}; whatever `rewards` holds at absent turns is ignored and the
    result there is 0.

    Args:
        rewards: (B, K), rows shorter than K padded with anything.
        turn_counts: (B,), turns each trajectory really has.
        discount: factor per turn, never per token.
    """
    returns = torch.where(present_turns(rewards, turn_counts), rewards, 0.0)  # (B, K)
    for turn in range(rewards.shape[1] - 2, -1, -1):
        returns[:, turn] += discount * returns[:, turn + 1]
    return returns


def process_returns(rewards: TurnRewards) -> Tensor:
    """Return to go of the process rewards at every turn, (B, K), 0 at absent turns.

    Raises:
        ValueError: a process reward that is no finite number; it would spread to the group.
    """
    refuse_non_finite(rewards.process, rewards.turn_counts)
    return returns_to_go(rewards.process, rewards.turn_counts, rewards.discount)


def scored_outcome(rewards: TurnRewards) -> Tensor:
    """The outcome, (B,), counted as 0 where only turns were paid; NaN where nothing was."""
    present = present_turns(rewards.process, rewards.turn_counts)  # (B, K)
    paid = ((rewards.process != 0) & present).any(dim=1)  # (B,)
    return rewards.outcome.masked_fill(rewards.outcome.isnan() & paid, 0.0)


def total_returns(rewards: TurnRewards) -> Tensor:
    """Everything an episode was paid as one number, (B,): outcome + process return of turn 0.

    See `scored_outcome` for episodes without an outcome reward. The outcome is not discounted.
    """
    return scored_outcome(rewards) + process_returns(rewards)[:, 0]


def prime_scaled(process_rewards: Tensor, turn_counts: Tensor, discount: float = 1.0) -> Tensor:
    """Process rewards divided by the largest absolute return to go of the whole batch.

    r'_{i,k} = r_{i,k} / max_{j,l} |R_{j,l}|, so that every return to go lies in [-1, 1]. Agent-R1's
    first code, there called prime norm. The divisor depends on the row's own rewards: what follows
    is not unbiased, but within a batch only the scale changes. A silent batch stays as it is.

    Args:
        process_rewards: (B, K), rows shorter than K padded with anything.
        turn_counts: (B,), turns each trajectory really has.
        discount: factor per turn, never per token.
    """
    refuse_non_finite(process_rewards, turn_counts)
    largest = returns_to_go(process_rewards, turn_counts, discount).abs().max()  # ()
    present = present_turns(process_rewards, turn_counts)  # (B, K)
    scaled = process_rewards / torch.where(largest > 0, largest, 1.0)  # (B, K)
    return torch.where(present, scaled, 0.0)


def turn_leave_one_out(
    process_rewards: Tensor, turn_counts: Tensor, group_size: int, discount: float = 1.0
) -> Tensor:
    """Return to go of each turn minus the siblings' mean return to go at the same turn index.

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
    refuse_non_finite(process_rewards, turn_counts)
    returns = returns_to_go(process_rewards, turn_counts, discount)  # (B, K)
    advantages = leave_one_out(returns, group_size)  # (B, K)
    return torch.where(present_turns(process_rewards, turn_counts), advantages, 0.0)


def place_turns(turn_values: Tensor, turn_ids: Tensor) -> Tensor:
    """Give every sampled token the value of its turn, and exactly 0 to all others.

    Args:
        turn_values: (R, K).
        turn_ids: (R, T), index of the turn that sampled the token, -1 on observations and padding.
    """
    if turn_ids.numel() and int(turn_ids.max()) >= turn_values.shape[1]:
        raise ValueError(
            f"turn_ids go up to {int(turn_ids.max())}, but there are values for "
            f"{turn_values.shape[1]} turns; pass one value for every turn of the longest trajectory"
        )
    placed = turn_values.gather(1, turn_ids.clamp(min=0))  # (R, T)
    return torch.where(turn_ids != OBSERVATION_TURN, placed, 0.0)  # (R, T)


def turn_mean_log_ratio(log_ratio: Tensor, turn_ids: Tensor) -> Tensor:
    """Mean of the log ratios of each turn's tokens on each of them, exactly 0 on all others.

    Its exponential is the geometric mean of the turn's token ratios: one ratio per step, StepPO
    (arXiv 2604.18401), GSPO's (arXiv 2507.18071) with the turn in place of the sequence. Gradients
    flow through.

    Args:
        log_ratio: (R, T), new minus old log-probability.
        turn_ids: (R, T), index of the turn that sampled the token, -1 on observations and padding.
    """
    sampled = turn_ids != OBSERVATION_TURN  # (R, T)
    places = turn_ids.clamp(min=0)  # (R, T)
    turns = int(places.max()) + 1 if places.numel() else 0
    empty = log_ratio.new_zeros(len(log_ratio), turns)  # (R, K)
    sums = empty.scatter_add(1, places, torch.where(sampled, log_ratio, 0.0))  # (R, K)
    counts = empty.scatter_add(1, places, sampled.to(log_ratio.dtype))  # (R, K)
    means = (sums / counts.clamp(min=1)).gather(1, places)  # (R, T)
    return torch.where(sampled, means, 0.0)


def present_turns(values: Tensor, turn_counts: Tensor) -> Tensor:
    """Mask of the turns that took place, of the shape of `values`, (B, K)."""
    turns = torch.arange(values.shape[1], device=values.device)  # (K,)
    return turns < turn_counts.unsqueeze(1)  # (B, K)


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


def _centred(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards minus the group's mean, (B, ...); NaN stays NaN."""
    grouped = _grouped(rewards, group_size)  # (B/G, G, ...)
    return (grouped - grouped.nanmean(dim=1, keepdim=True)).flatten(0, 1)


def _nan_std(values: Tensor) -> Tensor:
    """Standard deviation over dim 1 with ddof 1, NaN left out; NaN for fewer than two values."""
    count = (~values.isnan()).sum(dim=1, keepdim=True)  # (N, 1, ...)
    squares = (values - values.nanmean(dim=1, keepdim=True)) ** 2  # (N, M, ...)
    return (squares.nansum(dim=1, keepdim=True) / (count - 1)).sqrt()  # (N, 1, ...)


def with_outcome(rewards: TurnRewards, outcome: Tensor) -> Tensor:
    """Process rewards with an outcome paid at the end of the last turn, (B, K), 0 at absent turns.

    Args:
        rewards: of B trajectories.
        outcome: (B,), theirs.
    """
    _grouped(outcome, 1)  # refuses an infinite one
    refuse_non_finite(rewards.process, rewards.turn_counts)
    turns = torch.arange(rewards.process.shape[1], device=rewards.process.device)  # (K,)
    last = turns == rewards.turn_counts.unsqueeze(1) - 1  # (B, K)
    process = torch.where(
        present_turns(rewards.process, rewards.turn_counts), rewards.process, 0.0
    )  # (B, K)
    return torch.where(last, process + outcome.unsqueeze(1), process)


def refuse_non_finite(process_rewards: Tensor, turn_counts: Tensor) -> None:
    """A process reward that is no number would spread to the whole group: name it instead."""
    bad = ~process_rewards.isfinite() & present_turns(process_rewards, turn_counts)  # (B, K)
    if bad.any():
        row, turn = bad.nonzero()[0].tolist()
        raise ValueError(
            f"process rewards must be finite, got {process_rewards[row, turn].item()} in row {row} "
            f"at turn {turn}; return 0.0 from the environment where a turn earns nothing"
        )
