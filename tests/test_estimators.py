"""Estimators: hand-computed values, a slow reference in plain Python, and what never matters.

The reference works on lists of lists, one episode after another, and shares no code with the
package. Shapes, rewards and gaps come from hypothesis; rewards are quarters, so that ties and
silent groups are frequent.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentr1.advantages import (
    TurnRewards,
    greedy_baseline,
    group_mean,
    group_standardised,
    leave_one_out,
    place_turns,
)
from agentr1.estimators import (
    gigpo,
    mt_grpo,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    rloo,
    turn_loo,
)

NAN, INF = float("nan"), float("inf")
EPS = 1e-4


def gigpo_std(rewards: TurnRewards) -> Tensor:
    return gigpo(rewards, scale="std", anchor_weight=0.5)


ESTIMATORS = [
    rloo,
    turn_loo,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    gigpo,
    gigpo_std,
    mt_grpo,
]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda f: f.__name__)


# Episodes as plain lists


class Episode(NamedTuple):
    """What one episode was paid: `outcome` None for no opinion, one reward and state per turn."""

    outcome: float | None
    process: tuple[float, ...]
    anchors: tuple[int, ...]


class Batch(NamedTuple):
    episodes: list[Episode]
    group_size: int
    discount: float = 1.0

    def groups(self) -> list[list[Episode]]:
        size = self.group_size
        return [self.episodes[i : i + size] for i in range(0, len(self.episodes), size)]


def tensors(batch: Batch, padding: float = NAN, extra: int = 0, dtype=torch.float64) -> TurnRewards:
    """The batch as the trainer would hand it over; absent turns hold `padding`."""
    width = max(len(e.process) for e in batch.episodes) + extra
    process = torch.full((len(batch.episodes), width), padding, dtype=dtype)
    anchors = torch.full((len(batch.episodes), width), 0)  # a state like any other
    for i, episode in enumerate(batch.episodes):
        process[i, : len(episode.process)] = torch.tensor(episode.process, dtype=dtype)
        anchors[i, : len(episode.anchors)] = torch.tensor(episode.anchors)
    return TurnRewards(
        outcome=torch.tensor(
            [NAN if e.outcome is None else e.outcome for e in batch.episodes], dtype=dtype
        ),
        process=process,
        turn_counts=torch.tensor([len(e.process) for e in batch.episodes]),
        group_size=batch.group_size,
        discount=batch.discount,
        anchors=anchors,
    )


quarters = st.integers(-8, 8).map(lambda n: n / 4)


@st.composite
def batches(draw, min_group: int = 1, paid: bool = True) -> Batch:
    size = draw(st.integers(min_group, 4))
    episodes = []
    for _ in range(size * draw(st.integers(1, 3))):
        turns = draw(st.integers(1, 4))
        pays = paid and draw(st.integers(0, 3)) > 0  # an episode may be silent altogether
        episodes.append(
            Episode(
                draw(st.none() | quarters) if draw(st.integers(0, 3)) == 0 else draw(quarters),
                tuple(draw(quarters) if pays else 0.0 for _ in range(turns)),
                tuple(draw(st.integers(-1, 2)) for _ in range(turns)),
            )
        )
    return Batch(episodes, size, draw(st.sampled_from([1.0, 0.9, 0.5])))


# The slow reference


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1))


def to_go(process: tuple[float, ...], turn: int, discount: float) -> float:
    """Discounted sum from `turn` on; 0 behind the end."""
    return sum(discount ** (k - turn) * process[k] for k in range(turn, len(process)))


def known_outcome(episode: Episode) -> float | None:
    return 0.0 if episode.outcome is None and any(episode.process) else episode.outcome


def total(episode: Episode, discount: float) -> float | None:
    outcome = known_outcome(episode)
    return None if outcome is None else outcome + to_go(episode.process, 0, discount)


def known(values: list[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def minus_mean(value: float | None, everyone: list[float | None]) -> float:
    return 0.0 if value is None else value - mean(known(everyone))


def minus_others(i: int, everyone: list[float | None]) -> float:
    others = known([v for j, v in enumerate(everyone) if j != i])
    value = everyone[i]
    return 0.0 if value is None or not others else value - mean(others)


def standard(value: float | None, everyone: list[float | None]) -> float:
    spread = deviation(known(everyone))
    return 0.0 if spread is None else minus_mean(value, everyone) / (spread + EPS)


def slow_rloo(group: list[Episode], i: int, turn: int, batch: Batch) -> float:
    return minus_others(i, [total(e, batch.discount) for e in group])


def slow_turn_loo(group: list[Episode], i: int, turn: int, batch: Batch) -> float:
    returns = [to_go(e.process, turn, batch.discount) for e in group]
    return minus_others(i, [e.outcome for e in group]) + minus_others(i, [*returns])


def slow_centred(group: list[Episode], i: int, turn: int, batch: Batch) -> float:
    returns = [to_go(e.process, turn, batch.discount) for e in group]
    outcome = minus_mean(group[i].outcome, [e.outcome for e in group])
    return outcome + returns[i] - mean(returns)


def spread_of_turns(batch: Batch, groups: list[list[Episode]]) -> float | None:
    """Every episode counts once, its turns share its weight."""
    squares = [
        mean([slow_centred(group, i, k, batch) ** 2 for k in range(len(e.process))])
        for group in groups
        for i, e in enumerate(group)
        if known_outcome(e) is not None
    ]
    return math.sqrt(sum(squares) / (len(squares) - 1)) if len(squares) > 1 else None


def slow_reinforce_pp(group: list[Episode], i: int, turn: int, batch: Batch) -> float:
    whole = batch.episodes
    spread = spread_of_turns(batch, [whole])
    place = next(j for j, e in enumerate(whole) if e is group[i])
    return 0.0 if spread is None else slow_centred(whole, place, turn, batch) / (spread + EPS)


def slow_reinforce_pp_baseline(group: list[Episode], i: int, turn: int, batch: Batch) -> float:
    spread = spread_of_turns(batch, batch.groups())
    return 0.0 if spread is None else slow_centred(group, i, turn, batch) / (spread + EPS)


def slow_remax(group: list[Episode], i: int, turn: int, batch: Batch) -> float:
    greedy, mine = group[0], group[i]
    process = [to_go(e.process, turn, batch.discount) for e in (mine, greedy)]
    both = mine.outcome is not None and greedy.outcome is not None
    return (mine.outcome - greedy.outcome if both else 0.0) + process[0] - process[1]


def slow_gigpo(group, i, turn, batch, weight=1.0, compare=minus_mean) -> float:
    advantage = compare(total(group[i], 1.0), [total(e, 1.0) for e in group])
    state = group[i].anchors[turn]
    if state < 0:
        return advantage

    def quality(episode: Episode, k: int) -> float | None:
        outcome = known_outcome(episode)
        left = len(episode.process) - 1 - k
        if outcome is None:
            return None
        return to_go(episode.process, k, batch.discount) + batch.discount**left * outcome

    met = [quality(e, k) for e in group for k, anchor in enumerate(e.anchors) if anchor == state]
    return advantage + weight * compare(quality(group[i], turn), met)


def slow_gigpo_std(group: list[Episode], i: int, turn: int, batch: Batch) -> float:
    return slow_gigpo(group, i, turn, batch, 0.5, standard)


def slow_mt_grpo(group: list[Episode], i: int, turn: int, batch: Batch) -> float:
    advantage = standard(group[i].outcome, [e.outcome for e in group])
    for k in range(turn, len(group[i].process)):
        reached = [e.process[k] for e in group if len(e.process) > k]
        advantage += batch.discount ** (k - turn) * standard(group[i].process[k], [*reached])
    return advantage


def slowly(reference: Callable[..., float], batch: Batch, width: int) -> Tensor:
    rows = [
        [reference(group, i, k, batch) if k < len(e.process) else 0.0 for k in range(width)]
        for group in batch.groups()
        for i, e in enumerate(group)
    ]
    return torch.tensor(rows, dtype=torch.float64)


REFERENCES = {
    rloo: slow_rloo,
    turn_loo: slow_turn_loo,
    reinforce_pp: slow_reinforce_pp,
    reinforce_pp_baseline: slow_reinforce_pp_baseline,
    remax: slow_remax,
    gigpo: slow_gigpo,
    gigpo_std: slow_gigpo_std,
    mt_grpo: slow_mt_grpo,
}


@every_estimator
@settings(max_examples=100, deadline=None)
@given(batch=batches())
def test_every_estimator_equals_its_slow_reference(estimator, batch):
    fast = estimator(tensors(batch))
    slow = slowly(REFERENCES[estimator], batch, fast.shape[1])
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


# By hand: one group of two, paid [1, 2] then 4, and [3] then 1


HAND = Batch([Episode(4.0, (1.0, 2.0), (0, 1)), Episode(1.0, (3.0,), (0,))], 2)


def test_rloo_by_hand():
    # Totals 7 and 4.
    assert rloo(tensors(HAND)).tolist() == [[3, 3], [-3, 0]]


def test_turn_loo_by_hand():
    # Outcomes 4 - 1; returns [3, 2] and [3, 0].
    assert turn_loo(tensors(HAND)).tolist() == [[3, 3 + 2], [-3, 0]]


def test_reinforce_pp_by_hand():
    # Outcome 1.5 from its mean, returns 0 and 1 from theirs; squares (2.25 + 6.25) / 2 + 2.25.
    expected = torch.tensor([[1.5, 2.5], [-1.5, 0]], dtype=torch.float64) / (6.5**0.5 + EPS)
    torch.testing.assert_close(reinforce_pp(tensors(HAND)), expected)


def test_reinforce_pp_baseline_by_hand():
    # A second group, centred +-1: squares 6.5 + 1 + 1 over 3.
    batch = Batch([*HAND.episodes, Episode(10.0, (0.0,), (0,)), Episode(8.0, (0.0,), (0,))], 2)
    expected = torch.tensor([[1.5, 2.5], [-1.5, 0], [1, 0], [-1, 0]], dtype=torch.float64)
    result = reinforce_pp_baseline(tensors(batch))
    torch.testing.assert_close(result, expected / ((8.5 / 3) ** 0.5 + EPS))


@pytest.mark.parametrize("estimator", [reinforce_pp, reinforce_pp_baseline])
def test_totals_that_agree_blow_up_no_turn(estimator):
    """Both were paid 2, one of them late: a deviation of totals would be 0."""
    batch = Batch([Episode(0.0, (1.0, 1.0), (0, 0)), Episode(0.0, (2.0,), (0,))], 2)
    assert estimator(tensors(batch)).abs().max() < 2


def test_remax_by_hand_the_greedy_row_comes_first():
    assert remax(tensors(HAND)).tolist() == [[0, 0], [-3 + 0, 0]]
    turned = Batch(HAND.episodes[::-1], 2)
    assert remax(tensors(turned)).tolist() == [[0, 0], [3 + 0, 3 + 2]]


def test_gigpo_by_hand():
    batch = HAND._replace(discount=0.5)
    # Totals without discount 7 and 4. From state 0: 1 + 0.5 * (2 + 4) = 4 and 3 + 1 = 4; state 1
    # was met once.
    assert gigpo(tensors(batch)).tolist() == [[1.5, 1.5], [-1.5, 0]]
    # The first turn of episode 0 shares its state with its own second turn, returns 4 and 6.
    again = Batch([HAND.episodes[0]._replace(anchors=(2, 2)), HAND.episodes[1]], 2, 0.5)
    assert gigpo(tensors(again), anchor_weight=2.0).tolist() == [[1.5 - 2, 1.5 + 2], [-1.5, 0]]
    # Divided by the deviations: sqrt(4.5) of totals, sqrt(2) of the state.
    spread = gigpo(tensors(again), scale="std")
    step, episode = 1 / (2**0.5 + EPS), 1.5 / (4.5**0.5 + EPS)
    expected = torch.tensor([[episode - step, episode + step], [-episode, 0]], dtype=torch.float64)
    torch.testing.assert_close(spread, expected)


def test_gigpo_compares_no_states_across_groups():
    batch = Batch([Episode(float(o), (0.0,), (5,)) for o in (0, 1, 0, 9)], 2)
    assert gigpo(tensors(batch)).flatten().tolist() == [-1, 1, -9, 9]


def test_gigpo_without_anchors_is_refused():
    with pytest.raises(ValueError, match="without anchors; pass TurnRewards.anchors"):
        gigpo(dataclasses.replace(tensors(HAND), anchors=None))


def test_mt_grpo_by_hand():
    # Outcomes 4, 1: +-1.5 by sqrt(4.5). Turn 0 paid 1, 3: -+1 by sqrt(2). Turn 1 reached by one.
    outcome, turn = 1.5 / (4.5**0.5 + EPS), 1 / (2**0.5 + EPS)
    expected = [[outcome - turn, outcome], [-outcome + turn, 0]]
    torch.testing.assert_close(mt_grpo(tensors(HAND)), torch.tensor(expected, dtype=torch.float64))


def test_mt_grpo_centres_over_survivors_and_turn_loo_over_all():
    """Two reach turn 1 and are paid there, two end: only the remedy rewards having come so far."""
    stay = [Episode(0.0, (0.0, 3.0), (0, 0)), Episode(0.0, (0.0, 1.0), (0, 0))]
    batch = Batch([*stay, Episode(0.0, (0.0,), (0,)), Episode(0.0, (0.0,), (0,))], 4)
    assert mt_grpo(tensors(batch))[1, 0] < 0
    assert turn_loo(tensors(batch))[:, 0].tolist() == [3 - 1 / 3, 1 - 1, -4 / 3, -4 / 3]


# An episode without an outcome


def test_an_episode_without_an_outcome_keeps_the_credit_of_its_turns():
    """The others are compared as if it had no outcome; what its turns earned still counts."""
    batch = Batch([Episode(None, (2.0,), (0,)), Episode(1.0, (0.0,), (0,))], 2)
    assert turn_loo(tensors(batch)).flatten().tolist() == [2, -2]
    assert rloo(tensors(batch)).flatten().tolist() == [2 - 1, 1 - 2]
    silent = Batch([Episode(None, (0.0,), (0,)), *HAND.episodes], 3)
    assert rloo(tensors(silent)).tolist() == [[0, 0], [3, 3], [-3, 0]]
    assert gigpo(tensors(silent)).tolist() == [[0, 0], [1.5 + 1.5, 1.5], [-1.5 - 1.5, 0]]


@every_estimator
def test_a_batch_paid_by_turns_alone_is_not_trained_on_zeros(estimator):
    batch = Batch([Episode(None, (1.0, 0.5), (0, 1)), Episode(None, (3.0,), (0,))], 2)
    assert estimator(tensors(batch)).abs().sum() > 0.5


# Without process rewards: the outcome-only form, to the last bit


def whitened(rewards: Tensor, group_size: int) -> Tensor:
    """Minus the group's mean, by the deviation of that over the batch."""
    centred = group_mean(rewards, group_size).masked_fill(rewards.isnan(), NAN)
    deviation = (centred.square().nansum() / ((~centred.isnan()).sum() - 1)).sqrt() + EPS
    return (centred / deviation).nan_to_num(nan=0.0)


