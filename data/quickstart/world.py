"""A closed fictional world: people, works, organisations, towns, their passages and questions.

Everything is drawn from one `random.Random`, so a seed is a world. The same functions make the
shipped data (three splits in one corpus) and the throw-away worlds of the demonstrations; this
module knows neither files nor policies.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator

from agentr1.retrieval.base import Passage
from agentr1.retrieval.bm25 import Bm25Index

TOP_K = 2
"""Passages a search returns; a question is kept only if its chain survives this cut."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Open syllables alone: no vowel ever stands before a consonant inside one, so that a small BPE
# splits every invented name into exactly these pieces, wherever the name stands.
INITIALS = _words(
    "Ba Be Bo Bra Bri Da De Di Do Dra Dru Fa Fe Fi Flo Fre Ga Ge Go Gra Gu Ha He Ho Ja Jo Ju Ka "
    "Ke Ki Kla Kro La Le Li Lo Lu Ma Me Mi Mo Na Ne No Nu Pa Pe Po Pla Pri Ra Re Ri Ro Sa Se Si "
    "So Sta Ste Ta Te Ti To Tra Tro Va Ve Vi Vo Wa We Wi Ya Yo Za Zo"
)
FINALS = _words(
    "ba be bo da de di do fa fi ga go ka ki ko la lda le li lma lo lta lu ma me mi mo na nda ne "
    "ni nka no nta pa pe po ra rda re ri rka rma ro rta rvi sa se si sko so sta ta te ti to va "
    "ve vi vo za zo"
)
ADJECTIVES = _words(
    "Silver Iron Golden Hidden Silent Broken Crimson Distant Frozen Hollow Burning Wooden Empty "
    "Bright Quiet Ancient Secret Narrow Velvet Winter Summer Painted Sleeping Crooked Salted Blue "
    "Copper Wandering Last First"
)
NOUNS = _words(
    "Lantern Harbour Garden Mirror River Tower Bridge Forest Window Castle Feather Orchard Letter "
    "Island Compass Candle Market Mountain Violin Crown Desert Kitchen Ladder Meadow Needle Palace "
    "Raven Shadow Temple Valley Voyage Wheel Anchor Basket Clock Daughter Engine Fountain Guest "
    "Horizon"
)
HOUSES = ("Press", "Guild", "House", "Society", "Academy", "Club")
YEARS = tuple(range(1860, 1880))

RELATIONS = {
    "work": {"author": "person", "publisher": "organisation"},
    "person": {"teacher": "person", "birthplace": "town"},
    "organisation": {"head": "person", "seat": "town"},
    "town": {"mayor": "person", "country": "country"},
}
"""Kind of entity -> relation -> kind of entity it leads to."""

