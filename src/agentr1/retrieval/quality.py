"""How good an index is for a set of questions, and how far its corpus can carry any agent.

Layer 1. Two measures. Recall: of the passages that support a question, how many one query with the
question's own words brings among the first k. Answer coverage: whether a gold answer stands in the
corpus at all, as the metrics compare text; no agent that answers from what it reads can be right
more often. Knows rows and passages, no agents.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from agentr1.retrieval.base import Hit, Index, Passage
from agentr1.rewards import gold_answers, normalize_answer
from agentr1.types import Row

BATCH = 64
_CLOSED = frozenset({"yes", "no", "noanswer"})
"""Answers that stand nowhere and need not."""


class Recall(NamedTuple):
    """What one query a question brings.

    Attributes:
        questions: those with supporting passages; the others are left out.
        found: k to the share of a question's supporting passages among the first k, averaged.
        all_found: k to the share of questions with all their supporting passages there.
    """

    questions: int
    found: dict[int, float]
    all_found: dict[int, float]


class Coverage(NamedTuple):
    """How many questions a corpus can answer.

    Attributes:
        questions: all of them.
        closed: those whose answer is yes or no, which stands in no passage.
        covered: of the others, those with an answer in some passage.
    """

    questions: int
    closed: int
    covered: int

    @property
    def share(self) -> float:
        """Of the questions that are not yes or no, those covered; nan if there are none."""
        rest = self.questions - self.closed
        return self.covered / rest if rest else float("nan")

    @property
    def ceiling(self) -> float:
        """Share of all questions that are covered, or closed and so open to a guess."""
        return (self.covered + self.closed) / self.questions


def recall(index: Index, rows: Sequence[Row], ks: Sequence[int]) -> Recall:
    """Search with every question as it stands and look for its supporting passages.

    Args:
        index: to be judged.
        rows: questions with `gold_ids`, ids of passages, or else `supporting_titles`.
        ks: how many hits to look at.

    Raises:
        ValueError: no row has supporting passages, or a k is below 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"expected values of k of at least 1, got {list(ks)}")
    supported = [row for row in rows if _gold(row)]
    if not supported:
        raise ValueError(
            "no row has `gold_ids` or `supporting_titles`, so there is no recall to measure"
        )
    shares: dict[int, list[float]] = {k: [] for k in ks}
    for start in range(0, len(supported), BATCH):
        batch = supported[start : start + BATCH]
        answers = index.search([row["question"] for row in batch], max(ks))
        for row, hits in zip(batch, answers, strict=True):
            for k in ks:
                shares[k].append(_share_found(row, hits[:k]))
    return Recall(
        questions=len(supported),
        found={k: sum(values) / len(values) for k, values in shares.items()},
        all_found={k: sum(v == 1.0 for v in values) / len(values) for k, values in shares.items()},
    )


def coverage(rows: Sequence[Row], found: frozenset[str]) -> Coverage:
    """Count the questions that a corpus can answer.

    Args:
        rows: questions with their gold answers.
        found: as `answers_in` returns it for these rows, or for more.

    Raises:
        ValueError: there are no rows, or one has no gold answers.
    """
    if not rows:
        raise ValueError("expected at least one question to measure coverage, got none")
    states = [is_covered(row, found) for row in rows]
    return Coverage(len(rows), states.count(None), states.count(True))


def is_covered(row: Row, found: frozenset[str]) -> bool | None:
    """Whether a gold answer of one question is among those found; None for yes or no."""
    answers = {normalize_answer(answer) for answer in gold_answers(row)}
    return None if answers <= _CLOSED else not found.isdisjoint(answers)


def answers_in(passages: Iterable[Passage], rows: Iterable[Row]) -> frozenset[str]:
    """Find the gold answers that stand in some passage, in one pass over the corpus.

    An answer stands there when its words do, in a row, after `normalize_answer` on both sides; the
    title counts, since a search shows it.

    Args:
        passages: the corpus, looked at one by one.
        rows: questions with their gold answers; yes and no are not looked for.

    Returns:
        The normalised answers found.
    """
    wanted = _by_first_word(rows)
    found: set[str] = set()
    for passage in passages:
        if not wanted:
            break
        text = f" {normalize_answer(f'{passage.title} {passage.text}')} "
        for word in wanted.keys() & set(text.split()):
            here = {answer for answer in wanted[word] if f" {answer} " in text}
            found |= here
            wanted[word] -= here
            if not wanted[word]:
                del wanted[word]
    return frozenset(found)


def summary(measured: Recall | None, covered: Coverage) -> dict[str, Any]:
    """One question file's numbers as `quality.json` keeps them."""
    record: dict[str, Any] = {
        "questions": covered.questions,
        "answer_coverage": covered.share,
        "yes_no": covered.closed,
        "ceiling": covered.ceiling,
    }
    if measured is not None:
        record |= {
            "with_support": measured.questions,
            "recall": {str(k): value for k, value in measured.found.items()},
            "all_found": {str(k): value for k, value in measured.all_found.items()},
        }
    return record


def has_support(rows: Iterable[Row]) -> bool:
    """Whether any row names its supporting passages."""
    return any(_gold(row) for row in rows)


def _gold(row: Row) -> tuple[str, frozenset[str]] | None:
    """Which attribute of a passage names a row's supporting ones, and their names."""
    if row.get("gold_ids"):
        return "id", frozenset(row["gold_ids"])
    if row.get("supporting_titles"):
        return "title", frozenset(row["supporting_titles"])
    return None


def _share_found(row: Row, hits: Sequence[Hit]) -> float:
    gold = _gold(row)
    assert gold is not None
    attribute, names = gold
    return len(names & {getattr(hit.passage, attribute) for hit in hits}) / len(names)


def _by_first_word(rows: Iterable[Row]) -> dict[str, set[str]]:
    wanted: dict[str, set[str]] = collections.defaultdict(set)
    for row in rows:
        answers = {normalize_answer(answer) for answer in gold_answers(row)}
        for answer in answers - _CLOSED - {""}:
            wanted[answer.partition(" ")[0]].add(answer)
    return dict(wanted)
