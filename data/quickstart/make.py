"""Make the quickstart's files: the world's data, the demonstrations, the untrained policy.

    python data/quickstart/make.py data
    python data/quickstart/make.py demonstrations --worlds 200 --out demonstrations.jsonl
    python data/quickstart/make.py policy --out runs/untrained

All three are pure functions of their arguments: the same command writes the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from demonstrations import MIX, NO_FLAWS, Conversation, Flaws, demonstrations
from world import (
    Names,
    Question,
    draw_questions,
    make_world,
    passages_of,
)

from agentr1.retrieval.bm25 import Bm25Index

SEED = 2024
PEOPLE = {"train": 360, "dev": 80, "test": 240}
QUESTIONS = {"train": 2400, "dev": 200, "test": 600}
COUNTRIES = 24
PER_WORLD = 50
BATCH = 32
LESSONS = (
    (0.18, NO_FLAWS, {"1": 1.0}),
    (0.61, NO_FLAWS, {"1": 0.16, "2": 0.3, "3": 0.24, "comparison": 0.3}),
    (0.21, Flaws(), MIX),
)
"""Share of the worlds, flaws and kinds of questions of each part of the demonstrations."""


def make_data(folder: Path) -> None:
    """Write corpus.jsonl and one file of questions per split."""
    rng = random.Random(SEED)
    # One name generator for all splits: no name is drawn twice, so their entities are disjoint.
    names = Names(rng, sum(PEOPLE.values()))
    countries = [names.country() for _ in range(COUNTRIES)]
    worlds = {split: make_world(rng, names, countries, people) for split, people in PEOPLE.items()}
    passages = passages_of(worlds.values(), rng)
    _write(folder / "corpus.jsonl", (dataclasses.asdict(passage) for passage in passages))
    index = Bm25Index(passages)
    for split, world in worlds.items():
        mix = {label: round(share * QUESTIONS[split]) for label, share in MIX.items()}
        questions = draw_questions(world, index, rng, mix)
        _write(
            folder / f"{split}.jsonl",
            (_row(f"{split}-{n:04d}", question) for n, question in enumerate(questions)),
        )


def _row(name: str, question: Question) -> dict[str, Any]:
    return {
        "id": name,
        "question": question.text,
        "answers": [question.answer],
        "type": question.type,
        "hops": question.hops,
        "supporting_titles": list(question.chain),
    }


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def make_demonstrations(path: Path, worlds: int, seed: int) -> None:
    """Write conversations in the order in which they are to be learnt.

    First flawless ones of one hop, where copying is learnt fast; then flawless ones of all kinds;
    then flawed ones, which leave a policy that can do better than it does. Batches of one length
    each waste no padding.
    """
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lessons = (
        demonstrations(rng, round(share * worlds), PER_WORLD, flaws, mix)
        for share, flaws, mix in LESSONS
    )
    _write(path, ({"messages": talk} for part in lessons for talk in _batches(part, rng)))


def _batches(talks: Iterable[Conversation], rng: random.Random) -> Iterator[Conversation]:
    """Reorder conversations so that each batch has talks of about one length, in random order."""
    while window := list(islice(talks, BATCH * 20)):
        window.sort(key=lambda talk: (len(talk), sum(len(m["content"]) for m in talk)))
        batches = [window[n : n + BATCH] for n in range(0, len(window), BATCH)]
        rng.shuffle(batches)
        yield from (talk for batch in batches for talk in batch)


def make_policy(folder: Path, seed: int) -> None:
    """Write the tokenizer and the random model in one folder that training can start from."""
    # Only this command needs torch: data and demonstrations are made without it.
    from policy import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    build_model(tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's files.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="corpus and questions")
    data.add_argument("--out", type=Path, default=Path(__file__).parent)
    talks = commands.add_parser("demonstrations", help="conversations for the cold start")
    talks.add_argument("--worlds", type=int, default=2112)
    talks.add_argument("--seed", type=int, default=1)
    talks.add_argument("--out", type=Path, required=True)
    policy = commands.add_parser("policy", help="tokenizer and random model")
    policy.add_argument("--seed", type=int, default=0)
    policy.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "data":
        make_data(arguments.out)
    elif arguments.command == "demonstrations":
        make_demonstrations(arguments.out, arguments.worlds, arguments.seed)
    else:
        make_policy(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
