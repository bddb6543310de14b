"""What an estimator of `advantages.py` amounts to on average, over all batches there can be.

A batch is G episodes of every prompt. Estimators see rewards and lengths, not tokens, so episodes
that agree in those are one kind, known by its probability and its expected score; and they do not
care which sibling stands first, so a group is a multiset of kinds. That leaves few enough batches
to put each of them through the function that training calls. A critic compares no episodes, so
GAE by itself is counted out one episode at a time; whitening does compare them, and tells all of
them apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from agentr1.advantages import TurnRewards, place_turns, present_turns
from agentr1.gae import moments, standardised, step_gae, token_gae
from benchmarks.decision_process import Enumeration

Normaliser = Literal["constant", "sequence", "tokens"]
"""What a sum over tokens is divided by, besides a constant: nothing (TRL's dr_grpo), the episode's
own tokens (grpo), the tokens of the batch (dapo)."""

Advantage = Callable[[TurnRewards], Tensor]

CHUNK = 32
"""So many groups of one prompt meet all those of the other at once: memory, not results."""


@dataclasses.dataclass(frozen=True)
class Kinds:
    """The C kinds of episodes of one prompt.

    Attributes:
        probabilities: (C,).
        greedy: (C,), probabilities under the policy that always says what is likeliest.
        outcome: (C,).
        process: (C, K).
        turn_counts: (C,).
        anchors: (C, K).
        token_counts: (C,), tokens the policy sampled.
        scores: (C, K, P), expected gradient of each turn's log-probability.
    """

    probabilities: Tensor
    greedy: Tensor
    outcome: Tensor
    process: Tensor
    turn_counts: Tensor
    anchors: Tensor
    token_counts: Tensor
    scores: Tensor

    @classmethod
    def of(cls, everything: Enumeration) -> Kinds:
        """Merge the episodes that no estimator can tell apart."""
        told = torch.column_stack(
            [
                everything.outcome,
                everything.process,
                everything.turn_counts,
                everything.anchors,
                everything.token_counts,
            ]
        )
        kinds, kind = told.unique(dim=0, return_inverse=True)  # (C, .), (N,)
        first = [int((kind == c).nonzero()[0]) for c in range(len(kinds))]

        def total(values: Tensor) -> Tensor:
            return values.new_zeros(len(kinds), *values.shape[1:]).index_add(0, kind, values)

        probabilities = total(everything.probabilities)
        weighed = everything.probabilities[:, None, None] * everything.turn_scores
        return cls(
            probabilities,
            total(everything.greedy),
            everything.outcome[first],
            everything.process[first],
            everything.turn_counts[first],
            everything.anchors[first],
            everything.token_counts[first],
            total(weighed) / probabilities[:, None, None],
        )

    def joined(self, other: Kinds) -> Kinds:
        """Those of two prompts in one list."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Kinds(*(torch.cat(pair) for pair in pairs))

    def rewards(self, drawn: Tensor, group_size: int) -> TurnRewards:
        """What the batch `drawn` (B,) was paid."""
        return TurnRewards(
            outcome=self.outcome[drawn],
            process=self.process[drawn],
            turn_counts=self.turn_counts[drawn],
            group_size=group_size,
            anchors=self.anchors[drawn],
        )


def groups(
    kinds: Kinds | Enumeration, size: int, *, greedy_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Every group there can be: kinds (n, G) and probability (n,).

    Args:
        kinds: of one prompt, or its episodes.
        size: G.
        greedy_first: the first episode of a group is the greedy one.
    """
    sampled = size - greedy_first
    count = len(kinds.probabilities)
    drawn = torch.combinations(torch.arange(count), sampled, with_replacement=True)  # (n, G)
    repeats = torch.nn.functional.one_hot(drawn, count).sum(dim=1)  # (n, C)
    orders = math.factorial(sampled) / (repeats + 1.0).double().lgamma().exp().prod(dim=1)  # (n,)
    weights = orders * kinds.probabilities[drawn].prod(dim=1)  # (n,)
    if greedy_first:
        best = kinds.greedy.nonzero()  # (g, 1)
        weights = (kinds.greedy[best] * weights).flatten()  # (g * n,)
        drawn = torch.cat(
            [best.repeat_interleave(len(drawn), 0), drawn.repeat(len(best), 1)], dim=1
        )
    return drawn, weights


def expected_gradient(
    prompts: Sequence[Kinds],
    advantage: Advantage,
    group_size: int,
    normaliser: Normaliser = "constant",
    *,
    greedy_first: bool = False,
) -> Tensor:
    """Expectation of an estimator whose groups do not see each other, (P,).

    Args:
        prompts: two lists of kinds.
        advantage: of a batch of any number of groups.
        group_size: G.
        normaliser: of the loss.
        greedy_first: the first episode of a group is greedy and not trained on.
    """
    found = [groups(kinds, group_size, greedy_first=greedy_first) for kinds in prompts]
    trained = torch.ones(group_size)
    trained[0] = 1.0 - greedy_first
    gradient = torch.zeros((), dtype=torch.float64)
    for here, there in ((0, 1), (1, 0)):
        kinds, (drawn, weights) = prompts[here], found[here]
        values = advantage(kinds.rewards(drawn.flatten(), group_size)).view(*drawn.shape, -1)
        values = values * trained[:, None]  # (n, G, K)
        lengths = kinds.token_counts[drawn] * trained  # (n, G)
        if normaliser == "constant":
            shares = torch.full_like(lengths, 1 / group_size / len(prompts))
        elif normaliser == "sequence":
            shares = 1 / lengths.clamp(min=1) / group_size / len(prompts)
        else:
            others = prompts[there].token_counts[found[there][0]] * trained
            shares = _mean_share(lengths.sum(1), others.sum(1), found[there][1])[:, None]
        gradient = gradient + _gradient(kinds.scores, drawn, weights, shares[..., None] * values)
    return gradient


def expected_batch_gradient(
    prompts: Sequence[Kinds],
    advantage: Advantage,
    group_size: int,
    normaliser: Normaliser = "constant",
) -> Tensor:
    """The same for an estimator that looks at the whole batch: one call for each batch, (P,)."""
    kinds = prompts[0].joined(prompts[1])
    first, second = (groups(each, group_size) for each in prompts)
    pairs = torch.tensor(list(itertools.product(range(len(first[0])), range(len(second[0])))))
    drawn = torch.cat(
        [first[0][pairs[:, 0]], len(prompts[0].outcome) + second[0][pairs[:, 1]]], dim=1
    )  # (n, B)
    weights = first[1][pairs[:, 0]] * second[1][pairs[:, 1]]  # (n,)
    values = torch.stack([advantage(kinds.rewards(batch, group_size)) for batch in drawn])
    divisors = _divisors(kinds.token_counts[drawn].double(), normaliser)
    return _gradient(kinds.scores, drawn, weights, values / divisors[..., None])


def _divisors(lengths: Tensor, normaliser: Normaliser) -> Tensor:
    """What the loss divides each episode by, (n, B) as the lengths."""
    if normaliser == "constant":
        return torch.full_like(lengths, lengths.shape[1])
    if normaliser == "sequence":
        return lengths * lengths.shape[1]
    return lengths.sum(dim=1, keepdim=True).expand_as(lengths)


def _mean_share(own: Tensor, others: Tensor, weights: Tensor) -> Tensor:
    """Expectation of one over the tokens of the batch, given one group's, (n,)."""
    lengths, which = others.unique(return_inverse=True)  # (l,)
    chances = weights.new_zeros(len(lengths)).index_add(0, which, weights)  # (l,)
    return (chances / (own[:, None] + lengths)).sum(dim=1)


def _gradient(scores: Tensor, drawn: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """Sum of weight * value * score (C, K, P) over batches (n, G, K)."""
    weighed = (weights[:, None, None] * values).flatten(0, 1)  # (n * G, K)
    totals = scores.new_zeros(scores.shape[:2]).index_add(0, drawn.flatten(), weighed)  # (C, K)
    return torch.einsum("ck,ckp->p", totals, scores)


def exact_values(everything: Enumeration) -> Tensor:
    """What an episode is still paid on average before each of its tokens, (N, M)."""
    to_go = _returns_to_go(everything)  # (N, M)
    present = everything.turn_ids >= 0  # (N, M)
    weights = everything.probabilities[:, None].expand_as(to_go)[present]  # (n,)
    prefixes = everything.prefixes[present]  # (n,)
    empty = to_go.new_zeros(int(prefixes.max()) + 1)
    means = empty.index_add(0, prefixes, weights * to_go[present])
    means = means / empty.index_add(0, prefixes, weights)
    return torch.where(present, means[everything.prefixes.clamp(min=0)], 0.0)


@dataclasses.dataclass(frozen=True)
class Valued:
    """What GAE makes of all N episodes of one prompt; a transition is a token or a turn.

    Attributes:
        everything: the episodes.
        advantages: (N, X), of each transition.
        present: (N, X), True where there is one.
        scores: (N, X, P), gradient of each transition's log-probability.
    """

    everything: Enumeration
    advantages: Tensor
    present: Tensor
    scores: Tensor


def token_valued(everything: Enumeration, values: Tensor, lam: float) -> Valued:
    """Token-level GAE.

    Args:
        everything: that can happen.
        values: (N, M), the critic's, before each token.
        lam: GAE's lambda.
    """
    paid, ends = _token_rewards(everything)
    values_behind = torch.zeros_like(everything.outcome)  # every episode terminates
    counts = everything.token_counts
    found, _ = token_gae(paid, values, counts, ends, values_behind, discount=1.0, lam=lam)
    return Valued(everything, found, everything.turn_ids >= 0, everything.token_scores)


def step_valued(everything: Enumeration, values: Tensor, lam: float) -> Valued:
    """The same of step-level GAE, which reads the value of each turn's first token."""
    opens = everything.turn_ids != everything.turn_ids.roll(1, dims=1)  # (N, M)
    opens[:, 0] = True
    opens &= everything.turn_ids >= 0
    steps = torch.zeros_like(everything.process)  # (N, K)
    steps[opens.nonzero()[:, 0], everything.turn_ids[opens]] = values[opens]
    paid, counts = everything.process.clone(), everything.turn_counts
    paid[range(len(paid)), counts - 1] += everything.outcome
    values_behind = torch.zeros_like(everything.outcome)
    found, _ = step_gae(paid, steps, counts, values_behind, discount=1.0, lam=lam)
    return Valued(everything, found, present_turns(paid, counts), everything.turn_scores)


def expected_gae(prompts: Sequence[Valued]) -> Tensor:
    """Expectation of GAE's estimate, (P,)."""
    return torch.stack([_valued_gradient(each) for each in prompts]).mean(dim=0)


def _valued_gradient(valued: Valued) -> Tensor:
    weighed = valued.everything.probabilities[:, None] * valued.advantages  # (N, X)
    return torch.einsum("nx,nxp->p", weighed, valued.scores)


def expected_whitened_gae(
    prompts: Sequence[Valued], group_size: int, normaliser: Normaliser = "constant"
) -> Tensor:
    """The same as it is trained on, whitened over the transitions of each batch, (P,).

    Args:
        prompts: two.
        group_size: episodes of each prompt in a batch.
        normaliser: of the loss.
    """
    values, present, scores = (
        torch.cat([getattr(each, name) for each in prompts])
        for name in ("advantages", "present", "scores")
    )  # (2N, X), (2N, X), (2N, X, P)
    lengths = torch.cat([each.everything.token_counts for each in prompts]).double()  # (2N,)
    sums = torch.stack([moments(*each) for each in zip(values, present, strict=True)])  # (2N, 3)
    first, second = (groups(each.everything, group_size) for each in prompts)
    others = len(prompts[0].advantages) + second[0]  # (n, G)
    gradient = torch.zeros_like(scores[0, 0])
    for some, weights in zip(first[0].split(CHUNK), first[1].split(CHUNK), strict=True):
        drawn = torch.cat(
            [some.repeat_interleave(len(others), 0), others.repeat(len(some), 1)], dim=1
        )  # (c * n, B)
        whole = sums[drawn].sum(dim=1).T[..., None, None]  # (3, c * n, 1, 1): of each batch
        whitened = standardised(values[drawn], present[drawn], whole)  # (c * n, B, X)
        shares = whitened / _divisors(lengths[drawn], normaliser)[..., None]
        chances = (weights[:, None] * second[1]).flatten()  # (c * n,)
        gradient = gradient + _gradient(scores, drawn, chances, shares)
    return gradient


def _token_rewards(everything: Enumeration) -> tuple[Tensor, Tensor]:
    """What is paid at each token, and where turns end, both (N, M)."""
    following = everything.turn_ids.roll(-1, dims=1)  # (N, M)
    following[:, -1] = -1
    ends = (everything.turn_ids != following) & (everything.turn_ids >= 0)  # (N, M)
    paid = torch.where(ends, place_turns(everything.process, everything.turn_ids), 0.0)
    paid[range(len(paid)), everything.token_counts - 1] += everything.outcome
    return paid, ends


def _returns_to_go(everything: Enumeration) -> Tensor:
    """What is paid at each token and behind it, (N, M)."""
    return _token_rewards(everything)[0].flip(1).cumsum(1).flip(1)
