"""The quickstart's data: reproducible, disjoint by split, and every answer is there to be found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentr1.retrieval.base import Passage, load_passages
from agentr1.retrieval.bm25 import Bm25Index

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "data" / "quickstart"
SPLITS = ("train", "dev", "test")
TOP_K = 2
# How the corpus words each relation; written anew here, so that a slip in the maker shows.
READ = {
    "author": r"by ([A-Z]\w+ [A-Z]\w+)",
    "publisher": r"[Ii]ssued by ([A-Z]\w+ [A-Z]\w+)",
    "teacher": r"[Pp]upil of ([A-Z]\w+ [A-Z]\w+)",
    "birthplace": r"born in (?:\d+ in )?([A-Z]\w+)",
    "head": r"[Ll]ed by ([A-Z]\w+ [A-Z]\w+)",
    "seat": r"ounded in (?:\d+ in )?([A-Z]\w+)",
    "mayor": r"[Rr]uled by ([A-Z]\w+ [A-Z]\w+)",
    "country": r"town in ([A-Z]\w+)",
}


def _rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {split: _rows(split) for split in SPLITS}


@pytest.fixture(scope="module")
def corpus() -> dict[str, Passage]:
    return {passage.title: passage for passage in load_passages(FOLDER / "corpus.jsonl")}


def _make(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONHASHSEED": "random"}
    command = [sys.executable, str(FOLDER / "make.py"), *arguments]
    subprocess.run(command, check=True, env=environment)


def test_the_script_writes_the_same_bytes_again(tmp_path: Path) -> None:
    _make("data", "--out", str(tmp_path))
    for name in ("corpus", *SPLITS):
        fresh = (tmp_path / f"{name}.jsonl").read_bytes()
        assert fresh == (FOLDER / f"{name}.jsonl").read_bytes(), name


def test_demonstrations_are_reproducible_conversations(tmp_path: Path) -> None:
    texts = []
    for name in ("one.jsonl", "two.jsonl"):
        _make("demonstrations", "--worlds", "4", "--out", str(tmp_path / name))
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    talks = [json.loads(line)["messages"] for line in texts[0].splitlines()]
    assert len(talks) == 4 * 50
    for talk in talks:
        roles = [message["role"] for message in talk]
        assert roles[:2] == ["system", "user"] and roles[-1] == "assistant"
        assert set(zip(roles[2::2], roles[3::2], strict=False)) <= {("assistant", "tool")}


def test_counts_are_those_of_a_few_minutes_of_training(rows: Any, corpus: Any) -> None:
    assert 1500 <= len(corpus) <= 3000
    assert [len(rows[split]) for split in SPLITS] == [2400, 200, 600]
    for split in SPLITS:
        hops = Counter(row["hops"] for row in rows[split] if row["type"] != "comparison")
        types = Counter(row["type"] for row in rows[split])
        total = len(rows[split])
        assert set(types) == {"single", "bridge", "comparison"}
        assert 0.2 <= types["single"] / total <= 0.3
        assert hops[1] == types["single"] and hops[2] and hops[3]


def test_ids_questions_and_titles_are_unique(rows: Any) -> None:
    passages = load_passages(FOLDER / "corpus.jsonl")
    assert len({passage.title for passage in passages}) == len(passages)
    assert len({passage.id for passage in passages}) == len(passages)
    everything = [row for split in SPLITS for row in rows[split]]
    assert len({row["id"] for row in everything}) == len(everything)
    assert len({row["question"] for row in everything}) == len(everything)


def test_the_splits_share_no_entity(rows: Any, corpus: Any) -> None:
    """Neither on a gold path, nor in a question, nor as an answer; countries alone are common."""
    seen: dict[str, str] = {}
    for split in SPLITS:
        for row in rows[split]:
            answers = [answer for answer in row["answers"] if answer in corpus]
            for name in (*row["supporting_titles"], *answers):
                assert seen.setdefault(name, split) == split, name


def test_every_bridge_answer_follows_from_its_passages(rows: Any, corpus: Any) -> None:
    for split in SPLITS:
        for row in rows[split]:
            if row["type"] == "comparison":
                continue
            relations, start = _parse(row["question"])
            assert len(relations) == row["hops"] == len(row["supporting_titles"])
            name = start
            for relation, title in zip(relations, row["supporting_titles"], strict=True):
                assert name == title, row
                found = re.search(READ[relation], _without_publisher(relation, corpus[title].text))
                assert found, (relation, corpus[title])
                name = found[1]
            assert row["answers"] == [name], row


def _parse(question: str) -> tuple[list[str], str]:
    found = re.fullmatch(r"(?:Who|What) is the (.+)\?", question)
    assert found, question
    *relations, start = found[1].split(" of the ")
    inner, start = start.split(" of ", 1)
    return [inner, *reversed(relations)], start


def _without_publisher(relation: str, text: str) -> str:
    return re.sub(READ["publisher"], "", text) if relation == "author" else text


def test_every_comparison_answer_follows_from_its_passages(rows: Any, corpus: Any) -> None:
    compared = [row for split in SPLITS for row in rows[split] if row["type"] == "comparison"]
    first_wins = 0
    for row in compared:
        first, second = row["supporting_titles"]
        assert re.fullmatch(rf"(Who|Which) is older, {first} or {second}\?", row["question"])
        years = [int(re.findall(r"\d+", corpus[title].text)[0]) for title in (first, second)]
        assert years[0] != years[1]
        assert row["answers"] == [first if years[0] < years[1] else second]
        first_wins += years[0] < years[1]
    assert 0.4 < first_wins / len(compared) < 0.6


def test_a_search_for_each_name_of_the_path_shows_its_passage(rows: Any, corpus: Any) -> None:
    index = Bm25Index(load_passages(FOLDER / "corpus.jsonl"))
    ranks: Counter[int] = Counter()
    for row in (*rows["dev"], *rows["test"]):
        for title in row["supporting_titles"]:
            found = [hit.passage.title for hit in index.search([title], TOP_K)[0]]
            assert title in found, row
            ranks[found.index(title)] += 1
    # The search is a ranking, not a lookup: what is wanted is not always on top.
    assert ranks[1] > 0.1 * ranks.total()
