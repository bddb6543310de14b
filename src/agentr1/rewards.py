"""Rewards as plain functions: what a trajectory and what a turn is worth.

Layer 1: knows the data model and how an answer is read from text, but no tokens, tensors, tools
or trainer. Outcome rewards have TRL's signature and read the extra column `trajectories`; process
rewards take the row, the outcomes of this turn's calls and those of all earlier turns, and a tool
environment calls them once per turn. Evaluation calls the very same functions, so that training
and evaluation cannot drift apart.

Answers are compared as the official scorers do, with the best of the accepted answers:

- Exact match and its normalisation are those of all four, SQuAD v1.1, HotpotQA, 2WikiMultihopQA and
  MuSiQue: only ASCII punctuation goes ("St. Mary's" is "st marys", but a curly apostrophe stays),
  words joined by a hyphen become one, accents count, "1,000" is "1000" but not "one thousand".
- F1 is that of HotpotQA and 2WikiMultihopQA: yes, no and noanswer match whole or not at all. SQuAD
  and MuSiQue compare them like other words: for "no one" instead of "no", 2/3 there and 0 here.
- An empty answer earns 0 as a reward. On text that normalises to nothing ("The" for "A") the
  scorers give an exact match, MuSiQue an F1 of 1 as well; here F1 is 0, as in the other three.

Cover-EM is a different, more lenient metric: never put one number beside the other under one name.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from agentr1.parsing import (
    ANSWER_CALL,
    MalformedCall,
    answer_text,
    is_well_formed_answer,
    parse_turn,
)
from agentr1.types import Row, StopReason, ToolOutcome, Trajectory

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def normalize_answer(text: str) -> str:
    """Lower-case, without punctuation, articles and extra spaces: SQuAD's normalisation."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the answers after normalisation, else 0.0."""
    predicted = normalize_answer(prediction)
    return float(any(predicted == normalize_answer(answer) for answer in answers))


def cover_exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the words of one of the answers stand in the prediction, in a row, else 0.0.

    Whole words: "no" is not covered by "know". An answer that normalises to nothing covers only
    a prediction that does so too.
    """
    predicted = normalize_answer(prediction)
    return float(any(_covers(predicted, normalize_answer(answer)) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Highest word-overlap F1 over the answers; yes, no and noanswer match whole or not at all."""
    return max((_f1_of_one(prediction, answer) for answer in answers), default=0.0)


def gold_answers(row: Row) -> tuple[str, ...]:
    """The accepted answers of a row: its `answers`, or its one `answer`."""
    answers = row.get("answers")
    if answers is None and row.get("answer") is not None:
        answers = [row["answer"]]
    if isinstance(answers, str) or not isinstance(answers, Sequence) or not answers:
        raise ValueError(
            f"row {row.get('id')!r} has answers={answers!r} and columns {sorted(row)}; this reward "
            "needs a non-empty list in `answers` or one value in `answer`: add the column, or "
            "choose a reward that needs no gold answer"
        )
    return tuple(str(answer) for answer in answers)


def predicted_answer(trajectory: Trajectory) -> str:
    """What the policy answered, see `parsing.answer_text`; "" where a limit cut it off before."""
    return answer_text(trajectory.final_text) if trajectory.stop_reason.is_terminal else ""


