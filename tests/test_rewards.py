"""Rewards: the official scorers' values, and what a trajectory or turn without an answer earns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.parsing import render_call
from agentr1.rewards import (
    cover_exact_match,
    cover_exact_match_reward,
    environment_reward,
    exact_match,
    exact_match_reward,
    f1,
    f1_reward,
    format_reward,
    gold_answers,
    new_supporting_title,
    no_reward,
    normalize_answer,
    passages_in,
    repeated_query,
    titles_shown,
    valid_call,
)
from agentr1.types import Message, StopReason, ToolOutcome, Trajectory, Turn

WORDS = st.text(alphabet="abcdthe .,'-ÀÉ", max_size=30)


def trajectory(text: str, row=None, stop_reason=StopReason.ENVIRONMENT) -> Trajectory:
    turn = Turn(action_ids=(1,), logprobs=(0.0,), message=Message("assistant", text))
    row = {"answers": ["Paris", "city of Paris"]} if row is None else row
    return Trajectory(row, (Message("user", "Where?"),), (turn,), stop_reason)


def outcome(name="search", content="", failure=None, call_id="1", **arguments) -> ToolOutcome:
    return ToolOutcome(call_id, name, arguments, content, failure=failure)


# Strings


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("a U.S. state", "us state"),
        ("another theatre", "another theatre"),
        ("rock-n-roll", "rocknroll"),
        ("A", ""),
        ("", ""),
    ],
)
def test_normalize_answer_as_squad_does(text, normal):
    assert normalize_answer(text) == normal


@given(WORDS)
def test_normalising_keeps_words_apart_by_one_space(text):
    normal = normalize_answer(text)
    assert normal == " ".join(normal.split())
    assert not set(normal.split()) & {"a", "an", "the"}


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_the_three_metrics_are_ordered(prediction, answers):
    exact, cover = exact_match(prediction, answers), cover_exact_match(prediction, answers)
    assert exact <= cover
    assert 0.0 <= f1(prediction, answers) <= 1.0
    if exact and normalize_answer(prediction):
        assert f1(prediction, answers) == 1.0


def test_exact_match_takes_any_answer():
    assert exact_match("the paris.", ["Lyon", "Paris"]) == 1.0
    assert exact_match("Paris, France", ["Lyon", "Paris"]) == 0.0


def test_cover_exact_match_compares_whole_words_in_a_row():
    assert cover_exact_match("It is in New York City.", ["new york"]) == 1.0
    assert cover_exact_match("I know", ["no"]) == 0.0
    assert cover_exact_match("York is new", ["New York"]) == 0.0
    assert cover_exact_match("anything", ["The"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answers", "value"),
    [
        ("Barack Obama", ["Barack Hussein Obama"], 0.8),  # P = 1, R = 2/3
        ("Obama Obama", ["Obama"], 2 / 3),  # repeated words do not count twice
        ("Obama", ["Bush", "the Obama"], 1.0),
        ("Bush", ["Obama"], 0.0),
        ("yes", ["yes"], 1.0),
        ("yes it is", ["yes"], 0.0),  # a closed answer matches whole or not at all
        ("no", ["no one"], 0.0),
        ("", [""], 0.0),
    ],
)
def test_f1_as_the_official_hotpotqa_scorer(prediction, answers, value):
    assert f1(prediction, answers) == pytest.approx(value)


# Rows


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answers": ["a", "b"]}, ("a", "b")),
        ({"answer": "a"}, ("a",)),
        ({"answer": 42}, ("42",)),
        ({"answer": "a", "answers": None}, ("a",)),
    ],
)
def test_gold_answers(row, answers):
    assert gold_answers(row) == answers


@pytest.mark.parametrize("row", [{}, {"answers": []}, {"answers": "Paris"}, {"answer": None}])
def test_a_row_without_gold_is_refused_with_its_id(row):
    with pytest.raises(ValueError, match="row 'r7' has answers=.*add the column"):
        exact_match_reward([trajectory("Paris", row={**row, "id": "r7"})])


# Outcome rewards


def test_outcome_rewards_in_trl_s_signature():
    trajectories = [
        trajectory("<answer>Paris</answer>"),
        trajectory("<answer>Paris, France</answer>"),
        trajectory("<answer>Rome</answer>"),
    ]
    columns = {"prompts": [], "completions": [], "completion_ids": [], "trainer_state": None}
    assert exact_match_reward(trajectories=trajectories, **columns) == [1.0, 0.0, 0.0]
    assert cover_exact_match_reward(trajectories=trajectories, **columns) == [1.0, 1.0, 0.0]
    assert f1_reward(trajectories=trajectories, **columns) == pytest.approx([1.0, 2 / 3, 0.0])


@pytest.mark.parametrize("stop_reason", [r for r in StopReason if not r.is_terminal])
@pytest.mark.parametrize("reward", [exact_match_reward, cover_exact_match_reward, f1_reward])
def test_a_truncated_trajectory_has_no_answer(reward, stop_reason):
    assert reward([trajectory("<answer>Paris</answer>", stop_reason=stop_reason)]) == [0.0]


@pytest.mark.parametrize("reward", [exact_match_reward, cover_exact_match_reward, f1_reward])
def test_an_empty_answer_earns_nothing_even_where_the_gold_normalises_to_nothing(reward):
    assert reward([trajectory("<answer></answer>", row={"answer": "A"})]) == [0.0]


@pytest.mark.parametrize("reward", [exact_match_reward, cover_exact_match_reward, f1_reward])
def test_neither_a_call_nor_thinking_is_an_answer(reward):
    call = '<tool_call>\n{"name": "finish", "arguments": {"answer": "Paris"}}\n</tool_call>'
    assert reward([trajectory(call)]) == [0.0]
    assert reward([trajectory("<think>Paris</think>")]) == [0.0]
    assert reward([trajectory("<think>Rome?</think>Paris")]) == [1.0]


def test_what_was_given_to_the_finish_tool_is_the_answer():
    call = render_call("answer", {"text": "Paris"})
    assert exact_match_reward([trajectory(f"Rome? {call}")]) == [1.0]
    assert exact_match_reward([trajectory(f"<answer>Rome</answer>{call}")]) == [1.0]
    assert exact_match_reward([trajectory(call, stop_reason=StopReason.MAX_TURNS)]) == [0.0]


@pytest.mark.parametrize(
    ("texts", "stop_reason", "value"),
    [
        (["<answer>x</answer>"], StopReason.ENVIRONMENT, 1.0),
        (["<answer>x</answer>"], StopReason.MAX_TOKENS, 0.5),
        (["x"], StopReason.ENVIRONMENT, 0.5),
        ([render_call("search", {}), "<answer>x</answer>"], StopReason.ENVIRONMENT, 1.0),
        ([render_call("no such tool", {}), "<answer>x</answer>"], StopReason.ENVIRONMENT, 1.0),
        (["<tool_call>", "<answer>x</answer>"], StopReason.ENVIRONMENT, 0.5),
        (["<tool_call>", "x"], StopReason.ENVIRONMENT, 0.0),
    ],
)
def test_form_is_the_mean_of_the_answers_and_the_calls(texts, stop_reason, value):
    turns = tuple(Turn((1,), (0.0,), Message("assistant", text)) for text in texts)
    assert format_reward([Trajectory({}, (), turns, stop_reason)]) == [value]


# Process rewards


def test_valid_call_is_paid_once_for_a_turn_without_mistakes():
    row = {}
    assert valid_call(row, (outcome(), outcome()), ()) == 1.0
    assert valid_call(row, (outcome(), outcome(failure="mistake")), ()) == 0.0
    assert valid_call(row, (outcome(failure="fault"),), ()) == 1.0
    assert valid_call(row, (), (outcome(),)) == 0.0


TITLES = {"supporting_titles": ["Paris", "Lyon", "Nice", "Metz"]}


def test_new_supporting_title_is_paid_once_per_title():
    first = outcome(content="Paris: a city.\nRome: no.\nLyon: another.")
    again = outcome(content="Paris: a city.\nNice: a third.")
    assert new_supporting_title(TITLES, (first,), ()) == 0.5
    assert new_supporting_title(TITLES, (again,), (first,)) == 0.25
    assert new_supporting_title(TITLES, (first, first), ()) == 0.5
    assert new_supporting_title(TITLES, (), (first,)) == 0.0


def test_new_supporting_title_looks_at_the_start_of_lines_of_successful_results_only():
    assert new_supporting_title(TITLES, (outcome(content="About Paris: a city"),), ()) == 0.0
    assert new_supporting_title(TITLES, (outcome(content="Paris is a city"),), ()) == 0.0
    answer = outcome(name="answer", content="Paris: said by the policy itself")
    assert new_supporting_title(TITLES, (answer,), ()) == 0.0
    wrong = outcome(content="Paris: echoed", failure="mistake")
    assert new_supporting_title(TITLES, (wrong,), ()) == 0.0
    assert new_supporting_title(TITLES, (outcome(content="Paris: a city"),), (wrong,)) == 0.25


def test_new_supporting_title_and_rows_without_titles():
    assert new_supporting_title({"supporting_titles": []}, (outcome(content="Paris: "),), ()) == 0.0
    with pytest.raises(ValueError, match="row 3 has supporting_titles=None"):
        new_supporting_title({"id": 3}, (outcome(),), ())


@pytest.mark.parametrize(
    ("title", "line", "shown"),
    [
        ("Atlas Shrugged: Part I", "Atlas Shrugged: Part I: a film.", True),
        ("Atlas Shrugged: Part I", "Atlas Shrugged: Part II: a film.", False),
        ("Atlas Shrugged", "Atlas Shrugged: a novel: long.", True),
        ("Atlas Shrugged", "Atlas Shrugged: Part I: a film.", True),  # cannot be told apart
        ("Shrugged", "Atlas Shrugged: a novel.", False),
        ("Atlas", "Atlas Shrugged: a novel.", False),
        ("point foundation (Environment)", "Point Foundation (environment): gave.", True),
        ("Beyonce\N{COMBINING ACUTE ACCENT}", "Beyoncé: a singer.", True),
        ("Beyonce", "Beyoncé: a singer.", False),
        ("Ulm  Minster", "Ulm Minster: a church.", True),
        ("Ulm", "Ulm:no space", False),
        ("What? (C++)", "What? (C++): [sic] *", True),
        ("cut", "[cut: 12 more characters]", False),
    ],
)
def test_a_title_is_shown_where_a_passage_begins_with_it(title, line, shown):
    result = f"Rome: of {line}\n{line}\nNice: {line}"
    assert titles_shown([title, "Genoa"], result) == ({title} if shown else set())


def test_a_line_separator_inside_a_passage_begins_no_passage():
    result = "Rome: old\N{LINE SEPARATOR}Paris: no\N{NEXT LINE}Paris: no\x0cParis: no"
    assert titles_shown(["Paris", "Rome"], result) == {"Rome"}
    assert titles_shown(["12"], "12:30 to Rome: a train") == set()
    assert passages_in(f"{result}\nLyon: b\n[cut: 3 more characters]") == [result, "Lyon: b"]
    assert passages_in("No results.") == []


def test_a_query_is_repeated_in_other_letters_too():
    first = outcome(query="Ulm Minster", k=3)
    assert repeated_query({}, (outcome(query=" ulm  minster ", k=3),), (first,)) == -1.0
    assert repeated_query({}, (outcome(query="ulm minster", k=4),), (first,)) == 0.0
    assert repeated_query({}, (outcome(query="ulmminster", k=3),), (first,)) == 0.0


def test_repeated_query_counts_equal_calls():
    one, two = outcome(query="x"), outcome(query="y")
    other_tool = outcome(name="look", query="x")
    assert repeated_query({}, (one, two, other_tool), ()) == 0.0
    assert repeated_query({}, (one,), (two, one)) == -1.0
    assert repeated_query({}, (one, one, two), (two,)) == -2.0
    assert repeated_query({}, (), (one,)) == 0.0


def test_repeated_query_forgives_a_second_try_after_a_fault_and_ignores_unreadable_calls():
    assert repeated_query({}, (outcome(query="x"),), (outcome(query="x", failure="fault"),)) == 0.0
    unreadable = outcome(name="", failure="mistake")
    assert repeated_query({}, (unreadable, unreadable), (unreadable,)) == 0.0
    mistake = outcome(query="x", failure="mistake")
    assert repeated_query({}, (mistake,), (mistake,)) == -1.0


def test_what_the_environment_paid_is_a_metric_and_no_reward_is_none() -> None:
    def paid(*amounts: float) -> Trajectory:
        said = Message("assistant", "x")
        turns = tuple(Turn((1,), (0.0,), said, reward=amount) for amount in amounts)
        return Trajectory({}, (), turns, StopReason.ENVIRONMENT)

    played = [paid(0.25, 0.5), paid(0.0)]
    assert environment_reward(trajectories=played) == [0.75, 0.0]
    assert no_reward(trajectories=played) == [0.0, 0.0]
