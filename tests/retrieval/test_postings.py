"""The BM25 folder: the numbers of bm25s itself, to the last bit, however it is cut into blocks."""

from __future__ import annotations

from pathlib import Path

import bm25s
import numpy as np
import pytest

from agentr1.retrieval import postings
from agentr1.retrieval.base import Passage
from agentr1.retrieval.bm25 import Bm25Index, words_of
from agentr1.retrieval.postings import (
    FILES,
    count_words,
    drop_counts,
    refuse_wordless,
    write_postings,
)
from retrieval.corpora import random_passages, random_queries

PASSAGES = [*random_passages(200), Passage("empty", "", " ?! "), Passage("last", "Ä ß", "w1 w1 Ä")]


def _build(folder: Path, passages: list[Passage], block: int = 10_000) -> Path:
    folder.mkdir()
    count_words(passages, len(passages), folder)
    write_postings(folder, block)
    drop_counts(folder)
    return folder


@pytest.mark.parametrize(("chunk", "block"), [(1_000_000, 1_000_000), (50, 1), (7, 40), (300, 90)])
def test_the_folder_holds_what_bm25s_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, block: int
) -> None:
    monkeypatch.setattr(postings, "_CHUNK", chunk)
    ours = bm25s.BM25.load(_build(tmp_path / "bm25", PASSAGES, block))
    theirs = bm25s.BM25(method="lucene")
    words = [words_of(f"{passage.title} {passage.text}") for passage in PASSAGES]
    theirs.index(words, show_progress=False, create_empty_token=False)
    assert ours.vocab_dict.keys() == theirs.vocab_dict.keys()
    for word in theirs.vocab_dict:
        columns = []
        for index in (ours, theirs):
            number = index.vocab_dict[word]
            part = slice(*index.scores["indptr"][number : number + 2])
            columns.append((index.scores["indices"][part], index.scores["data"][part]))
        (our_places, our_scores), (their_places, their_scores) = columns
        assert our_places.tolist() == their_places.tolist()
        assert our_scores.tobytes() == their_scores.tobytes()


def test_a_folder_answers_as_the_list_in_memory_does(tmp_path: Path) -> None:
    mapped = Bm25Index.open(_build(tmp_path / "bm25", PASSAGES), PASSAGES)
    queries = [*random_queries(50), "", "zebra", "W1 w1 ä"]
    assert mapped.search(queries, 7) == Bm25Index(PASSAGES).search(queries, 7)
    assert isinstance(mapped._bm25.scores["data"], np.memmap)


def test_only_what_bm25s_reads_is_left(tmp_path: Path) -> None:
    folder = _build(tmp_path / "bm25", PASSAGES)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_a_corpus_without_words_is_refused_in_memory_and_for_a_folder() -> None:
    passages = [Passage("a", "?", "!"), Passage("b", "", "")]
    for make in (refuse_wordless, Bm25Index):
        make([*passages, Passage("c", "word", "")])
        with pytest.raises(ValueError, match="no passage holds a word, expected letters or digits"):
            make(passages)


def test_a_passage_of_a_megabyte_is_searched_whole(tmp_path: Path) -> None:
    passages = [Passage("a", "short", "needle"), Passage("b", "long", "hay " * 250_000 + "last")]
    index = Bm25Index.open(_build(tmp_path / "bm25", passages), passages)
    assert [hit.passage.id for hit in index.search(["last"], 2)[0]] == ["b"]
