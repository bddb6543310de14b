"""Which estimators point where the exact policy gradient points, without any noise.

Every batch of a small decision process goes through the functions that training calls, weighed by
its probability (`expectation.py`), and the mean is held against the exact gradient: the constant
between them, the share of the estimate that is not that constant times the gradient (residual), and
the cosine. Where a constant is claimed, the estimate must be it times the gradient to 1e-8.

    python -m benchmarks.bias --json bias.json

The process is `decision_process.py`'s. Cosines are a property of the process as much as of the
estimator: read their sign and order. A constant does no harm to Adam, another direction does.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from agentr1 import estimators
from agentr1.advantages import (
    TurnRewards,
    group_mean,
    group_standardised,
    present_turns,
    prime_scaled,
    returns_to_go,
    total_returns,
)
from benchmarks.comparison import Comparison, arguments, write
from benchmarks.decision_process import PROMPTS, enumerate_prompt, exact_gradient, policy
from benchmarks.expectation import (
    Advantage,
    Kinds,
    Normaliser,
    exact_values,
    expected_batch_gradient,
    expected_gae,
    expected_gradient,
    expected_whitened_gae,
    step_valued,
    token_valued,
)

TOLERANCE = 1e-8
ALL: tuple[Normaliser, ...] = ("constant", "sequence", "tokens")
GROUP, BATCH_GROUP = 4, 2
"""Episodes of a group; less where the estimator ties the groups of both prompts together."""


class Estimator(NamedTuple):
    """One of those under test.

    Attributes:
        name: of the algorithm, and what is special about it.
        advantage: what is called.
        constant: what is claimed to stand before the gradient under a constant normaliser, a
            function of G; None where bias is expected.
        normalisers: of the loss.
        compares: "group" or "batch", what an episode is compared with.
        greedy_first: the first episode of a group is greedy and not trained on.
    """

    name: str
    advantage: Advantage
    constant: Callable[[int], float] | None = None
    normalisers: tuple[Normaliser, ...] = ("constant",)
    compares: Literal["group", "batch"] = "group"
    greedy_first: bool = False


class Claim(NamedTuple):
    """What is measured; see `Finding`."""

    estimator: str
    normaliser: Normaliser
    group_size: int
    constant: float | None


class Finding(NamedTuple):
    """A line of the table.

    Attributes:
        estimator: its name.
        normaliser: of the loss.
        group_size: G; 1 where a critic's advantages are not whitened.
        claimed: the constant that the docstring states, None where it states a bias.
        constant: what was found to stand before the gradient.
        residual: share of the estimate that is not the claimed constant (else the found one) times
            the gradient.
        cosine: between estimate and gradient.
    """

    estimator: str
    normaliser: Normaliser
    group_size: int
    claimed: float | None
    constant: float
    residual: float
    cosine: float


def exactly(_: int) -> float:
    """One times the gradient."""
    return 1.0


def but_itself(group_size: int) -> float:
    """What is left where the baseline holds the episode itself, or one row is no sample."""
    return (group_size - 1) / group_size


def trls(
    rewards: TurnRewards, compare: Callable[[Tensor, int], Tensor] = group_standardised
) -> Tensor:
    """TRL's advantage of the outcome, and the turns' credit beside it.

    Args:
        rewards: of whole groups.
        compare: TRL's `scale_rewards`: `group_standardised` is "group", `group_mean` is "none".
    """
    return estimators.group_relative(compare(rewards.outcome, rewards.group_size), rewards)


def per_trajectory(advantage: Advantage) -> Advantage:
    """The same estimator with `process_credit: trajectory`."""

    def credit(rewards: TurnRewards) -> Tensor:
        silent = torch.zeros_like(rewards.process)
        totals = total_returns(rewards)
        return advantage(dataclasses.replace(rewards, outcome=totals, process=silent))

    return credit


def prime_scaled_turns(rewards: TurnRewards) -> Tensor:
    """Turn-level leave-one-out with `process_scale: prime`."""
    scaled = prime_scaled(rewards.process, rewards.turn_counts)
    return estimators.turn_loo(dataclasses.replace(rewards, process=scaled))


def discounted(rewards: TurnRewards) -> Tensor:
    """Turn-level leave-one-out for which a turn's rewards are worth less the later they come."""
    return estimators.turn_loo(dataclasses.replace(rewards, discount=0.9))