def environment_reward(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    """What the environment paid in all; a metric, for as a reward it would count twice.

    Except where `process_credit: trajectory` adds it and leaves the turns without.
    """
    return [float(sum(trajectory.process_rewards)) for trajectory in trajectories]


def overlong_penalty(max_completion_length: int, share: float) -> Callable[..., list[float]]:
    """DAPO's soft overlong punishment (arXiv 2503.14476) as an outcome reward.

    0 up to (1 - share) x max_completion_length tokens, actions and observations of the last
    context together, then falling linearly to -1 at max_completion_length; -1 too for an episode
    that was cut for its length.

    Args:
        max_completion_length: the budget of an episode in tokens.
        share: of the budget, at its end, in (0, 1].
    """
    buffer = share * max_completion_length

    def overlong(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
        over = [_context_length(t) - (max_completion_length - buffer) for t in trajectories]
        cut = [t.stop_reason is StopReason.MAX_TOKENS for t in trajectories]
        return [
            -1.0 if at_end else -min(1.0, max(0.0, tokens / buffer))
            for tokens, at_end in zip(over, cut, strict=True)
        ]

    return overlong


def _context_length(trajectory: Trajectory) -> int:
    """Tokens after the last prompt the policy was shown."""
    length = 0
    for turn in trajectory.turns:
        length = 0 if turn.prompt_ids is not None else length
        length += len(turn.action_ids) + len(turn.observation_ids)
    return length


def no_reward(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    """0 for every trajectory, where the environment's process rewards are all there is."""
    return [0.0] * len(trajectories)


def exact_match_reward(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    """Exact match of each final answer; 0 for a trajectory without an answer."""
    return [_score(trajectory, exact_match) for trajectory in trajectories]


def cover_exact_match_reward(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    """Cover-EM of each final answer; 0 for a trajectory without an answer.

    As a reward it can be had by listing many candidates: watch the answers' length.
    """
    return [_score(trajectory, cover_exact_match) for trajectory in trajectories]


def f1_reward(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    """F1 of each final answer; 0 for a trajectory without an answer."""
    return [_score(trajectory, f1) for trajectory in trajectories]


def format_reward(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    """Mean of two marks, each 0 or 1: the answer's form and that of the calls.

    The answer's: the environment ended the episode and its last turn ends with one answer, see
    `parsing.is_well_formed_answer`. The calls': none in the episode that cannot be read; whether
    tool and arguments exist is no matter of form. An episode without calls has none that is wrong.
    """
    return [(_answer_form(t) + _calls_form(t)) / 2.0 for t in trajectories]


def valid_call(row: Row, outcomes: tuple[ToolOutcome, ...], past: tuple[ToolOutcome, ...]) -> float:
    """1.0 for a turn that calls and makes no mistake in any of its calls, else 0.0.

    A fault of our infrastructure is not the policy's mistake and does not cost it the reward. A
    turn without calls earns nothing, so every calling turn adds up: give it a small weight, or the
    policy learns to call until its turns run out.
    """
    return float(bool(outcomes) and all(outcome.failure != "mistake" for outcome in outcomes))


def new_supporting_title(
    row: Row, outcomes: tuple[ToolOutcome, ...], past: tuple[ToolOutcome, ...]
) -> float:
    """Share of the row's supporting titles that this turn's results show for the first time.

    What counts as shown: `titles_shown`. The rewards of an episode add up to at most 1. A row whose
    `supporting_titles` is empty earns 0.
    """
    titles = row.get("supporting_titles")
    if isinstance(titles, str) or not isinstance(titles, Sequence):
        raise ValueError(
            f"row {row.get('id')!r} has supporting_titles={titles!r} and columns {sorted(row)}; "
            "new_supporting_title needs a list of titles there: add the column, or drop this reward"
        )
    wanted = set(titles)
    new = _titles_seen(wanted, outcomes) - _titles_seen(wanted, past)
    return len(new) / len(wanted) if wanted else 0.0


def repeated_query(
    row: Row, outcomes: tuple[ToolOutcome, ...], past: tuple[ToolOutcome, ...]
) -> float:
    """-1.0 for each call of this turn that equals an earlier one in name and arguments.

    Texts that differ in case or spacing alone are equal. Earlier calls of the same turn count.
    Trying again after a fault of our infrastructure is no repetition, and calls that could not be
    read are not compared.
    """
    earlier = [_call(outcome) for outcome in past if outcome.failure != "fault"]
    repeats = 0
    for outcome in outcomes:
        repeats += bool(outcome.name) and _call(outcome) in earlier
        earlier.append(_call(outcome))
    return -1.0 * repeats if repeats else 0.0


def passages_in(result: str) -> list[str]:
    """The passages of a search result, one `title: text` a line, as the search tool writes them."""
    return [line for line in result.split("\n") if ": " in line and not line.startswith("[cut: ")]


def titles_shown(titles: Iterable[str], result: str) -> set[str]:
    """Those of the titles that a search result shows: its passages begin with "{title}: ".

    Case, spacing and the way accents are encoded do not matter. A title that is another one up to
    its colon ("Michael Jackson" and "Michael Jackson: The Last Photo Shoots") cannot be told from
    it; both count as shown.
    """
    lines = [_comparable(line) for line in passages_in(result)]
    return {t for t in titles if any(line.startswith(f"{_comparable(t)}: ") for line in lines)}


def _score(trajectory: Trajectory, metric: Callable[[str, Sequence[str]], float]) -> float:
    answers = gold_answers(trajectory.row)
    prediction = predicted_answer(trajectory)
    return metric(prediction, answers) if prediction else 0.0


def _covers(predicted: str, answer: str) -> bool:
    # Both are words joined by single spaces, so framing them with spaces compares whole words.
    return f" {answer} " in f" {predicted} " if answer else not predicted


def _f1_of_one(prediction: str, answer: str) -> float:
    predicted, gold = normalize_answer(prediction), normalize_answer(answer)
    if predicted != gold and (predicted in _CLOSED_ANSWERS or gold in _CLOSED_ANSWERS):
        return 0.0
    predicted_words, gold_words = Counter(predicted.split()), Counter(gold.split())
    shared = (predicted_words & gold_words).total()
    # 2PR / (P + R) with P = shared / predicted and R = shared / gold.
    return 2.0 * shared / (predicted_words.total() + gold_words.total()) if shared else 0.0


def _answer_form(trajectory: Trajectory) -> bool:
    return trajectory.stop_reason.is_terminal and is_well_formed_answer(trajectory.final_text)


def _calls_form(trajectory: Trajectory) -> bool:
    calls = [c for turn in trajectory.turns for c in parse_turn(turn.message.content).calls]
    return not any(isinstance(call, MalformedCall) for call in calls)


def _titles_seen(titles: set[str], outcomes: tuple[ToolOutcome, ...]) -> set[str]:
    # An answer given by a call comes back as it was said: that is no evidence.
    given = [o for o in outcomes if o.failure is None and o.name != ANSWER_CALL]
    results = [outcome.content for outcome in given]
    return {title for result in results for title in titles_shown(titles, result)}


def _call(outcome: ToolOutcome) -> tuple[str, dict[str, object]]:
    values = outcome.arguments.items()
    return outcome.name, {k: _comparable(v) if isinstance(v, str) else v for k, v in values}


def _comparable(text: str) -> str:
    """The text in one case, with single spaces and composed accents."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
