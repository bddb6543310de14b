"""An index in OpenSearch (or Elasticsearch): BM25 over its fields, many queries a request.

Layer 1. Speaks `_msearch`, which both engines have had unchanged for many versions; filling the
index is the engine's own matter. No client library: one request is all there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import httpx2

from agentr1.retrieval.base import Hit, Passage
from agentr1.retrieval.remote import Remote, encoded, field_of, malformed

_CHECK_SECONDS = 10.0


class OpenSearchIndex:
    """An index of an OpenSearch server whose documents have a title and a text.

    Args:
        url: of the server; `http://user:password@host:9200` logs in.
        index: its name.
        title, text: the fields of a document that are searched and returned.
        title_weight: how much a match in the title counts beside one in the text.
        timeout: seconds an answer may take.
        headers: sent with each request, `{"authorization": "ApiKey ..."}` for example.
        transport: replaces the network.
    """

    def __init__(
        self,
        url: str,
        index: str,
        *,
        title: str = "title",
        text: str = "text",
        title_weight: float = 1.0,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        if not index or any(sign in index for sign in '/?#*, "\\<>|'):
            raise ValueError(f"{index!r} is no name of one index; write http://host:9200/INDEX")
        self._remote = Remote(url, timeout=timeout, headers=headers, transport=transport)
        self.index = index
        self.title, self.text, self.title_weight = title, text, title_weight
        self.place = f"{self._remote.url}/{index}"
        self._passages = 0

    @classmethod
    def at(cls, address: str) -> OpenSearchIndex:
        """From `opensearch+http://host:9200/INDEX`."""
        server, _, index = address.removeprefix("opensearch+").rstrip("/").rpartition("/")
        return cls(server, unquote(index))

    def __len__(self) -> int:
        """Documents in the index when `check` last looked."""
        return self._passages

    def check(self, k: int = 1) -> None:
        """See within seconds that the index is there and holds passages; any `k` will do.

        Raises:
            ConnectionError: it is not, with the way out.
        """
        try:
            answer = self._remote.get(f"/{self.index}/_count", timeout=_CHECK_SECONDS)
            self._passages = field_of(answer, "count", int, self.place)
            if self._passages:
                # To the engine a field that no document has is no error: nothing is found in it.
                self._search([self._wanted(1, {"match_all": {}})], timeout=_CHECK_SECONDS)
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"no OpenSearch index of passages answers at {self.place} ({error}); start the "
                f"server, fill the index with documents that have the fields {self.title!r} and "
                f"{self.text!r}, or mend the address"
            ) from error
        if not self._passages:
            raise ConnectionError(f"the OpenSearch index at {self.place} is empty; fill it first")

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return per query at most `k` hits, best first, none where nothing matches.

        Raises:
            ConnectionError, TimeoutError, ValueError: as in `http.HttpIndex.search`.
        """
        fields = [f"{self.title}^{self.title_weight:g}", self.text]
        # `cross_fields` scores title and text as one text, which is what the other indexes do.
        match = {"fields": fields, "type": "cross_fields"}
        return self._search(
            [self._wanted(k, {"multi_match": {"query": query, **match}}) for query in queries]
        )

    def _wanted(self, k: int, query: Mapping[str, Any]) -> dict[str, Any]:
        fields = [self.title, self.text]
        return {"size": k, "query": query, "_source": fields, "track_total_hits": False}

    def _search(
        self, searches: Sequence[Mapping[str, Any]], timeout: float | None = None
    ) -> list[list[Hit]]:
        # Of the two lines per search the first could name another index.
        body = b"".join(b"{}\n" + encoded(search) + b"\n" for search in searches)
        path, kind = f"/{self.index}/_msearch", "application/x-ndjson"
        answer = self._remote.post(path, body, kind=kind, timeout=timeout)
        responses = field_of(answer, "responses", list, self.place)
        if len(responses) != len(searches):
            raise malformed(self.place, f"{len(searches)} responses", answer)
        return [self._hits(response) for response in responses]

    def _hits(self, response: Any) -> list[Hit]:
        if fault := _fault(response):
            raise ConnectionError(f"{self.place}: {fault}")
        found = field_of(field_of(response, "hits", dict, self.place), "hits", list, self.place)
        hits = []
        for hit in found:
            source = field_of(hit, "_source", dict, self.place)
            title, text = source.get(self.title), source.get(self.text)
            if not isinstance(title, str) or not isinstance(text, str):
                expected = f"documents with texts in {self.title!r} and {self.text!r}"
                raise malformed(self.place, expected, source)
            passage = Passage(field_of(hit, "_id", str, self.place), title, text)
            hits.append(Hit(passage, float(field_of(hit, "_score", int | float, self.place))))
        return hits


def _fault(response: Any) -> str | None:
    """What kept the engine from searching all of the index, if anything did.

    The request as a whole succeeds although a search in it failed or saw a part of the index only,
    and hits of a part would pass for the best of all.
    """
    if not isinstance(response, dict):
        return None
    if "error" in response:
        return f"a search failed: {str(response['error'])[:200]}"
    if response.get("timed_out"):
        return "a search was cut short by the engine's own time limit (timed_out)"
    shards = response.get("_shards")
    if isinstance(shards, dict) and shards.get("failed"):
        why = str(shards.get("failures", "no reason given"))[:200]
        return f"a search failed on {shards['failed']} of {shards.get('total')} shards: {why}"
    return None
