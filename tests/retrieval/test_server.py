"""The server speaks Search-R1's protocol, keeps its limits and counts what it does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx2
import pytest

from agentr1.retrieval.base import Hit, Passage
from agentr1.retrieval.limits import Limits
from agentr1.retrieval.server import make_app
from retrieval.indexes import EchoIndex, GatedIndex

Result = TypeVar("Result")


def talk(
    index: Any, work: Callable[[httpx2.AsyncClient], Awaitable[Result]], **limits: int
) -> Result:
    """Do something with a server in this process, over its ASGI interface."""

    async def run() -> Result:
        app = make_app(index, {"index": "echo", "digest": "abc"}, Limits(**limits))
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://retriever") as client:
            return await work(client)

    return asyncio.run(run())


def post(index: Any, body: Any, **limits: int) -> httpx2.Response:
    async def work(client: httpx2.AsyncClient) -> httpx2.Response:
        given: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        return await client.post("/retrieve", **given)

    return talk(index, work, **limits)


def test_a_request_as_search_r1_sends_it_is_answered_as_its_servers_answer() -> None:
    class Two(EchoIndex):
        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            ada = Hit(Passage("7", "Ada\nLovelace", "She wrote\nthe first program."), 2.5)
            return [[ada][:k] if query == "Who?" else [] for query in queries]

    body = {"queries": ["Who?", "What?"], "topk": 3, "return_scores": True}
    answer = post(Two(), body)
    assert answer.status_code == 200
    document = {
        "id": "7",
        "title": "Ada\nLovelace",
        "text": "She wrote\nthe first program.",
        "contents": '"Ada Lovelace"\nShe wrote\nthe first program.',
    }
    assert answer.json() == {"result": [[{"document": document, "score": 2.5}], []]}
    without = post(Two(), {"queries": ["Who?"], "topk": 3, "return_scores": False})
    assert without.json() == {"result": [[document]]}


def search_r1_passages_to_string(retrieval_result: list[dict[str, Any]]) -> str:
    """What Search-R1's client makes of one result (`_passages2string` in its generation.py)."""
    shown = ""
    for number, item in enumerate(retrieval_result, start=1):
        content = item["document"]["contents"]
        title = content.split("\n")[0]
        text = "\n".join(content.split("\n")[1:])
        shown += f"Doc {number}(Title: {title}) {text}\n"
    return shown


def test_search_r1s_client_can_read_the_answer() -> None:
    answer = post(EchoIndex(), {"queries": ["a", "b"], "topk": 2, "return_scores": True})
    assert [search_r1_passages_to_string(found) for found in answer.json()["result"]] == [
        f'Doc 1(Title: "About {q}") Text 1 of 2.\nDoc 2(Title: "About {q}") Text 2 of 2.\n'
        for q in "ab"
    ]


@pytest.mark.parametrize("topk", [{}, {"topk": None}, {"topk": 0}])
def test_a_request_without_topk_gets_the_servers_own(topk: dict[str, Any]) -> None:
    answer = post(EchoIndex(), {"queries": ["a"], **topk}, default_k=2)
    assert len(answer.json()["result"][0]) == 2


def test_no_queries_have_no_results() -> None:
    assert post(EchoIndex(), {"queries": []}).json() == {"result": []}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 422, "Invalid JSON"),
        (b"[1]", 422, "expected"),
        (b"\xff\xfe", 422, "expected"),
        ({"topk": 3}, 422, "queries: Field required"),
        ({"queries": "a"}, 422, "queries: Input should be a valid array"),
        ({"queries": [1]}, 422, "queries.0: Input should be a valid string"),
        (b'{"queries": ["\\ud800"]}', 422, "the body: Invalid JSON"),
        ({"queries": ["a"], "topk": "3"}, 422, "topk: Input should be a valid integer"),
        ({"queries": ["a"], "topk": -1}, 422, "topk is -1, expected 1 to 5"),
        ({"queries": ["a"], "topk": 6}, 422, "topk is 6, expected 1 to 5"),
        ({"queries": ["a"] * 3, "topk": 4}, 422, "3 queries of 4 passages are 12, expected at"),
        ({"queries": ["a"] * 4}, 422, "4 queries, expected at most 3; send fewer"),
        ({"queries": ["a" * 21]}, 422, "a query has 21 characters, expected at most 20"),
        ({"queries": ["a"], "padding": "x" * 300}, 413, "longer than 200 bytes"),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_the_reason(
    body: Any, status: int, words: str
) -> None:
    index = EchoIndex()
    limits = {"max_k": 5, "max_queries": 3, "max_chars": 20, "max_bytes": 200, "max_hits": 11}
    answer = post(index, body, **limits)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"]
    assert not index.asked


