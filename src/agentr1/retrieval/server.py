"""An index for many machines: HTTP, in the protocol of Search-R1's servers.

Layer 1. `POST /retrieve` takes queries and answers documents, so that the clients of either project
work with the servers of both; `/health` and `/metrics` are for who runs it. Searches run in threads
of their own, and concurrent requests are searched for together. Nothing here knows tools, episodes
or files; `agentr1 serve-retriever` opens the index and starts the process. Needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import prometheus_client
import pydantic
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from agentr1.retrieval.base import Hit, Index, Passage
from agentr1.retrieval.gathering import Gathered
from agentr1.retrieval.limits import OF_REQUESTS, Limits

_LOGGER = logging.getLogger(__name__)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Asked(pydantic.BaseModel):
    """The body of a request; `topk` of 0 or none stands for the server's own."""

    model_config = pydantic.ConfigDict(strict=True)

    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


class _Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def make_app(index: Index, about: Mapping[str, Any], limits: Limits | None = None) -> FastAPI:
    """The web application over an index.

    Args:
        index: searched in daemon threads.
        about: shown at `/health`: the kind of the index and what it was built from.
        limits: see there.
    """
    service = _Service(index, limits or Limits())
    app = FastAPI(title="agentr1 retriever", openapi_url=None)

    @app.post("/retrieve")
    async def retrieve(request: Request) -> Response:
        return await service.answer(request)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        limits = {name: getattr(service.limits, name) for name in OF_REQUESTS}
        return {"status": "ok", **about, "passages": len(index), **limits}

    @app.get("/metrics")
    async def metrics() -> Response:
        text = prometheus_client.generate_latest(service.meters.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return app


class _Service:
    """Answers requests within its limits and counts them."""

    def __init__(self, index: Index, limits: Limits) -> None:
        self.limits = limits
        self.meters = _Meters()
        measured = _Measured(index, self.meters)
        self._gathered = Gathered(measured, max_batch=limits.max_batch, at_once=limits.searches)
        self._waiting = 0

    async def answer(self, request: Request) -> Response:
        """The response to a request, a refusal included."""
        started = time.perf_counter()
        headers: dict[str, str] = {}
        with self.meters.in_flight.track_inprogress():
            try:
                asked = await self._read(request)
                content, status = await self._found(asked), 200
            except _Refused as refused:
                content, status = {"detail": str(refused)}, refused.status
                if status == 503:
                    headers["retry-after"] = "1"
            except Exception as error:
                # A client that went away while it sent its body ends here too.
                _LOGGER.exception("a search failed")
                content = {"detail": f"the search failed: {type(error).__name__}: {error}"[:500]}
                status = 500
        self.meters.count(status, time.perf_counter() - started)
        return JSONResponse(content, status, headers)

    async def _found(self, asked: Asked) -> dict[str, Any]:
        count = len(asked.queries)
        if self._waiting and self._waiting + count > self.limits.max_waiting:
            raise _Refused(
                503,
                f"{self._waiting} queries are waiting, {count} more would be over the limit of "
                f"{self.limits.max_waiting}; come back later",
            )
        limit = asyncio.timeout(self.limits.max_seconds)
        self._waiting += count
        self.meters.waiting.set(self._waiting)
        try:
            async with limit:
                found = await self._gathered.find_all(asked.queries, self._k(asked))
        except TimeoutError as error:
            if not limit.expired():  # the index's own
                raise
            raise _Refused(
                503,
                f"{count} queries were not answered within {self.limits.max_seconds} seconds; "
                "come back later, or send fewer",
            ) from error
        finally:
            self._waiting -= count
            self.meters.waiting.set(self._waiting)
        self.meters.queries.inc(count)
        write = _scored if asked.return_scores else _document
        return {"result": [[write(hit) for hit in hits] for hits in found]}

    def _k(self, asked: Asked) -> int:
        return asked.topk or self.limits.default_k

    async def _read(self, request: Request) -> Asked:
        limits = self.limits
        try:
            asked = Asked.model_validate_json(await self._body(request))
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the body"
            raise _Refused(
                422,
                f"{place}: {first['msg']}; expected "
                '{"queries": ["..."], "topk": 3, "return_scores": true}',
            ) from error
        if len(asked.queries) > limits.max_queries:
            count = len(asked.queries)
            raise _Refused(
                422, f"{count} queries, expected at most {limits.max_queries}; send fewer"
            )
        if not 0 <= (asked.topk or 0) <= limits.max_k:
            raise _Refused(422, f"topk is {asked.topk}, expected 1 to {limits.max_k}")
        hits = len(asked.queries) * self._k(asked)
        if hits > limits.max_hits:
            raise _Refused(
                422,
                f"{len(asked.queries)} queries of {self._k(asked)} passages are {hits}, expected "
                f"at most {limits.max_hits}; send fewer queries",
            )
        longest = max(map(len, asked.queries), default=0)
        if longest > limits.max_chars:
            raise _Refused(
                422, f"a query has {longest} characters, expected at most {limits.max_chars}"
            )
        return asked

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than it may be long."""
        parts = bytearray()
        async for part in request.stream():
            parts += part
            if len(parts) > self.limits.max_bytes:
                raise _Refused(
                    413,
                    f"the body is longer than {self.limits.max_bytes} bytes; send fewer queries",
                )
        return bytes(parts)


class _Measured:
    """An index whose searches are measured."""

    def __init__(self, index: Index, meters: _Meters) -> None:
        self._index = index
        self._meters = meters

    def __len__(self) -> int:
        return len(self._index)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self._meters.batch.observe(len(queries))
        with self._meters.search_seconds.time():
            return self._index.search(queries, k)


class _Meters:
    """What `/metrics` shows; a registry of its own, since a process may hold several servers."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        named: dict[str, Any] = {"namespace": "agentr1_retriever", "registry": self.registry}
        counter, gauge = prometheus_client.Counter, prometheus_client.Gauge
        histogram = prometheus_client.Histogram
        self.requests = counter("requests", "Requests to /retrieve.", ["status"], **named)
        self.errors = counter("errors", "Requests that were not answered with 200.", **named)
        self.queries = counter("queries", "Queries answered.", **named)
        self.seconds = histogram(
            "request_seconds", "Seconds from request to answer.", buckets=_SECONDS, **named
        )
        self.search_seconds = histogram(
            "search_seconds", "Seconds of one search of the index.", buckets=_SECONDS, **named
        )
        self.batch = histogram(
            "search_queries", "Queries in one search of the index.", buckets=_SIZES, **named
        )
        self.in_flight = gauge("requests_in_flight", "Requests being answered.", **named)
        self.waiting = gauge("queries_waiting", "Queries that wait or are searched for.", **named)

    def count(self, status: int, seconds: float) -> None:
        self.requests.labels(str(status)).inc()
        self.seconds.observe(seconds)
        if status != 200:
            self.errors.inc()


def _document(hit: Hit) -> dict[str, Any]:
    """A passage as Search-R1's servers write one, and with fields of its own."""
    passage: Passage = hit.passage
    title = " ".join(passage.title.split())  # its clients take the first line for the title
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "contents": f'"{title}"\n{passage.text}',
    }


def _scored(hit: Hit) -> dict[str, Any]:
    return {"document": _document(hit), "score": float(hit.score)}
