"""Trajectory to training rows: the mask is built here and nowhere else."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.segments import flatten
from agentr1.types import Message, Segment, StopReason, Trajectory, Turn

SPOKEN = Message("assistant", "")


def trajectory(*turns: Turn) -> Trajectory:
    return Trajectory({"id": "r"}, (), turns, StopReason.ENVIRONMENT)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    ids = st.lists(st.integers(0, 99), max_size=4).map(tuple)
    turns = []
    for k in range(draw(st.integers(1, 6))):
        action = draw(ids)
        turns.append(
            Turn(
                action_ids=action,
                logprobs=tuple(-(k + 1) / (i + 1) for i in range(len(action))),
                message=SPOKEN,
                observation_ids=draw(ids),
                prompt_ids=draw(ids) if k == 0 or draw(st.booleans()) else None,
                fault=draw(st.sampled_from([None, None, "server gone"])),
            )
        )
    return trajectory(*turns)


def test_a_mixed_episode_becomes_these_two_rows() -> None:
    episode = trajectory(
        Turn((5, 6), (-0.1, -0.2), SPOKEN, observation_ids=(7, 8, 9), prompt_ids=(1, 2)),
        Turn((10,), (-0.3,), SPOKEN, observation_ids=(11,), fault="server gone"),
        Turn((12, 13), (-0.4, -0.5), SPOKEN),
        Turn((14,), (-0.6,), SPOKEN, prompt_ids=(3,)),
    )
    assert flatten(episode) == [
        Segment(
            prompt_ids=(1, 2),
            completion_ids=(5, 6, 7, 8, 9, 10, 11, 12, 13),
            loss_mask=(1, 1, 0, 0, 0, 0, 0, 1, 1),
            logprobs=(-0.1, -0.2, 0.0, 0.0, 0.0, 0.0, 0.0, -0.4, -0.5),
            turn_ids=(0, 0, -1, -1, -1, 1, -1, 2, 2),
        ),
        Segment((3,), (14,), (1,), (-0.6,), (3,)),
    ]


@given(episode=trajectories())
def test_the_mask_is_1_exactly_on_sampled_ids_of_turns_without_a_fault(episode: Trajectory) -> None:
    segments = flatten(episode)
    trained = [
        (token, logprob)
        for s in segments
        for token, bit, logprob in zip(s.completion_ids, s.loss_mask, s.logprobs, strict=True)
        if bit
    ]
    healthy = [turn for turn in episode.turns if turn.fault is None]
    sampled = [pair for t in healthy for pair in zip(t.action_ids, t.logprobs, strict=True)]
    assert trained == sampled
    assert {bit for s in segments for bit in s.loss_mask} <= {0, 1}


@given(episode=trajectories())
def test_logprobs_are_0_where_the_mask_is_0(episode: Trajectory) -> None:
    for s in flatten(episode):
        assert all(bit or not lp for bit, lp in zip(s.loss_mask, s.logprobs, strict=True))


@given(episode=trajectories())
def test_no_id_is_lost_and_a_new_context_begins_a_new_row(episode: Trajectory) -> None:
    segments = flatten(episode)
    prompts = [turn.prompt_ids for turn in episode.turns if turn.prompt_ids is not None]
    assert [s.prompt_ids for s in segments] == prompts
    everything = chain.from_iterable((*t.action_ids, *t.observation_ids) for t in episode.turns)
    assert list(chain.from_iterable(s.completion_ids for s in segments)) == list(everything)


@given(episode=trajectories())
def test_turn_ids_are_constant_in_a_turn_and_minus_1_on_observations(episode: Trajectory) -> None:
    expected = [
        [k] * len(turn.action_ids) + [-1] * len(turn.observation_ids)
        for k, turn in enumerate(episode.turns)
    ]
    got = chain.from_iterable(s.turn_ids for s in flatten(episode))
    assert list(got) == list(chain.from_iterable(expected))


@pytest.mark.parametrize("turns", [(), (Turn((1,), (0.0,), SPOKEN),)])
def test_an_episode_without_a_prompt_is_refused(turns: tuple[Turn, ...]) -> None:
    with pytest.raises(ValueError, match=f"got {len(turns)} turns for row .*'id': 'r'"):
        flatten(trajectory(*turns))


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one length, got .*'loss_mask': 1"):
        Segment((1,), (2, 3), (1,), (0.0, 0.0), (0, 0))
    with pytest.raises(ValueError, match="got 2 ids and 1 logprobs"):
        Turn((1, 2), (0.0,), SPOKEN)