def test_a_body_without_a_stated_length_is_not_read_beyond_the_limit() -> None:
    sent = []

    async def endless() -> Any:
        for _ in range(1000):
            sent.append(1)
            yield b" " * 100

    async def work(client: httpx2.AsyncClient) -> httpx2.Response:
        return await client.post("/retrieve", content=endless())

    assert talk(EchoIndex(), work, max_bytes=1000).status_code == 413


def test_a_search_that_fails_is_told_and_counted_and_the_next_one_works() -> None:
    class Broken(EchoIndex):
        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            if "bad" in queries:
                raise OSError("disk gone")
            return super().search(queries, k)

    async def work(client: httpx2.AsyncClient) -> tuple[httpx2.Response, ...]:
        bad = await client.post("/retrieve", json={"queries": ["bad"]})
        good = await client.post("/retrieve", json={"queries": ["good"]})
        return bad, good, await client.get("/metrics")

    bad, good, metrics = talk(Broken(), work)
    assert (bad.status_code, good.status_code) == (500, 200)
    assert bad.json()["detail"] == "the search failed: OSError: disk gone"
    assert 'agentr1_retriever_requests_total{status="500"} 1.0' in metrics.text
    assert "agentr1_retriever_errors_total 1.0" in metrics.text
    assert "agentr1_retriever_queries_total 1.0" in metrics.text


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("not within ten seconds")


def test_health_and_metrics_answer_while_a_search_runs_and_waiting_requests_become_one() -> None:
    index = GatedIndex()

    async def work(client: httpx2.AsyncClient) -> None:
        def ask(query: str) -> Any:
            return asyncio.ensure_future(client.post("/retrieve", json={"queries": [query]}))

        first = ask("first")
        await until(lambda: index.entered.acquire(blocking=False))
        later = [ask(f"later {i}") for i in range(5)]
        await asyncio.sleep(0.05)
        health = (await client.get("/health")).json()
        assert health == {
            **{"status": "ok", "index": "echo", "digest": "abc"},
            **{"passages": 1000, "max_k": 100, "max_queries": 4096, "max_hits": 50_000},
            **{"max_chars": 10_000, "max_bytes": 16 * 2**20},
        }
        text = (await client.get("/metrics")).text
        assert "agentr1_retriever_requests_in_flight 6.0" in text
        assert "agentr1_retriever_queries_waiting 6.0" in text
        index.gate.release(2)
        answers = await asyncio.gather(first, *later)
        assert [a.json()["result"][0][0]["id"] for a in answers] == [
            "first-1",
            *(f"later {i}-1" for i in range(5)),
        ]
        text = (await client.get("/metrics")).text
        assert "agentr1_retriever_requests_in_flight 0.0" in text
        assert "agentr1_retriever_request_seconds_count 6.0" in text
        assert "agentr1_retriever_search_queries_sum 6.0" in text
        assert "agentr1_retriever_search_seconds_count 2.0" in text

    talk(index, work)
    assert [len(queries) for queries, _ in index.asked] == [1, 5]


def test_more_than_may_wait_is_told_to_come_back() -> None:
    index = GatedIndex()

    async def work(client: httpx2.AsyncClient) -> None:
        def ask(count: int) -> Any:
            return asyncio.ensure_future(client.post("/retrieve", json={"queries": ["q"] * count}))

        first = ask(3)  # more than may wait, but nobody else does
        await until(lambda: index.entered.acquire(blocking=False))
        refused = await ask(1)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "3 queries are waiting" in refused.json()["detail"]
        index.gate.release(3)
        assert (await first).status_code == 200
        assert (await ask(2)).status_code == 200

    talk(index, work, max_waiting=2, max_batch=64)


def test_a_request_that_takes_too_long_is_given_up_with_all_that_waits_of_it() -> None:
    index = GatedIndex()

    async def work(client: httpx2.AsyncClient) -> None:
        late = await client.post("/retrieve", json={"queries": ["a", "b", "c"]})
        assert late.status_code == 503
        assert late.headers["retry-after"] == "1"
        assert "3 queries were not answered within 1 seconds" in late.json()["detail"]
        index.gate.release(2)
        assert (await client.post("/retrieve", json={"queries": ["d"]})).status_code == 200

    talk(index, work, max_seconds=1, max_batch=1)
    assert [queries for queries, _ in index.asked] == [("a",), ("d",)]


def test_a_time_limit_of_the_index_itself_is_its_failure() -> None:
    class Remote(EchoIndex):
        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            raise TimeoutError("its server gave no answer")

    answer = post(Remote(), {"queries": ["a"]})
    assert answer.status_code == 500
    assert "its server gave no answer" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("limits", "words"),
    [({"max_batch": 0}, "max_batch is 0"), ({"default_k": 5, "max_k": 4}, "default_k is 5")],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Limits(**limits)
