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
        """See within seconds that the index is there and holds documents; any `k` will do.

        Raises:
            ConnectionError: it is not, with the way out.
        """
        try:
            answer = self._remote.get(f"/{self.index}/_count", timeout=_CHECK_SECONDS)
            self._passages = field_of(answer, "count", int, self.place)
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"no OpenSearch index answers at {self.place} ({error}); start the server, fill "
                "the index, or mend the address"
            ) from error
        if not self._passages:
            raise ConnectionError(f"the OpenSearch index at {self.place} is empty; fill it first")

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return per query at most `k` hits, best first, none where nothing matches.

        Raises:
            ConnectionError, TimeoutError, ValueError: as in `http.HttpIndex.search`.
        """
        # Of the two lines per query the first could name another index.
        body = b"".join(b"{}\n" + encoded(self._query(query, k)) + b"\n" for query in queries)
        kind = "application/x-ndjson"
        answer = self._remote.post(f"/{self.index}/_msearch", body, kind=kind)
        responses = field_of(answer, "responses", list, self.place)
        if len(responses) != len(queries):
            raise malformed(self.place, f"{len(queries)} responses", answer)
        return [self._hits(response) for response in responses]

    def _query(self, query: str, k: int) -> dict[str, Any]:
        fields = [f"{self.title}^{self.title_weight:g}", self.text]
        # `cross_fields` scores title and text as one text, which is what the other indexes do.
        match = {"query": query, "fields": fields, "type": "cross_fields"}
        return {
            "size": k,
            "query": {"multi_match": match},
            "_source": [self.title, self.text],
            "track_total_hits": False,
        }

    def _hits(self, response: Any) -> list[Hit]:
        if isinstance(response, dict) and "error" in response:
            # The request as a whole succeeds although a search in it failed.
            raise ConnectionError(f"{self.place}: a search failed: {str(response['error'])[:200]}")
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
