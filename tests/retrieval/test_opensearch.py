"""The adapter asks as OpenSearch documents it and reads what OpenSearch answers.

OpenSearch itself comes from none of the package registries this project installs from, so these
tests hold the adapter against the documented shapes of `_msearch` and `_count`.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request

from agentr1.retrieval.base import Hit, Passage
from agentr1.retrieval.bm25 import Bm25Index
from agentr1.retrieval.opensearch import OpenSearchIndex
from agentr1.retrieval.places import open_retriever
from retrieval.indexes import free_port, served

PASSAGES = [
    Passage("1", "Ada Lovelace", "She wrote the first program."),
    Passage("2", "Charles Babbage", "He designed the analytical engine for any program."),
    Passage("3", "Ulm", "A city on the Danube."),
]


def engine(passages: list[Passage]) -> FastAPI:
    """What OpenSearch does with the two requests, ranked by this project's own BM25."""
    app = FastAPI()
    index = Bm25Index(passages) if passages else None
    shards = {"total": 1, "successful": 1, "skipped": 0, "failed": 0}

    @app.get("/wiki/_count")
    def count() -> dict[str, Any]:
        return {"count": len(passages), "_shards": shards}

    @app.post("/wiki/_msearch")
    async def msearch(request: Request) -> dict[str, Any]:
        assert request.headers["content-type"] == "application/x-ndjson"
        body = await request.body()
        assert body.endswith(b"\n")
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[::2] == [{}] * (len(lines) // 2)
        return {"took": 3, "responses": [respond(query) for query in lines[1::2]]}

    def respond(search: dict[str, Any]) -> dict[str, Any]:
        assert index is not None
        assert search["_source"] == ["title", "text"]
        if search["query"] == {"match_all": {}}:
            found = [Hit(passage, 1.0) for passage in passages[: search["size"]]]
        else:
            match = search["query"]["multi_match"]
            assert match["fields"] == ["title^1", "text"]
            found = index.search([match["query"]], search["size"])[0]
        hits = [
            {
                "_index": "wiki",
                "_id": hit.passage.id,
                "_score": hit.score,
                "_source": {"title": hit.passage.title, "text": hit.passage.text},
            }
            for hit in found
        ]
        best = max((hit["_score"] for hit in hits), default=None)
        shown = {"max_score": best, "hits": hits}
        return {"took": 2, "timed_out": False, "_shards": shards, "hits": shown, "status": 200}

    return app


def test_it_finds_what_the_engine_finds_in_one_request() -> None:
    queries = ["program", "danube city", "zzz", 'quote " and\nline']
    with served(engine(PASSAGES)) as url:
        index = OpenSearchIndex(url, "wiki")
        index.check()
        assert len(index) == 3
        assert index.search(queries, 2) == Bm25Index(PASSAGES).search(queries, 2)


async def find(address: str) -> list[Hit]:
    return await open_retriever(address).find("danube", 1)


def test_a_recipe_can_name_it() -> None:
    with served(engine(PASSAGES)) as url:
        (hit,) = asyncio.run(find(f"opensearch+{url}/wiki"))
    assert hit.passage == PASSAGES[2]


def canned(answer: Any, status: int = 200) -> OpenSearchIndex:
    transport = httpx2.MockTransport(lambda request: httpx2.Response(status, json=answer))
    return OpenSearchIndex("http://engine:9200", "wiki", transport=transport)


def hits(**changes: Any) -> dict[str, Any]:
    hit = {"_id": "1", "_score": 1.0, "_source": {"title": "T", "text": "X"}} | changes
    return {"responses": [{"hits": {"hits": [hit]}, "status": 200}]}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({}, "an answer with 'responses'"),
        ({"responses": []}, "expected 1 responses"),
        ({"responses": [{"took": 1}]}, "an answer with 'hits'"),
        (hits(_source={"titel": "T"}), "documents with texts in 'title' and 'text'"),
        (hits(_score=None), "an answer with '_score'"),
    ],
)
def test_a_malformed_answer_is_named(answer: Any, words: str) -> None:
    assert canned(hits()).search(["q"], 1) == [[Hit(Passage("1", "T", "X"), 1.0)]]
    with pytest.raises(ValueError, match=f"http://engine:9200/wiki: .*{words}"):
        canned(answer).search(["q"], 1)


def test_a_search_that_failed_inside_a_good_answer_is_an_error() -> None:
    # As documented for `_msearch`: the request succeeds, the search of this query did not.
    failed = {
        "error": {"type": "index_not_found_exception", "reason": "no such index [wiki]"},
        "status": 404,
    }
    with pytest.raises(ConnectionError, match=r"a search failed: .*no such index \[wiki\]"):
        canned({"responses": [failed]}).search(["q"], 1)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"timed_out": True}, r"cut short by the engine's own time limit \(timed_out\)"),
        (
            {"_shards": {"total": 5, "failed": 2, "failures": [{"reason": "circuit breaker"}]}},
            "failed on 2 of 5 shards: .*circuit breaker",
        ),
    ],
)
def test_hits_of_a_part_of_the_index_do_not_pass_for_the_best(part: Any, words: str) -> None:
    answer = hits()
    answer["responses"][0] |= {"timed_out": False, "_shards": {"total": 5, "failed": 0}}
    assert canned(answer).search(["q"], 1)[0]
    answer["responses"][0] |= part
    with pytest.raises(ConnectionError, match=f"http://engine:9200/wiki: a search .*{words}"):
        canned(answer).search(["q"], 1)


@pytest.mark.parametrize("source", [{}, {"title": "T"}, {"title": "T", "text": None}])
def test_an_index_without_the_fields_is_told_at_the_start(source: Any) -> None:
    """Every search in it would find nothing."""
    answer = {"count": 3, **hits(_source=source)}
    with pytest.raises(ConnectionError, match=r"that have the fields 'title' and 'text'"):
        canned(answer).check()
    canned({"count": 3, **hits()}).check()


def test_a_server_that_is_down_or_an_empty_index_is_said_at_the_start() -> None:
    with pytest.raises(ConnectionError, match="no OpenSearch index of passages answers at"):
        OpenSearchIndex(f"http://127.0.0.1:{free_port()}", "wiki").check()
    with pytest.raises(
        ConnectionError, match="no OpenSearch index of passages answers at .*status 404"
    ):
        canned({"error": {"type": "index_not_found_exception"}}, 404).check()
    with served(engine([])) as url, pytest.raises(ConnectionError, match="is empty"):
        OpenSearchIndex(url, "wiki").check()


@pytest.mark.parametrize("name", ["", "a/b", "a,b", "wiki*"])
def test_what_is_no_name_of_one_index_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of one index"):
        OpenSearchIndex("http://engine:9200", name)