def over_survivors(
    rewards: TurnRewards, *, centred: Literal["reward", "return"], itself: bool
) -> Tensor:
    """Compare each turn with those of the siblings that reached it.

    Args:
        rewards: the outcome is paid at the last turn.
        centred: "reward" is centred and then summed to go, which is the trap: who stops is compared
            with nobody at the turns that follow, so what one more turn costs on average is free.
            "return" is the return to go, and nothing is summed afterwards.
        itself: the mean holds the episode's own number, one of a random count.
    """
    present = present_turns(rewards.process, rewards.turn_counts)  # (B, K)
    paid = torch.where(present, rewards.process, 0.0)  # (B, K)
    paid[range(len(paid)), rewards.turn_counts - 1] += rewards.outcome
    if centred == "return":
        paid = returns_to_go(paid, rewards.turn_counts, 1.0)
    grouped = paid.unflatten(0, (-1, rewards.group_size))  # (B/G, G, K)
    count = present.unflatten(0, (-1, rewards.group_size)).sum(1, keepdim=True)  # (B/G, 1, K)
    total = grouped.sum(1, keepdim=True)  # (B/G, 1, K)
    if itself:
        baseline = total / count.clamp(min=1)
    else:
        baseline = (total - grouped) / (count - 1).clamp(min=1)  # 0 for the last survivor
    compared = torch.where(present, (grouped - baseline).flatten(0, 1), 0.0)  # (B, K)
    if centred == "reward":
        return returns_to_go(compared, rewards.turn_counts, 1.0)
    return compared


TRAP = "survivors' rewards, then summed: the trap"
ESTIMATORS = (
    Estimator("turn_loo", estimators.turn_loo, exactly, ALL),
    Estimator("turn_loo, discount 0.9", discounted),
    Estimator("turn_loo, process_scale prime", prime_scaled_turns, compares="batch"),
    Estimator("rloo", estimators.rloo, exactly, ALL),
    Estimator("remax", estimators.remax, but_itself, greedy_first=True),
    Estimator("dr_grpo", functools.partial(trls, compare=group_mean), but_itself),
    Estimator(
        "dr_grpo per trajectory",
        per_trajectory(functools.partial(trls, compare=group_mean)),
        but_itself,
    ),
    Estimator("grpo", trls, None, ALL),
    Estimator("grpo per trajectory", per_trajectory(trls), None, ALL),
    Estimator("reinforce++", estimators.reinforce_pp, None, ALL, "batch"),
    Estimator(
        "reinforce++ per trajectory",
        per_trajectory(estimators.reinforce_pp),
        compares="batch",
    ),
    Estimator("reinforce++_baseline", estimators.reinforce_pp_baseline, None, ALL, "batch"),
    Estimator(
        "reinforce++_baseline per trajectory",
        per_trajectory(estimators.reinforce_pp_baseline),
        compares="batch",
    ),
    Estimator("gigpo", estimators.gigpo),
    Estimator("gigpo, scale std", functools.partial(estimators.gigpo, scale="std")),
    Estimator("mt_grpo", estimators.mt_grpo),
    Estimator(TRAP, functools.partial(over_survivors, centred="reward", itself=True)),
    Estimator(
        "survivors' rewards but the own one, then summed",
        functools.partial(over_survivors, centred="reward", itself=False),
    ),
    Estimator(
        "survivors' returns to go",
        functools.partial(over_survivors, centred="return", itself=True),
    ),
    Estimator(
        "survivors' returns to go but the own one",
        functools.partial(over_survivors, centred="return", itself=False),
        exactly,
    ),
)


class Critic(NamedTuple):
    """A value function as GAE's only source of bias.

    Attributes:
        name: what is known of it.
        values: from the exact ones and the numbers of the states, both (N, M).
        lam: GAE's lambda.
        unbiased: whether the docstring says so.
    """

    name: str
    values: Callable[[Tensor, Tensor], Tensor]
    lam: float
    unbiased: bool


def exact(values: Tensor, _: Tensor) -> Tensor:
    """Nothing to complain of."""
    return values


def wrong(values: Tensor, states: Tensor) -> Tensor:
    """Off by something else in every state, whatever is said there."""
    return values + 0.5 * torch.sin(1.7 * states)