def whitened_over_the_batch(rewards: Tensor, group_size: int) -> Tensor:
    return whitened(rewards, len(rewards))


OUTCOME_FORMS = {
    rloo: leave_one_out,
    turn_loo: leave_one_out,
    reinforce_pp: whitened_over_the_batch,
    reinforce_pp_baseline: whitened,
    remax: greedy_baseline,
    mt_grpo: group_standardised,
}


@pytest.mark.parametrize("estimator", OUTCOME_FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=40, deadline=None)
@given(batch=batches(paid=False), scale=st.floats(0.01, 3.0))
def test_without_process_rewards_only_the_outcome_form_is_left(estimator, dtype, batch, scale):
    rewards = tensors(batch, dtype=dtype)
    rewards = dataclasses.replace(rewards, outcome=rewards.outcome * scale)  # no binary fractions
    alone = OUTCOME_FORMS[estimator](rewards.outcome, batch.group_size)
    expected = alone.unsqueeze(1).expand_as(rewards.process)
    absent = rewards.process.isnan()
    assert torch.equal(estimator(rewards), expected.masked_fill(absent, 0.0))


@pytest.mark.parametrize("scale", ["none", "std"])
@settings(max_examples=40, deadline=None)
@given(batch=batches(paid=False))
def test_gigpo_that_compares_no_states_is_the_outcome_form(scale, batch):
    form = {"none": group_mean, "std": group_standardised}[scale]
    rewards = tensors(batch)
    alone = form(rewards.outcome, batch.group_size).unsqueeze(1).expand_as(rewards.process)
    expected = alone.masked_fill(rewards.process.isnan(), 0.0)
    nowhere = dataclasses.replace(rewards, anchors=torch.full_like(rewards.anchors, -1))
    assert torch.equal(gigpo(nowhere, scale=scale), expected)
    assert torch.equal(gigpo(rewards, scale=scale, anchor_weight=0.0), expected)