TEXTS = {
    "work": (
        "A {craft} of {year} by {author}, issued by {publisher}.",
        "Issued by {publisher} in {year}, a {craft} by {author}.",
    ),
    "person": (
        "A {craft} born in {birthplace} in {year}, pupil of {teacher}.",
        "Pupil of {teacher}, a {craft} born in {year} in {birthplace}.",
    ),
    "organisation": (
        "Founded in {seat} in {year}, led by {head}.",
        "Led by {head}, founded in {year} in {seat}.",
    ),
    "town": (
        "A town in {country}, ruled by {mayor}.",
        "Ruled by {mayor}, a town in {country}.",
    ),
}
CRAFTS = {
    "work": ("novel", "drama", "poem", "play"),
    "person": ("writer", "painter", "singer", "judge"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Entity:
    """One thing of the world: `facts` maps each relation to a name, `year` orders comparisons."""

    name: str
    kind: str
    year: int
    text: str
    facts: dict[str, str]


World = dict[str, Entity]
"""Entities by name; only those that have a passage (countries have none)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A question with its gold path.

    Attributes:
        text: as it is put to the policy.
        type: "single", "bridge" or "comparison".
        chain: names to look up, in order; for a comparison the two candidates.
        relations: what to read on each passage of the chain; empty for a comparison.
        answer: the one right answer.
    """

    text: str
    type: str
    chain: tuple[str, ...]
    relations: tuple[str, ...]
    answer: str

    @property
    def hops(self) -> int:
        return len(self.chain)


class Names:
    """Draws names that were never drawn before; people and works share words on purpose."""

    def __init__(self, rng: random.Random, people: int) -> None:
        self._rng = rng
        self._used: set[str] = set()
        # About five people to a first name and three to a surname: a search finds look-alikes.
        self._first = [self._word(2) for _ in range(max(8, people // 5))]
        self._last = [self._word(2) for _ in range(max(12, people // 3))]

    def _word(self, syllables: int) -> str:
        while True:
            rest = "".join(self._rng.choices(FINALS, k=syllables - 1))
            word = self._rng.choice(INITIALS) + rest
            if word not in self._used:
                self._used.add(word)
                return word

    def _fresh(self, *pools: Iterable[str]) -> str:
        choices = [list(pool) for pool in pools]
        while True:
            name = " ".join(self._rng.choice(pool) for pool in choices)
            if name not in self._used:
                self._used.add(name)
                return name

    def person(self) -> str:
        return self._fresh(self._first, self._last)

    def work(self) -> str:
        return self._fresh(("The",), ADJECTIVES, NOUNS)

    def organisation(self) -> str:
        return self._fresh(self._last, HOUSES)

    def town(self) -> str:
        return self._word(2)

    def country(self) -> str:
        return self._word(2)


def make_world(rng: random.Random, names: Names, countries: list[str], people: int) -> World:
    """Draw the entities and facts of one world; every fact stays inside it."""
    counts = {
        "person": people,
        "work": people * 6 // 5,
        "organisation": people * 2 // 5,
        "town": people * 2 // 5,
    }
    members = {
        kind: [getattr(names, kind)() for _ in range(count)] for kind, count in counts.items()
    }
    members["country"] = countries
    world: World = {}
    for kind in counts:
        for name in members[kind]:
            facts = {
                relation: rng.choice([other for other in members[target] if other != name])
                for relation, target in RELATIONS[kind].items()
            }
            year = rng.choice(YEARS)
            craft = rng.choice(CRAFTS.get(kind, ("",)))
            text = rng.choice(TEXTS[kind]).format(year=year, craft=craft, **facts)
            world[name] = Entity(name, kind, year, text, facts)
    return world


def passages_of(worlds: Iterable[World], rng: random.Random) -> list[Passage]:
    """The corpus of one or more worlds, in random order."""
    entities = [entity for world in worlds for entity in world.values()]
    rng.shuffle(entities)
    return [Passage(f"p{n:04d}", one.name, one.text) for n, one in enumerate(entities)]


def _relation_paths(kind: str, hops: int) -> Iterator[tuple[str, ...]]:
    for relation, target in RELATIONS[kind].items():
        if hops == 1:
            yield (relation,)
        elif target in RELATIONS:
            for rest in _relation_paths(target, hops - 1):
                if rest[0] != relation:
                    yield (relation, *rest)


PATHS = {
    hops: [(kind, path) for kind in RELATIONS for path in _relation_paths(kind, hops)]
    for hops in (1, 2, 3)
}
COMPARED = ("work", "person", "organisation")


def draw_bridge(world: World, rng: random.Random, hops: int) -> Question | None:
    """Draw a question that follows `hops` relations, or None where the path runs in a circle."""
    kind, relations = rng.choice(PATHS[hops])
    start = rng.choice([name for name, entity in world.items() if entity.kind == kind])
    visited = [start]
    for relation in relations:
        visited.append(world[visited[-1]].facts[relation])
    if len(set(visited)) < len(visited):
        return None
    phrase = " of ".join(f"the {relation}" for relation in reversed(relations))
    who = "Who" if world.get(visited[-1]) and world[visited[-1]].kind == "person" else "What"
    return Question(
        text=f"{who} is {phrase} of {start}?",
        type="single" if hops == 1 else "bridge",
        chain=tuple(visited[:-1]),
        relations=relations,
        answer=visited[-1],
    )


def draw_comparison(world: World, rng: random.Random) -> Question | None:
    """Draw a question that weighs the years of two entities of a kind, or None for a tie."""
    kind = rng.choice(COMPARED)
    first, second = rng.sample([one for one in world.values() if one.kind == kind], 2)
    if first.year == second.year:
        return None
    word = "Who" if kind == "person" else "Which"
    return Question(
        text=f"{word} is older, {first.name} or {second.name}?",
        type="comparison",
        chain=(first.name, second.name),
        relations=(),
        answer=min(first, second, key=lambda one: one.year).name,
    )


def is_findable(question: Question, index: Bm25Index) -> bool:
    """Whether searching each name of the chain brings up its passage."""
    results = index.search(question.chain, TOP_K)
    return all(
        name in (hit.passage.title for hit in hits)
        for name, hits in zip(question.chain, results, strict=True)
    )


def draw_questions(
    world: World, index: Bm25Index, rng: random.Random, mix: dict[str, int]
) -> list[Question]:
    """Draw distinct, findable questions in random order.

    Args:
        mix: how many of "1", "2", "3" hops and of "comparison".
    """
    found: dict[str, Question] = {}
    for label, count in mix.items():
        wanted = len(found) + count
        while len(found) < wanted:
            if label == "comparison":
                question = draw_comparison(world, rng)
            else:
                question = draw_bridge(world, rng, int(label))
            if question and question.text not in found and is_findable(question, index):
                found[question.text] = question
    questions = list(found.values())
    rng.shuffle(questions)
    return questions