def late(values: Tensor, _: Tensor) -> Tensor:
    """Read one token late, when what is to be judged has been said."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)


CRITICS = (
    Critic("exact critic, lambda 1", exact, 1.0, True),
    Critic("exact critic, lambda 0.9", exact, 0.9, True),
    Critic("wrong critic, lambda 1", wrong, 1.0, True),
    Critic("wrong critic, lambda 0.9", wrong, 0.9, False),
    Critic("critic read a token late, lambda 1", late, 1.0, False),
)
GAES = {"ppo": token_valued, "steppo": step_valued}
WHITENED: tuple[Normaliser, ...] = ("constant", "tokens")
"""What is whitened is divided by; training divides by tokens (dapo)."""


def findings(turns: int = 3, group: int = GROUP, batch_group: int = BATCH_GROUP) -> list[Finding]:
    """Measure everything.

    Args:
        turns: of the process, at most.
        group: G of what compares groups.
        batch_group: G of what compares a batch of two groups.
    """
    logits = policy()
    gradient = exact_gradient(logits, turns)
    everything = [enumerate_prompt(prompt, logits, turns) for prompt in PROMPTS]
    kinds = [Kinds.of(each) for each in everything]
    found = []
    for estimator in ESTIMATORS:
        alone = estimator.compares == "group"
        size = group if alone else batch_group
        constant = estimator.constant(size) if estimator.constant else None
        for normaliser in estimator.normalisers:
            estimate = (expected_gradient if alone else expected_batch_gradient)(
                kinds,
                estimator.advantage,
                size,
                normaliser,
                **({"greedy_first": True} if estimator.greedy_first else {}),
            )
            claimed = constant if normaliser == "constant" else None
            found.append(
                held_against(gradient, estimate, Claim(estimator.name, normaliser, size, claimed))
            )
    for algorithm, critic in itertools.product(GAES, CRITICS):
        valued = [
            GAES[algorithm](each, critic.values(exact_values(each), each.prefixes), critic.lam)
            for each in everything
        ]
        stated = 1.0 if critic.unbiased else None
        claim = Claim(f"{algorithm} before whitening, {critic.name}", "constant", 1, stated)
        found.append(held_against(gradient, expected_gae(valued), claim))
        for normaliser in WHITENED:
            claim = Claim(f"{algorithm} whitened, {critic.name}", normaliser, batch_group, None)
            estimate = expected_whitened_gae(valued, batch_group, normaliser)
            found.append(held_against(gradient, estimate, claim))
    return found


def held_against(gradient: Tensor, estimate: Tensor, claim: Claim) -> Finding:
    """Compare the expectation of an estimate with the exact gradient, both (P,)."""
    constant = float(estimate @ gradient / gradient.square().sum())
    stated = constant if claim.constant is None else claim.constant
    residual = float((estimate - stated * gradient).norm() / (abs(stated) * gradient.norm()))
    cosine = float(estimate @ gradient / estimate.norm() / gradient.norm())
    return Finding(*claim, constant, residual, cosine)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 where a claim does not hold."""
    options = arguments("bias", "Hold every estimator against the exact gradient.").parse_args(argv)
    torch.set_num_threads(options.threads)
    found = findings()
    show(found)
    lines = [as_comparison(each) for each in found]
    write(lines, options.json)
    return int(any(line.reached is False for line in lines))


def show(found: Sequence[Finding]) -> None:
    """Print the table."""
    width = max(len(each.estimator) for each in found) + 2
    head = f"{'estimator':<{width}}{'G':>2}  {'divided by':<12}"
    print(f"{head}{'constant':>10}{'residual':>10}{'cosine':>9}  claim")
    for each in found:
        claim = ""
        if each.claimed is not None:
            claim = f"{each.claimed:g} x gradient{'' if holds(each) else ', FAILS'}"
        elif each.normaliser == "constant":
            claim = "biased"
        print(
            f"{each.estimator:<{width}}{each.group_size:>2}  {each.normaliser:<12}"
            f"{each.constant:>10.4f}{each.residual:>10.1e}{each.cosine:>9.4f}  {claim}".rstrip()
        )


def holds(finding: Finding) -> bool:
    """Whether what is claimed is so."""
    return finding.residual <= TOLERANCE


def as_comparison(finding: Finding) -> Comparison:
    """A line of the result file."""
    return Comparison(
        f"{finding.estimator}, divided by {finding.normaliser}",
        finding.residual,
        finding._asdict(),
        unit="of the gradient",
        target=None if finding.claimed is None else TOLERANCE,
        direction="at most",
        note=f"constant {finding.constant:.4f}, cosine {finding.cosine:.4f}",
    )


if __name__ == "__main__":
    sys.exit(main())
