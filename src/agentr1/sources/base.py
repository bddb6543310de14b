"""What every reader gives: one question with its passages; and the checks that readers share.

Layer 1. A reader takes one record of its data set, as the official file or the Hub has it, and
knows neither files nor splits, samples or corpora. What is wrong in a record is a `ValueError`
that begins with the place the record came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """One passage that came with a question.

    Attributes:
        title: what the passage is about.
        text: the passage itself; an empty one is left out of every corpus.
    """

    title: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """One question of any data set.

    Attributes:
        id: "" where the data set has none.
        question: as it was asked.
        answers: accepted ones, the official one first; none where they are withheld.
        supporting_titles: of the passages that prove the answer; None where nobody knows them.
        hops: facts that the answer needs.
        type: kind of question, in the words of its data set.
        level: difficulty, likewise.
        passages: that came with the question.
        gold: positions in `passages` of those that prove the answer.
        answerable: False where the passages deliberately do not hold the answer.
        more: further columns of the row.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    supporting_titles: tuple[str, ...] | None = None
    hops: int | None = None
    type: str | None = None
    level: str | None = None
    passages: tuple[Context, ...] = ()
    gold: tuple[int, ...] = ()
    answerable: bool = True
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def has_all_gold(self) -> bool:
        """Whether the passages that prove the answer all came with the question, none empty."""
        gold = [self.passages[at] for at in self.gold]
        titles = {passage.title for passage in gold}
        return (
            bool(self.passages)
            and all(passage.text for passage in gold)
            and titles.issuperset(self.supporting_titles or ())
        )


Reader = Callable[[Mapping[str, Any], str], Question]
"""`read(record, place)`; raises `ValueError` with the place, the field and what was expected."""


def wrong(record: Mapping[str, Any], name: str, place: str, expected: str) -> ValueError:
    """The error for a field that is not what it should be."""
    found = repr(record.get(name))
    shown = found if len(found) <= 80 else f"{found[:77]}..."
    return ValueError(
        f"{place}: {name!r} must be {expected}, got {shown} among the columns {sorted(record)}; "
        "mend the record, or check that the file is of this data set"
    )


def text_of(record: Mapping[str, Any], name: str, place: str) -> str:
    """A text that must be there and must not be empty."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise wrong(record, name, place, "a text that is not empty")
    return whole(value.strip(), name, place)


def optional_text(record: Mapping[str, Any], name: str, place: str) -> str | None:
    """A text that may be missing or empty."""
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(record, name, place, "a text, or missing")
    return whole(value.strip(), name, place) or None if value else None


def optional_number(record: Mapping[str, Any], name: str, place: str) -> int | None:
    """A whole number that may be missing."""
    value = record.get(name)
    if value is not None and type(value) is not int:
        raise wrong(record, name, place, "a whole number, or missing")
    return value


def list_of(record: Mapping[str, Any], name: str, place: str) -> Sequence[Any]:
    """A list that must be there."""
    value = record.get(name)
    if not isinstance(value, list | tuple):
        raise wrong(record, name, place, "a list")
    return value


def texts_of(record: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    """A list of texts that may be missing; empty ones and repetitions are dropped."""
    if record.get(name) is None:
        return ()
    values = list_of(record, name, place)
    if not all(isinstance(value, str) for value in values):
        raise wrong(record, name, place, "a list of texts")
    return unique(whole(value.strip(), name, place) for value in values)


def pairs_of(
    record: Mapping[str, Any], name: str, keys: tuple[str, str], place: str
) -> list[tuple[str, Any]]:
    """A list of (text, value), in any of the three shapes that it is published in.

    Args:
        record: the record.
        name: of the field.
        keys: names of the two halves where they are named: the Hub has `{first: [...], second:
            [...]}` or `[{first: ..., second: ...}]` where official files have `[[..., ...]]`.
        place: of the record.
    """
    value, (first, second) = record.get(name), keys
    try:
        if isinstance(value, Mapping):
            pairs = list(zip(value[first], value[second], strict=True))
        else:
            entries = list_of(record, name, place)
            pairs = [(e[first], e[second]) if isinstance(e, Mapping) else (*e,) for e in entries]
        checked = [(whole(left.strip(), name, place), right) for left, right in pairs]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise wrong(record, name, place, f"a list of [{first}, {second}]") from error
    return checked


def contexts_of(record: Mapping[str, Any], place: str, glue: str) -> tuple[Context, ...]:
    """The passages of HotpotQA's shape: titles, each with a list of sentences.

    Args:
        record: the record.
        place: of the record.
        glue: between two sentences.
    """
    passages = []
    for title, sentences in pairs_of(record, "context", ("title", "sentences"), place):
        if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
            raise wrong(record, "context", place, "a list of [title, [sentence, ...]]")
        text = glue.join(sentences if not glue else [s.strip() for s in sentences])
        passages.append(Context(title, whole(text.strip(), "context", place)))
    return tuple(passages)


def supporting(
    record: Mapping[str, Any], passages: Sequence[Context], place: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Titles of HotpotQA's `supporting_facts`, and where among the passages they are."""
    if record.get("supporting_facts") is None:
        return (), ()
    facts = pairs_of(record, "supporting_facts", ("title", "sent_id"), place)
    titles = unique(title for title, _ in facts)
    places = {passage.title: i for i, passage in reversed(list(enumerate(passages)))}
    return titles, tuple(places[title] for title in titles if title in places)


def unique(texts: Any) -> tuple[str, ...]:
    """The texts that are not empty, each once, in their order."""
    return tuple(dict.fromkeys(text for text in texts if text))


def whole(text: str, name: str, place: str) -> str:
    """The text, if it can be written as UTF-8: JSON can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {name!r} holds half of a surrogate pair at character {error.start}, which "
            "is no text; mend the escape in the file"
        ) from error
    return text
