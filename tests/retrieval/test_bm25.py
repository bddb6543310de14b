"""The lexical index: what it finds, in which order, and what it refuses."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from agentr1.retrieval.base import Passage, load_passages
from agentr1.retrieval.bm25 import Bm25Index

PASSAGES = [
    Passage("a", "The Silver Lantern", "A novel of 1871 by Bora Tevi."),
    Passage("b", "Bora Tevi", "A writer born in Keldora, pupil of Lora Vene."),
    Passage("c", "Keldora", "A town in Ostria, ruled by Lora Vene."),
    Passage("d", "The Silver Harbour", "A play of 1820 by Lora Vene."),
]


def _ids(passages: list[Passage]) -> list[str]:
    return [passage.id for passage in passages]


def test_title_and_text_are_both_searched() -> None:
    index = Bm25Index(PASSAGES)
    assert _ids(index.search("the silver lantern", 1)) == ["a"]
    assert _ids(index.search("Which town is in Ostria?", 1)) == ["c"]


def test_case_and_punctuation_do_not_matter() -> None:
    index = Bm25Index(PASSAGES)
    assert index.search("SILVER, lantern!", 4) == index.search("silver lantern", 4)


def test_only_passages_that_share_a_word_come_back() -> None:
    index = Bm25Index(PASSAGES)
    assert _ids(index.search("Keldora", 4)) == ["c", "b"]


@pytest.mark.parametrize("query", ["", "   ", "?!", "zebra quagga"])
def test_a_query_without_known_words_finds_nothing(query: str) -> None:
    assert Bm25Index(PASSAGES).search(query, 3) == []


def test_unknown_words_do_not_disturb_known_ones() -> None:
    index = Bm25Index(PASSAGES)
    assert index.search("zebra Keldora", 2) == index.search("Keldora", 2)


def test_ties_go_to_the_earlier_passage() -> None:
    twins = [Passage(str(n), f"Twin {n}", "the same words") for n in range(50)]
    for count in (1, 3, 49, 50, 60):
        expected = [str(n) for n in range(min(count, 50))]
        assert _ids(Bm25Index(twins).search("same words", count)) == expected


def test_the_best_k_are_a_prefix_of_the_whole_ranking() -> None:
    rng = random.Random(0)
    words = [f"w{n}" for n in range(40)]
    corpus = [
        Passage(str(n), rng.choice(words), " ".join(rng.choices(words, k=rng.randint(3, 12))))
        for n in range(300)
    ]
    index = Bm25Index(corpus)
    for _ in range(20):
        query = " ".join(rng.choices(words, k=3))
        whole = index.search(query, len(corpus))
        assert [index.search(query, k) for k in (1, 2, 7)] == [whole[:k] for k in (1, 2, 7)]


def test_an_empty_corpus_and_a_useless_k_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one passage"):
        Bm25Index([])
    with pytest.raises(ValueError, match="k of at least 1, got 0"):
        Bm25Index(PASSAGES).search("silver", 0)


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_load_passages_reads_plain_and_gzipped_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    record = {"id": 7, "title": "Keldora", "text": "Ā town.", "extra": 1}
    content = (json.dumps(record, ensure_ascii=False) + "\n\n").encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert load_passages(path) == [Passage("7", "Keldora", "Ā town.")]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"id": 1, "title": "x"}'])
def test_load_passages_names_the_broken_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": 1, "title": "x", "text": "y"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        load_passages(path)


def test_load_passages_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.jsonl"):
        load_passages(tmp_path / "corpus.csv")


def test_the_index_imports_no_torch() -> None:
    program = "import agentr1.retrieval.bm25, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
