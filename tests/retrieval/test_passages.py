"""Passages on disk come back as they were, whatever is in them, and equal ids are found."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentr1.retrieval.base import Passage
from agentr1.retrieval.passages import Stored, StoredPassages, store
from retrieval.corpora import random_passages, write_corpus

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_any_text_comes_back(texts: list, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("stored")
    passages = [Passage(f"p{n}", title, text) for n, (title, text) in enumerate(texts)]
    assert store(write_corpus(folder / "corpus.jsonl", passages), folder).passages == len(passages)
    stored = StoredPassages(folder)
    assert list(stored) == passages
    assert [stored[n] for n in range(-len(passages), 0)] == passages
    assert stored[1:3] == passages[1:3]
    for place in (len(passages), -len(passages) - 1):
        with pytest.raises(IndexError, match=f"no passage {place}"):
            stored[place]


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    passages = random_passages(500)
    store(write_corpus(tmp_path / "corpus.jsonl", passages), tmp_path)
    stored = StoredPassages(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(stored.__getitem__, [*range(500)] * 4)) == passages * 4


def test_a_passage_of_a_megabyte_is_kept_and_counted_as_long(tmp_path: Path) -> None:
    passages = [Passage("a", "short", "x"), Passage("b", "long", "word " * 200_000)]
    stored = store(write_corpus(tmp_path / "corpus.jsonl", passages), tmp_path)
    assert stored == Stored(passages=2, long=1, longest=1_000_000)
    assert StoredPassages(tmp_path)[1] == passages[1]


def test_an_empty_corpus_and_equal_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"corpus.jsonl holds no passages"):
        store(path, tmp_path)
    passages = [*random_passages(20), Passage("p3", "again", "")]
    write_corpus(path, passages)
    with pytest.raises(ValueError, match=r"line 21: the id 'p3' is also on line 4"):
        store(path, tmp_path)


def test_an_id_as_number_and_as_text_is_the_same(tmp_path: Path) -> None:
    records = [{"id": 1, "title": "", "text": ""}, {"id": "1", "title": "", "text": ""}]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match="id '1' is also on line 1"):
        store(path, tmp_path)
