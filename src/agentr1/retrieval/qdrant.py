"""An index in Qdrant: the nearest vectors of a collection, many queries a request.

Layer 1. Speaks the batched query of Qdrant's HTTP interface (1.10 and later). Queries become
vectors here, by the same embedding the collection was filled with; filling it is the engine's own
matter. No client library: one request is all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

import httpx2
import numpy as np

from agentr1.retrieval.base import Hit, Passage
from agentr1.retrieval.encoders import Encoder
from agentr1.retrieval.remote import Remote, encoded, field_of, malformed

_CHECK_SECONDS = 10.0


class QdrantIndex:
    """A collection of a Qdrant server whose points carry a title and a text.

    Args:
        url: of the server.
        collection: its name.
        embed: texts to vectors, (queries, dimensions); called from several threads.
        using: the vector searched, where a collection has several with names.
        title, text: the fields of a point's payload that make a passage.
        timeout: seconds an answer may take.
        headers: sent with each request, `{"api-key": ...}` for example.
        transport: replaces the network.
    """

    def __init__(
        self,
        url: str,
        collection: str,
        embed: Callable[[Sequence[str]], np.ndarray],
        *,
        using: str | None = None,
        title: str = "title",
        text: str = "text",
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        if not collection:
            raise ValueError("expected the name of a collection, got none")
        self._remote = Remote(url, timeout=timeout, headers=headers, transport=transport)
        self._path = f"/collections/{quote(collection, safe='')}/points"
        self.place = f"{self._remote.url}{self._path}"
        self.embed = embed
        self.using = using
        self.title, self.text = title, text
        self._passages = 0

    @classmethod
    def at(cls, address: str) -> QdrantIndex:
        """From `qdrant+http://host:6333/COLLECTION?encoder=LIBRARY:MODEL`."""
        parts = urlsplit(address.removeprefix("qdrant+"))
        options = dict(parse_qsl(parts.query))
        encoder = options.pop("encoder", None)
        using = options.pop("using", None)
        if encoder is None or options:
            raise ValueError(
                f"{address}: expected ?encoder=LIBRARY:MODEL, the one the collection was filled "
                f"with, and perhaps &using=VECTOR, got {parts.query!r}"
            )
        server = urlunsplit((parts.scheme, parts.netloc, "", "", ""))
        collection = unquote(parts.path.strip("/"))
        return cls(server, collection, Encoder(encoder).encode, using=using)

    def __len__(self) -> int:
        """Points in the collection when `check` last looked, about so many."""
        return self._passages

    def check(self, k: int = 1) -> None:
        """See within seconds that the collection is there and holds points of this embedding.

        Any `k` will do.

        Raises:
            ConnectionError: it is not, with the way out.
        """
        try:
            body = encoded({"exact": False})
            answer = self._remote.post(f"{self._path}/count", body, timeout=_CHECK_SECONDS)
            self._passages = self._result(answer, "count", int)
            self._search(["health"], 1, timeout=_CHECK_SECONDS)
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"no Qdrant collection answers at {self.place} ({error}); start the server, fill "
                "the collection with vectors of the same embedding, or mend the address"
            ) from error
        if not self._passages:
            raise ConnectionError(f"the Qdrant collection at {self.place} is empty; fill it first")

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return per query at most `k` hits, best first.

        Raises:
            ConnectionError, TimeoutError, ValueError: as in `http.HttpIndex.search`.
        """
        return self._search(queries, k)

    def _search(
        self, queries: Sequence[str], k: int, timeout: float | None = None
    ) -> list[list[Hit]]:
        wanted: dict[str, Any] = {"limit": k, "with_payload": ["id", self.title, self.text]}
        if self.using is not None:
            wanted["using"] = self.using
        vectors = np.asarray(self.embed(list(queries)), dtype=np.float32)  # (queries, dimensions)
        searches = [{"query": vector.tolist(), **wanted} for vector in vectors]
        body = encoded({"searches": searches})
        answer = self._remote.post(f"{self._path}/query/batch", body, timeout=timeout)
        results = field_of(answer, "result", list, self.place)
        if len(results) != len(queries):
            raise malformed(self.place, f"{len(queries)} results", answer)
        found = [field_of(result, "points", list, self.place) for result in results]
        return [[self._hit(point) for point in points] for points in found]

    def _result(self, answer: Any, name: str, kind: Any) -> Any:
        return field_of(field_of(answer, "result", dict, self.place), name, kind, self.place)

    def _hit(self, point: Any) -> Hit:
        payload = field_of(point, "payload", dict, self.place)
        title, text = payload.get(self.title), payload.get(self.text)
        if not isinstance(title, str) or not isinstance(text, str):
            expected = f"payloads with texts in {self.title!r} and {self.text!r}"
            raise malformed(self.place, expected, payload)
        # A point's own id is a number or a UUID; that of the passage travels in the payload.
        name = payload.get("id", field_of(point, "id", int | str, self.place))
        score = field_of(point, "score", int | float, self.place)
        return Hit(Passage(str(name), title, text), float(score))
