"""From a critic's values to advantages and returns: what PPO and StepPO train on.

Layer 1. A transition is a token for PPO and a turn for StepPO; B episodes of N transitions each.
Values and payments come in on training rows, (R, T), or by turn, (B, K); `alignment` says which
token is where, `gae` adds up. Called by `actor_critic`, which whitens the advantages over all
processes in between; knows no model, no configuration and no process.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from agentr1.advantages import TurnRewards, scored_outcome, with_outcome
from agentr1.alignment import Line
from agentr1.gae import step_gae, token_gae


@dataclasses.dataclass(frozen=True, slots=True)
class Episodes:
    """What is known of B episodes but for the critic's opinion.

    Attributes:
        line: their tokens.
        rewards: process rewards are paid at the end of their turn, the outcome at that of the
            last. An episode without any is left out of the loss.
        cut: (B,), True where a limit ended the episode: the critic says what would have come.
        trained: (R, T), non-zero on the tokens that are trained on. What a faulted turn was paid
            counts for the turns before it.
        penalties: (R, T), taken off each token's reward.
    """

    line: Line
    rewards: TurnRewards
    cut: Tensor
    trained: Tensor
    penalties: Tensor

    @property
    def payments(self) -> Tensor:
        """(B, K), the outcome added to the last turn's process reward."""
        outcome = self.rewards.outcome
        return with_outcome(self.rewards, outcome.masked_fill(outcome.isnan(), 0.0))

    @property
    def trained_tokens(self) -> Tensor:
        """(B, M), True on the tokens of the line that are trained on, in scored episodes."""
        scored = ~scored_outcome(self.rewards).isnan()  # (B,)
        return (self.line.take(self.trained) != 0) & scored.unsqueeze(1)

    def bootstrap(self, states: Tensor) -> Tensor:
        """(B,), the value behind each episode's end: 0 where nothing can follow."""
        return torch.where(self.cut, self.line.take_behind(states), 0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Valuation:
    """Every transition's advantage and what its value should have been.

    Attributes:
        values: (B, N), of the state before it.
        advantages: (B, N).
        returns: (B, N).
        trained: (B, N), True on transitions that the policy and the critic are trained on.
        line: the episodes' tokens.
        by_turn: a transition is a turn.
    """

    values: Tensor
    advantages: Tensor
    returns: Tensor
    trained: Tensor
    line: Line
    by_turn: bool = False

    def on_tokens(self, values: Tensor, like: Tensor) -> Tensor:
        """(B, N) -> (R, T): a transition's value on all of its tokens."""
        line = self.line
        tokens = line.put_turns(values, line.present) if self.by_turn else values
        return line.put(tokens, like)

    def on_states(self, values: Tensor, like: Tensor) -> Tensor:
        """(B, N) -> (R, T): a transition's value where the critic values the state before it."""
        line = self.line
        tokens = line.put_turns(values, line.starts) if self.by_turn else values
        return line.put(tokens, like)


def value_tokens(states: Tensor, episodes: Episodes, lam: float) -> Valuation:
    """GAE from token to token of the line, discounted at the ends of turns: PPO.

    See `gae.token_gae`. With observations in the line this is the ablation that Agent-R1 calls no
    advantage mask.

    Args:
        states: (R, T + 1), the critic's values of the states before each token and behind the row.
        episodes: theirs.
        lam: GAE's lambda, per token.
    """
    line, rewards = episodes.line, episodes.rewards
    values = line.take(states)  # (B, M)
    paid = line.put_turns(episodes.payments, line.ends) - line.take(episodes.penalties)
    advantages, returns = token_gae(
        paid,
        values,
        line.counts,
        line.ends,
        episodes.bootstrap(states),
        discount=rewards.discount,
        lam=lam,
    )
    return Valuation(values, advantages, returns, episodes.trained_tokens, line)


def value_turns(states: Tensor, episodes: Episodes, lam: float) -> Valuation:
    """GAE from turn to turn, valued where each begins: StepPO.

    See `gae.step_gae`.

    Args:
        states: (R, T + 1), the critic's values of the states before each token and behind the row.
        episodes: theirs.
        lam: GAE's lambda, per turn.
    """
    line, rewards = episodes.line, episodes.rewards
    turns = rewards.process.shape[1]
    values = line.take_starts(line.take(states), turns)  # (B, K)
    penalties = line.sum_turns(line.take(episodes.penalties), turns)  # (B, K)
    advantages, returns = step_gae(
        episodes.payments - penalties,
        values,
        rewards.turn_counts,
        episodes.bootstrap(states),
        discount=rewards.discount,
        lam=lam,
    )
    trained = line.sum_turns(episodes.trained_tokens.to(values.dtype), turns) > 0  # (B, K)
    return Valuation(values, advantages, returns, trained, line, by_turn=True)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value, the larger of the free and the clipped one's.

    L = max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2, PPO's (arXiv 1707.06347): a value that
    has moved further than the clip towards its return is left alone.

    Args:
        values: of any shape.
        old_values: of the critic that the returns were computed with.
        returns: what the values should be.
        clip: None clips nothing.

    Returns:
        The loss of each value, and True where the clipped one counts.
    """
    error = (values - returns).square()
    if clip is None:
        return error / 2, torch.zeros_like(error, dtype=torch.bool)
    near = old_values + (values - old_values).clamp(-clip, clip)
    clipped = (near - returns).square()
    return torch.maximum(error, clipped) / 2, clipped > error
