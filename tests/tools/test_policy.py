"""A policy refuses values that mean nothing, and an episode keeps to its budgets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.tools.policy import EpisodeCalls, ToolPolicy


@pytest.mark.parametrize(
    "limits",
    [
        {"timeout": 0},
        {"retries": -1},
        {"retries": 1.5},
        {"backoff": -0.1},
        {"deadline": 0},
        {"concurrency": -1},
        {"concurrency": True},
        {"cache": 100},
        {"max_calls": 0},
        {"max_chars": "4k"},
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(limits):
    with pytest.raises(ValueError, match=f"ToolPolicy.{next(iter(limits))} is .*its default"):
        ToolPolicy(**limits)


@given(
    backoff=st.floats(0, 100),
    attempt=st.integers(1, 5000),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_a_pause_doubles_up_to_a_bound_and_is_half_random(backoff, attempt, draw):
    longest = min(backoff * 2.0 ** min(attempt - 1, 60), max(30.0, backoff))
    pause = ToolPolicy(backoff=backoff).pause(attempt, draw)
    assert longest / 2 <= pause <= longest


NAMES = ("search", "read", "finish")


@given(
    asked=st.lists(st.sampled_from(NAMES), max_size=30),
    each=st.none() | st.integers(1, 5),
    together=st.none() | st.integers(1, 10),
)
def test_no_budget_is_overrun_and_no_call_within_them_is_refused(asked, each, together):
    episode = EpisodeCalls(max_calls=together, finish_tool="finish")
    made = []
    for name in asked:
        others = [n for n in made if n != "finish"]
        own_full = each is not None and made.count(name) >= each
        all_full = together is not None and len(others) >= together and name != "finish"
        refusal = episode.refusal(name, each)
        assert (refusal is not None) == (own_full or all_full)
        if refusal is None:
            made.append(name)
        else:
            assert str(each if own_full else together) in refusal
    assert dict(episode.made) == {name: made.count(name) for name in set(made)}
