"""The client reads this project's servers and Search-R1's, and names what is wrong with others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from agentr1.retrieval.base import Hit, Passage
from agentr1.retrieval.gathering import Gathered
from agentr1.retrieval.http import HttpIndex
from agentr1.retrieval.limits import QUERY_BYTES, Limits
from agentr1.retrieval.server import make_app
from retrieval.indexes import EchoIndex, echo, free_port, served


class QueryRequest(BaseModel):
    """As in Search-R1's retrieval_server.py."""

    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


def search_r1_app(result: Callable[[list[str], int, bool], list[Any]]) -> FastAPI:
    """The web part of Search-R1's servers: one route, and neither health nor metrics."""
    app = FastAPI()

    @app.post("/retrieve")
    def retrieve_endpoint(request: QueryRequest) -> dict[str, Any]:
        return {"result": result(request.queries, request.topk or 3, request.return_scores)}

    return app


def canned(answer: Any, status: int = 200, seen: list[Any] | None = None) -> HttpIndex:
    """A client whose server answers every request alike."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        if seen is not None:
            seen.append((request.method, request.url.path, request.content))
        if isinstance(answer, bytes):
            return httpx2.Response(status, content=answer)
        return httpx2.Response(status, json=answer)

    return HttpIndex("http://retriever:8000/retrieve", transport=httpx2.MockTransport(handle))


def test_it_finds_through_a_real_server_what_the_index_finds() -> None:
    with served(make_app(EchoIndex(), {"index": "echo"})) as url:
        index = HttpIndex(url)
        index.check()
        assert len(index) == 1000
        assert index.about["index"] == "echo"
        queries = ["a", "", "ü 漢字 \ud800 \n\"'"]
        found = index.search(queries, 4)
    assert found[:2] == [echo("a", 4), echo("", 4)]
    # Half a surrogate pair cannot be sent.
    assert found[2] == echo("ü 漢字 ? \n\"'", 4)


def test_the_request_is_what_search_r1s_servers_expect() -> None:
    seen: list[Any] = []
    canned({"result": [[], []]}, seen=seen).search(["a", "b"], 5)
    body = b'{"queries":["a","b"],"topk":5,"return_scores":true}'
    assert seen == [("POST", "/retrieve", body)]


@pytest.mark.parametrize(
    ("item", "name", "score"),
    [
        # Its dense index over wiki-18.
        ({"document": {"id": "12", "contents": '"Ada"\nShe.\nA lot.'}, "score": 0.87}, "12", 0.87),
        # Its BM25 index, with scores and without.
        (
            {"document": {"title": "Ada", "text": "She.\nA lot.", "contents": "..."}, "score": 11},
            None,
            11.0,
        ),
        ({"title": "Ada", "text": "She.\nA lot.", "contents": '"Ada"\nShe.\nA lot.'}, None, 1.0),
        # Its server in front of a web search gives no scores.
        ({"document": {"contents": '"Ada"\nShe.\nA lot.'}}, None, 1.0),
        # Its server with a reranker sends texts.
        ({"document": '"Ada"\nShe.\nA lot.', "score": 3.5}, None, 3.5),
        ('"Ada"\nShe.\nA lot.', None, 1.0),
    ],
)
def test_documents_of_all_of_search_r1s_servers_are_read(
    item: Any, name: str | None, score: float
) -> None:
    (found,) = canned({"result": [[item]]}).search(["q"], 3)
    (hit,) = found
    assert (hit.passage.title, hit.passage.text, hit.score) == ("Ada", "She.\nA lot.", score)
    # Without an id of its own, a document is known by what it says.
    same = canned({"result": [['"Ada"\nShe.\nA lot.']]}).search(["q"], 3)[0][0]
    assert hit.passage.id == (name or same.passage.id)
    assert len(same.passage.id) == 16


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ('"Ada"', "Ada"),
        ('""Heroes""', '"Heroes"'),
        ('"The song "Heroes""', 'The song "Heroes"'),
        ('The song "Heroes"', 'The song "Heroes"'),
        ('6"', '6"'),
        ('"', '"'),
        ('""', ""),
    ],
)
def test_a_titles_own_quotes_stay(line: str, title: str) -> None:
    ((hit,),) = canned({"result": [[{"contents": f"{line}\nX"}]]}).search(["q"], 1)
    assert (hit.passage.title, hit.passage.text) == (title, "X")


def test_without_scores_the_order_is_kept_and_no_more_than_k_are_taken() -> None:
    documents = [{"document": {"contents": f"{i}\nText"}} for i in range(5)]
    (found,) = canned({"result": [documents]}).search(["q"], 3)
    assert [hit.passage.title for hit in found] == ["0", "1", "2"]
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)


def test_a_server_of_search_r1_passes_the_check_by_answering_a_query() -> None:
    def result(queries: list[str], k: int, scores: bool) -> list[Any]:
        document = {"id": "1", "contents": '"T"\nX'}
        return [
            [{"document": document, "score": 1.0}] * k if scores else [document] for _ in queries
        ]

    with served(search_r1_app(result)) as url:
        index = HttpIndex(f"{url}/retrieve")
        index.check()
        assert index.search(["a", "b"], 2) == [[Hit(Passage("1", "T", "X"), 1.0)] * 2] * 2
        with pytest.raises(ValueError, match="does not say how many passages"):
            len(index)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"<html>", "expected JSON, got '<html>'"),
        ([], "expected a 'result' of 2 lists, got '\\[\\]'"),
        ({"error": "?"}, "expected a 'result' of 2 lists"),
        ({"result": [[]]}, "expected a 'result' of 2 lists"),
        ({"result": [[], {}]}, "expected a list of documents per query"),
        ({"result": [[], [None]]}, "expected documents with `contents`"),
        ({"result": [[], [{"document": {"title": "T"}}]]}, "expected documents with"),
        ({"result": [[], [{"document": "a", "score": "high"}]]}, "expected documents with"),
    ],
)
def test_a_malformed_answer_is_named(answer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"http://retriever:8000/retrieve: {words}"):
        canned(answer).search(["a", "b"], 1)


def test_a_refusal_is_named_with_status_and_reason() -> None:
    with pytest.raises(ConnectionError, match="status 503: .*come back later"):
        canned({"detail": "come back later"}, 503).search(["a"], 1)


def test_a_server_that_is_down_is_an_error_within_seconds() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"no retriever answers at {url} .*serve-retriever"):
        HttpIndex(url).check()
    assert time.monotonic() - start < 5
    with pytest.raises(ConnectionError, match="cannot be reached"):
        HttpIndex(url).search(["a"], 1)


def test_something_else_that_answers_there_is_no_retriever() -> None:
    with served(FastAPI()) as url, pytest.raises(ConnectionError, match="status 404"):
        HttpIndex(url).check()


def test_something_else_with_a_page_called_health_is_no_retriever() -> None:
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    with served(app) as url, pytest.raises(ConnectionError, match="/retrieve .*status 404"):
        HttpIndex(url).check()


def test_a_server_that_hangs_is_given_up() -> None:
    class Slow(EchoIndex):
        def search(self, queries: Any, k: int) -> Any:
            release.wait(10)
            return super().search(queries, k)

    release = threading.Event()
    with served(make_app(Slow(), {})) as url:
        with pytest.raises(TimeoutError, match="gave no answer in time"):
            HttpIndex(url, timeout=0.2).search(["a"], 1)
        release.set()


def test_a_password_is_sent_and_never_shown() -> None:
    seen = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers["authorization"])
        return httpx2.Response(500)

    transport = httpx2.MockTransport(handle)
    index = HttpIndex("http://me:secret@retriever:1", transport=transport)
    with pytest.raises(ConnectionError) as caught:
        index.search(["a"], 1)
    assert seen[0].startswith("Basic ")
    assert "secret" not in str(caught.value)
    assert "secret" not in index.url


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://h:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected something like"):
        HttpIndex(url)


def test_concurrent_queries_share_requests_over_event_loops() -> None:
    index = EchoIndex()

    async def ask(retriever: Gathered) -> None:
        queries = [f"q{i}" for i in range(40)]
        found = await asyncio.gather(*(retriever.find(query, 2) for query in queries))
        assert found == [echo(query, 2) for query in queries]

    with served(make_app(index, {})) as url:
        retriever = Gathered(HttpIndex(url), at_once=4)
        for _ in range(3):
            asyncio.run(ask(retriever))
    assert len(index.asked) <= 12


@pytest.mark.parametrize(
    ("limits", "requests"),
    [
        ({}, 1),
        ({"max_queries": 8}, 8),
        ({"max_hits": 27}, 8),
        ({"max_bytes": 16 * QUERY_BYTES + 5}, 4),
    ],
)
def test_a_batch_is_sent_in_as_many_requests_as_the_servers_limits_ask_for(
    limits: dict[str, int], requests: int
) -> None:
    index, queries = EchoIndex(), [f"q{i}" + "\n" * 1990 for i in range(64)]
    with served(make_app(index, {}, Limits(**limits))) as url:
        client = HttpIndex(url)
        client.check(3)
        del index.asked[:]
        assert client.search(queries, 3) == [echo(query, 3) for query in queries]
        assert client.search([], 3) == []
    assert len(index.asked) == requests


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_k": 4}, "at most 4 .* 5 are wanted; .* --max-k 5, or lower search_top_k"),
        ({"max_hits": 4}, "at most 4 .* 5 are wanted; .* --max-hits 5, or lower search_top_k"),
        ({"max_chars": 1999}, "at most 1999 .* 2000 are wanted; .* --max-chars 2000$"),
        ({"max_bytes": 9999}, f"at most 9999 .* {QUERY_BYTES} are .* --max-bytes {QUERY_BYTES}$"),
    ],
)
def test_a_server_that_takes_too_little_for_one_query_is_told_at_the_start(
    limits: dict[str, int], words: str
) -> None:
    with (
        served(make_app(EchoIndex(), {}, Limits(**limits))) as url,
        pytest.raises(ValueError, match=words),
    ):
        HttpIndex(url).check(5)