# What never matters


@every_estimator
@settings(max_examples=40, deadline=None)
@given(batch=batches(), data=st.data())
def test_permuting_episodes_within_groups_and_groups_permutes_the_result(estimator, batch, data):
    size = batch.group_size
    order = []
    for start in data.draw(st.permutations(range(0, len(batch.episodes), size))):
        # ReMax's first row is the greedy one and stays first.
        fixed = 1 if estimator is remax else 0
        within = data.draw(st.permutations(range(fixed, size)))
        order += [start + j for j in [*range(fixed), *within]]
    permuted = batch._replace(episodes=[batch.episodes[i] for i in order])
    torch.testing.assert_close(
        estimator(tensors(permuted)), estimator(tensors(batch))[order], rtol=1e-9, atol=1e-9
    )


@every_estimator
@settings(max_examples=40, deadline=None)
@given(batch=batches(), padding=st.sampled_from([0.0, 7.0, NAN, INF]), extra=st.integers(0, 3))
def test_absent_turns_and_padding_change_nothing(estimator, batch, padding, extra):
    plain = estimator(tensors(batch))
    padded = estimator(tensors(batch, padding, extra))
    width = plain.shape[1]
    assert torch.equal(padded[:, :width], plain)
    assert not padded[:, width:].any()
    assert padded.isfinite().all()


