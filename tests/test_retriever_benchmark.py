"""The retriever's benchmark asks a corpus that counts like English, through the real server."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.corpus import questions, write_corpus
from benchmarks.retriever import Load, main

from agentr1.retrieval.base import load_passages
from agentr1.retrieval.bm25 import Bm25Index, words_of


def test_the_corpus_is_the_same_for_the_same_seed_and_counts_like_english(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        write_corpus(path, 3000, seed)
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    passages = load_passages(paths[0])
    words = [words_of(passage.text) for passage in passages]
    holders = Counter(word for found in words for word in set(found))
    shares = [count / len(passages) for _, count in holders.most_common()]
    assert 60 < sum(map(len, words)) / len(words) < 110
    assert shares[0] > 0.9
    assert 0.02 < shares[100] < 0.2
    assert sum(share < 0.005 for share in shares) > len(shares) / 2


def test_questions_touch_about_four_postings_a_passage_and_find_something(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 3000)
    passages = load_passages(tmp_path / "c.jsonl")
    holders = Counter(w for p in passages for w in set(words_of(f"{p.title} {p.text}")))
    asked = questions(3000, 200)
    assert asked == questions(3000, 200)
    assert len(set(asked)) == 200
    touched = sum(holders[word] for query in asked for word in words_of(query)) / 200
    assert 2.5 < touched / len(passages) < 6
    assert all(Bm25Index(passages).search(asked, 3))


def test_rate_and_percentiles() -> None:
    load = Load([i / 1000 for i in range(1, 101)], 2.0)
    assert load.rate == 50
    assert load.p50 == pytest.approx(50.5)
    assert 99 < load.p99 <= 100


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    small = ["--passages", "2000", "--clients", "8", "--seconds", "0.5", "--rounds", "1"]
    assert main([*small, "--folder", str(tmp_path), "--json", str(result)]) == 0
    lines = {line["name"]: line for line in json.loads(result.read_text())}
    assert {name for name, line in lines.items() if line["unit"] == "queries/s"} == {
        "retriever, HTTP",
        "retriever, HTTP, one trainer",
        "retriever, in process",
        "retriever, alone",
    }
    assert all(line["value"] > 0 for line in lines.values())
    assert lines["retriever, HTTP"]["workload"]["p99_ms"] > 0
