"""Scripted, deliberately imperfect conversations that the quickstart's cold start imitates.

Each comes from a fresh world, and its flaw is drawn without a look at the question: the policy
learns to search, read and copy from all of them, but also to stop too early. What is right shows
in a minority of the long conversations only, and reinforcement learning has to find it.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

from world import TOP_K, Names, Question, World, draw_questions, make_world, passages_of

from agentr1.retrieval.base import Passage
from agentr1.retrieval.bm25 import Bm25Index
from agentr1.tools.search import Search

SYSTEM_PROMPT = "Answer with the tool's help. Reply with the answer alone."
SEARCH_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": Search.name,
        "description": Search.description,
        "parameters": dict(Search.parameters),
    },
}
NO_RESULTS = "No results."

Conversation = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Flaws:
    """How often a demonstration goes wrong, whatever its question.

    Attributes:
        guess: answers with a name from the question and never searches.
        malformed: leaves the last brace off a call.
        wrong_search: searches a part of the name and believes the first passage.
        wrong_fact: reads another fact on the last passage.
        impatience: chance, before each search but the first, of answering right away.
    """

    guess: float = 0.08
    malformed: float = 0.04
    wrong_search: float = 0.08
    wrong_fact: float = 0.08
    impatience: float = 0.6


NO_FLAWS = Flaws(0.0, 0.0, 0.0, 0.0, 0.0)
PEOPLE = 60
MIX = {"1": 0.24, "2": 0.36, "3": 0.2, "comparison": 0.2}


def demonstrations(
    rng: random.Random, worlds: int, per_world: int, flaws: Flaws, mix: dict[str, float]
) -> Iterator[Conversation]:
    """Yield `per_world` conversations from each of `worlds` fresh worlds."""
    counts = {label: round(share * per_world) for label, share in mix.items()}
    for _ in range(worlds):
        names = Names(rng, PEOPLE)
        world = make_world(rng, names, [names.country() for _ in range(12)], PEOPLE)
        index = Bm25Index(passages_of([world], rng))
        for question in draw_questions(world, index, rng, counts):
            yield Demonstrator(world, index, rng, flaws).answer(question)


class Demonstrator:
    """Plays one conversation about a world it knows by heart."""

    def __init__(self, world: World, index: Bm25Index, rng: random.Random, flaws: Flaws) -> None:
        self._world = world
        self._index = index
        self._rng = rng
        self._flaws = flaws

    def answer(self, question: Question) -> Conversation:
        """Write the whole conversation, with the flaw that chance picks."""
        talk: Conversation = [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": question.text},
        ]
        flaw = self._draw_flaw()
        if flaw == "guess":
            seen = question.chain if question.type == "comparison" else question.chain[:1]
            return _say(talk, self._rng.choice(seen))
        if flaw == "malformed":
            return _say(talk, _malformed_call(question.chain[0]))
        if question.type == "comparison":
            return self._compare(talk, question, flaw)
        return self._follow(talk, question, flaw)

    def _draw_flaw(self) -> str | None:
        names = ("guess", "malformed", "wrong_search", "wrong_fact")
        weights = [getattr(self._flaws, name) for name in names]
        return self._rng.choices((*names, None), (*weights, 1.0 - sum(weights)))[0]

    def _follow(self, talk: Conversation, question: Question, flaw: str | None) -> Conversation:
        name = question.chain[0]
        for hop, relation in enumerate(question.relations):
            last = hop + 1 == question.hops or self._rng.random() < self._flaws.impatience
            if last and flaw == "wrong_search":
                name = self._search_badly(talk, name)
            else:
                self._search(talk, name)
            if last and flaw == "wrong_fact":
                return _say(talk, self._other_fact(name, relation))
            # A wrong search may have led to another kind of entity: its first fact is read then.
            facts = self._world[name].facts
            name = facts.get(relation, next(iter(facts.values())))
            if last:
                return _say(talk, name)
        raise AssertionError("a question without relations is a comparison")

    def _compare(self, talk: Conversation, question: Question, flaw: str | None) -> Conversation:
        first, second = question.chain
        self._search(talk, first)
        if self._rng.random() < self._flaws.impatience:
            return _say(talk, self._rng.choice(question.chain))
        if flaw == "wrong_search":
            self._search_badly(talk, second)
            return _say(talk, self._rng.choice(question.chain))
        self._search(talk, second)
        younger = first if question.answer == second else second
        return _say(talk, younger if flaw == "wrong_fact" else question.answer)

    def _other_fact(self, name: str, relation: str) -> str:
        facts = self._world[name].facts
        return next(value for other, value in facts.items() if other != relation)

    def _search_badly(self, talk: Conversation, name: str) -> str:
        found = self._search(talk, name.split()[-1])
        return found[0].title

    def _search(self, talk: Conversation, query: str) -> list[Passage]:
        found = [hit.passage for hit in self._index.search([query], TOP_K)[0]]
        call = {"type": "function", "function": {"name": "search", "arguments": {"query": query}}}
        talk.append({"role": "assistant", "content": "", "tool_calls": [call]})
        lines = "\n".join(f"{passage.title}: {passage.text}" for passage in found) or NO_RESULTS
        talk.append({"role": "tool", "name": "search", "content": lines})
        return found


def _say(talk: Conversation, text: str) -> Conversation:
    talk.append({"role": "assistant", "content": text})
    return talk


def _malformed_call(query: str) -> str:
    call = json.dumps({"name": "search", "arguments": {"query": query}})
    return f"<tool_call>\n{call[:-1]}\n</tool_call>"