@every_estimator
@settings(max_examples=30, deadline=None)
@given(batch=batches(), growth=st.integers(0, 100))
def test_a_longer_tool_output_leaves_the_advantage_of_every_policy_token(estimator, batch, growth):
    """Three tokens a turn, then an observation of one token, or of up to 101."""
    advantages = estimator(tensors(batch))

    def policy_tokens(observation: int) -> Tensor:
        rows = [
            sum(([k] * 3 + [-1] * observation for k in range(len(e.process))), [])
            for e in batch.episodes
        ]
        width = max(len(row) for row in rows)
        turn_ids = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
        placed = place_turns(advantages, turn_ids)
        assert not placed[turn_ids == -1].any()
        return placed[turn_ids != -1]

    assert torch.equal(policy_tokens(1), policy_tokens(1 + growth))


@every_estimator
def test_rewards_are_not_written_to_and_keep_their_type(estimator):
    rewards = tensors(HAND, padding=0.0, dtype=torch.float32)
    before = rewards.process.clone(), rewards.outcome.clone()
    result = estimator(rewards)
    assert result.dtype == torch.float32
    assert result.shape == rewards.process.shape
    assert torch.equal(rewards.process, before[0])
    assert torch.equal(rewards.outcome, before[1])


# Errors


@every_estimator
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_process_reward_that_is_no_number_is_named(estimator, value):
    batch = Batch([HAND.episodes[0], Episode(1.0, (value,), (0,))], 2)
    with pytest.raises(ValueError, match="row 1 at turn 0; return 0.0"):
        estimator(tensors(batch))


@every_estimator
def test_an_infinite_outcome_is_named(estimator):
    batch = Batch([HAND.episodes[0], Episode(INF, (1.0,), (0,))], 2)
    with pytest.raises(ValueError, match=r"infinite one in rows \[1\]"):
        estimator(tensors(batch))


@pytest.mark.parametrize(
    "estimator", [e for e in ESTIMATORS if e is not reinforce_pp], ids=lambda f: f.__name__
)
def test_a_batch_of_broken_groups_is_refused(estimator):
    broken = dataclasses.replace(tensors(HAND), group_size=3)
    with pytest.raises(ValueError, match="2 rows do not fall into groups of 3"):
        estimator(broken)
