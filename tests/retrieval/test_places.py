"""A recipe's `corpus` is opened for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentr1.retrieval import places
from agentr1.retrieval.bm25 import Bm25Index
from agentr1.retrieval.build import IndexSettings, build_index
from agentr1.retrieval.gathering import Gathered
from agentr1.retrieval.http import HttpIndex
from agentr1.retrieval.limits import Limits
from agentr1.retrieval.places import open_place, open_retriever
from agentr1.retrieval.remote import is_address
from agentr1.retrieval.server import make_app
from agentr1.tools.search import Search
from retrieval.indexes import EchoIndex, served


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "1", "title": "Ulm", "text": "A city."}\n', encoding="utf-8")
    return path


def test_a_file_a_folder_and_an_address_are_opened(corpus: Path, tmp_path: Path) -> None:
    assert isinstance(open_place(corpus), Bm25Index)
    build_index(corpus, tmp_path / "index", IndexSettings())
    assert len(open_place(str(tmp_path / "index"))) == 1
    with served(make_app(EchoIndex(), {})) as url:
        assert isinstance(open_place(url), HttpIndex)


def test_a_server_that_returns_fewer_passages_than_the_search_asks_for_is_told_at_once() -> None:
    with served(make_app(EchoIndex(), {}, Limits(default_k=3, max_k=4))) as url:
        Search.from_corpus(url, 4)
        with pytest.raises(ValueError, match="at most 4 .* 5 are wanted; .*--max-k 5"):
            Search.from_corpus(url, 5)


def test_only_a_small_corpus_in_words_is_searched_on_the_event_loop(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> Gathered:
        retriever = open_retriever(corpus)
        assert isinstance(retriever, Gathered)
        return retriever

    assert not opened().in_thread
    monkeypatch.setattr(places, "_FAST_PASSAGES", 0)
    assert opened().in_thread
    with served(make_app(EchoIndex(), {})) as url:
        remote = open_retriever(url)
        assert isinstance(remote, Gathered)
        assert remote.in_thread
        assert remote.at_once > 1


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ("nowhere", FileNotFoundError, "expected a passages file or an index folder there"),
        ("redis://host/1", ValueError, "expected an address with one of .*'http', 'https'"),
    ],
)
def test_what_cannot_be_opened_is_told(place: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        open_place(place)


def test_paths_are_no_addresses() -> None:
    assert is_address("HTTP://host:1")
    for place in ("data/corpus.jsonl", "C:\\corpus.jsonl", "/http://x", Path("http://x")):
        assert not is_address(place)
