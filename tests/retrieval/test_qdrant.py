"""The adapter asks as Qdrant's own schema wants it and reads what its engine answers.

Qdrant's server comes from none of the package registries this project installs from. With its
official client installed, requests and answers go through that client's models of the HTTP
interface and are searched by its local engine; without it, through the documented shapes alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi import FastAPI, Request, Response

from agentr1.retrieval.base import Hit, Passage
from agentr1.retrieval.gathering import Gathered
from agentr1.retrieval.qdrant import QdrantIndex
from retrieval.indexes import free_port, served

PASSAGES = [Passage(f"p{i}", f"Title {i}", f"text of {i}") for i in range(20)]


def embed(texts: Sequence[str]) -> np.ndarray:
    """Vectors of length one that only equal texts share."""
    seeds = [int(hashlib.md5(text.encode()).hexdigest(), 16) for text in texts]
    vectors = np.stack([np.random.default_rng(seed).normal(size=8) for seed in seeds])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


VECTORS = embed([passage.text for passage in PASSAGES])


def payload(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "title": passage.title, "text": passage.text}


def exact(queries: Sequence[str], k: int) -> list[list[Passage]]:
    scores = embed(queries) @ VECTORS.T
    return [[PASSAGES[i] for i in np.argsort(-row)[:k]] for row in scores]


def documented() -> FastAPI:
    """The two requests as Qdrant documents them."""
    app = FastAPI()

    @app.post("/collections/wiki/points/count")
    async def count(request: Request) -> dict[str, Any]:
        assert await request.json() == {"exact": False}
        return {"result": {"count": len(PASSAGES)}, "status": "ok", "time": 0.001}

    @app.post("/collections/wiki/points/query/batch")
    async def query(request: Request) -> dict[str, Any]:
        results = []
        for search in (await request.json())["searches"]:
            assert search["with_payload"] == ["id", "title", "text"]
            scores = VECTORS @ np.array(search["query"], dtype=np.float32)
            points = [
                {
                    **{"id": int(i), "version": 0, "score": float(scores[i])},
                    **{"payload": payload(PASSAGES[i]), "vector": None},
                }
                for i in np.argsort(-scores)[: search["limit"]]
            ]
            results.append({"points": points})
        return {"result": results, "status": "ok", "time": 0.002}

    return app


def official() -> FastAPI:
    """The same through the official client: its models read and write, its engine searches."""
    qdrant = pytest.importorskip("qdrant_client", reason="Qdrant's client is not installed")
    from qdrant_client.http import models

    client = qdrant.QdrantClient(":memory:")
    size = models.VectorParams(size=VECTORS.shape[1], distance=models.Distance.COSINE)
    client.create_collection("wiki", vectors_config=size)
    points = [
        models.PointStruct(id=i, vector=VECTORS[i].tolist(), payload=payload(passage))
        for i, passage in enumerate(PASSAGES)
    ]
    client.upsert("wiki", points)
    app = FastAPI()

    def answer(result: Any) -> Response:
        text = json.dumps({"result": result, "status": "ok", "time": 0.001})
        return Response(text, media_type="application/json")

    @app.post("/collections/wiki/points/count")
    async def count(request: Request) -> Response:
        asked = models.CountRequest.model_validate_json(await request.body())
        return answer(client.count("wiki", exact=bool(asked.exact)).model_dump(mode="json"))

    @app.post("/collections/wiki/points/query/batch")
    async def query(request: Request) -> Response:
        asked = models.QueryRequestBatch.model_validate_json(await request.body())
        found = client.query_batch_points("wiki", requests=asked.searches)
        return answer([response.model_dump(mode="json") for response in found])

    return app


@pytest.mark.parametrize("server", [documented, official])
def test_it_finds_the_nearest_points_in_one_request(server: Any) -> None:
    queries = [PASSAGES[7].text, "something else", ""]
    with served(server()) as url:
        index = QdrantIndex(url, "wiki", embed)
        index.check()
        assert len(index) == len(PASSAGES)
        found = index.search(queries, 3)
        (again,) = asyncio.run(Gathered(index).find_all(queries[:1], 3))
    assert [[hit.passage for hit in hits] for hits in found] == exact(queries, 3)
    assert found[0][0].score == pytest.approx(1.0, abs=1e-5)
    assert all(a.score >= b.score for hits in found for a, b in zip(hits, hits[1:], strict=False))
    assert again == found[0]


def canned(answer: Any, status: int = 200) -> QdrantIndex:
    transport = httpx2.MockTransport(lambda request: httpx2.Response(status, json=answer))
    return QdrantIndex("http://engine:6333", "wiki", embed, transport=transport)


def point(**changes: Any) -> dict[str, Any]:
    plain = {"id": 5, "score": 0.5, "payload": {"title": "T", "text": "X"}} | changes
    return {"result": [{"points": [plain]}], "status": "ok"}


def test_a_point_without_an_id_of_ours_is_known_by_its_own() -> None:
    assert canned(point()).search(["q"], 1) == [[Hit(Passage("5", "T", "X"), 0.5)]]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"status": "ok"}, "an answer with 'result'"),
        ({"result": []}, "expected 1 results"),
        ({"result": [{}]}, "an answer with 'points'"),
        (point(payload=None), "an answer with 'payload'"),
        (point(payload={"title": "T"}), "payloads with texts in 'title' and 'text'"),
    ],
)
def test_a_malformed_answer_is_named(answer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"http://engine:6333/collections/wiki.*{words}"):
        canned(answer).search(["q"], 1)


def test_a_collection_that_is_not_there_or_of_another_embedding_is_said_at_the_start() -> None:
    with pytest.raises(ConnectionError, match="no Qdrant collection answers at"):
        QdrantIndex(f"http://127.0.0.1:{free_port()}", "wiki", embed).check()
    wrong = {"status": {"error": "Wrong input: Vector dimension error: expected dim: 4, got 8"}}
    with pytest.raises(ConnectionError, match="Vector dimension error"):
        canned(wrong, 400).check()


@pytest.mark.parametrize("address", ["http://h:1/wiki", "http://h:1/wiki?encoder=a&colour=b"])
def test_an_address_that_lacks_the_embedding_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"expected \?encoder=LIBRARY:MODEL"):
        QdrantIndex.at(f"qdrant+{address}")
