"""Which search follows from what has been seen: the rule behind demonstrations.

Layer 1. A text in, queries out; who asks them, and of what, is the caller's matter. Knowing which
passages matter only chooses between queries that anybody could have made: each is copied from the
question or a passage already shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_WORD = re.compile(r"[^\W_]+(?:['’.&-][^\W_]+)*")
_CAPITALISED = r"[A-Z0-9À-Þ][\w'’.&-]*"
_NAME = re.compile(rf"{_CAPITALISED}(?:\s+(?:(?:of|the|and|de|la|von|van)\s+)*{_CAPITALISED})*")
_SMALL_WORDS = """
a an the of in on at to for from by with as into about after before during over under between and or
but nor is are was were be been being am do does did has have had having can could will would should
may might must not that this these those there it its he she his her him they them their who whom
whose which what when where why how many much more most than then also both same other another
no yes
"""
_STOP_WORDS = frozenset(_SMALL_WORDS.split())


def following_queries(
    question: str, gold: Sequence[str], others: Sequence[str], missing: Sequence[str]
) -> Iterator[str]:
    """Queries for a missing passage, the most natural first; some may come twice.

    A missing title that stands in the question or in a passage, alone and then with the question's
    words; a name there that shares a word with a missing title; the question's words, without what
    has been found.

    Args:
        question: the row's.
        gold: supporting passages shown so far, `title: text`.
        others: the other passages shown so far.
        missing: titles of the supporting passages that were not shown.
    """
    words = content_words(question)
    for text in (question, *gold, *others):
        for _, name in sorted(filter(None, (mention(title, text) for title in missing))):
            yield name
            yield f"{name} {_without(words, name)}"
    wanted = {word for title in missing for word in content_words(title)}
    for text in (question, *gold):
        yield from (name for name in _NAME.findall(text) if wanted & set(content_words(name)))
    if not gold:
        yield " ".join(words)
    found = [passage.partition(": ")[0] for passage in gold]
    yield from (f"{title} {_without(words, title)}" for title in found)
    yield from (_without(words, title) for title in found)


def mention(title: str, text: str) -> tuple[int, str] | None:
    """Where a title stands in a text, and how; what is in brackets or after a comma may lack."""
    for name in dict.fromkeys((title, title.partition(" (")[0], title.partition(",")[0])):
        # A short name is often a word of the language: then its capitals must be there too.
        flags = re.IGNORECASE if len(name) > 4 else re.NOFLAG
        if name and (found := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, flags)):
            return found.start(), found[0]
    return None


def content_words(text: str) -> list[str]:
    """The words of a text that say what it is about, in their order."""
    return [word for word in _WORD.findall(text) if word.lower() not in _STOP_WORDS]


def _without(words: Sequence[str], name: str) -> str:
    """The words that are not in the name."""
    taken = {word.lower() for word in _WORD.findall(name)}
    return " ".join(word for word in words if word.lower() not in taken)
