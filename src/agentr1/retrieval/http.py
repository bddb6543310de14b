"""An index behind HTTP: a client of `/retrieve`, the protocol of Search-R1's servers.

Layer 1. Asks this project's server and those of Search-R1 and its descendants alike, several
queries a request. What it raises is the infrastructure's fault; the policy of a tool decides what
follows from that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from agentr1.retrieval.base import Hit, Passage
from agentr1.retrieval.limits import LONGEST_QUERY, OF_REQUESTS, QUERY_BYTES
from agentr1.retrieval.remote import Remote, RequestRefused, encoded, malformed

_CHECK_SECONDS = 10.0


class HttpIndex:
    """A server that speaks `/retrieve`.

    Args:
        url: its address, with or without `/retrieve` at the end.
        timeout: seconds an answer may take.
        headers: sent with each request.
        transport: replaces the network.

    Attributes:
        about: what the server says of itself at `/health`, empty before `check` or where it does
            not say anything.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        base = url.rstrip("/").removesuffix("/retrieve")
        self._remote = Remote(base, timeout=timeout, headers=headers, transport=transport)
        self.url = self._remote.url
        self.about: Mapping[str, Any] = {}

    def __len__(self) -> int:
        """Passages in the corpus, as the server said.

        Raises:
            ValueError: it does not say.
        """
        passages = self.about.get("passages")
        if not isinstance(passages, int):
            raise ValueError(f"{self.url} does not say how many passages it has")
        return passages

    def check(self, k: int = 1) -> None:
        """See within seconds that a retriever answers there, one query included.

        Args:
            k: passages that will be asked for; a server has a limit of its own.

        Raises:
            ConnectionError: none does, with the way out.
            ValueError: it does, but not with `k` passages, or not the longest query.
        """
        try:
            self.about = self._health()
            # Something else may answer at /health too.
            self._search(["health"], 1, timeout=_CHECK_SECONDS)
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"no retriever answers at {self.url} ({error}); start one with `agentr1 "
                "serve-retriever DIR`, or mend the address"
            ) from error
        # What one query takes: of more queries, a request holds no more than the server takes.
        wanted = dict(zip(OF_REQUESTS, (k, 1, k, LONGEST_QUERY, QUERY_BYTES), strict=True))
        for name, limit in self._limits().items():
            if limit < wanted[name]:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{self.url} takes at most {limit} by its {option} and {wanted[name]} are "
                    f"wanted; start the server with {option} {wanted[name]}"
                    + (", or lower search_top_k" if name in ("max_k", "max_hits") else "")
                )

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return per query at most `k` hits, best first, none where nothing matches.

        In as many requests as the server's limits ask for, where `check` has read them.

        Raises:
            ConnectionError: nobody answers, the connection broke, or the server refused.
            TimeoutError: the answer takes too long.
            ValueError: the answer is not what the protocol says.
        """
        costs = {"max_queries": 1, "max_hits": k, "max_bytes": QUERY_BYTES}
        fit = [limit // costs[name] for name, limit in self._limits().items() if name in costs]
        most = max(1, min([len(queries), *fit]))
        starts = range(0, len(queries), most)
        return [hits for at in starts for hits in self._search(queries[at : at + most], k)]

    def _limits(self) -> dict[str, int]:
        """What the server says that it takes; Search-R1's own servers say nothing."""
        said = {name: self.about.get(name) for name in OF_REQUESTS}
        return {name: limit for name, limit in said.items() if isinstance(limit, int)}

    def _search(
        self, queries: Sequence[str], k: int, timeout: float | None = None
    ) -> list[list[Hit]]:
        asked = encoded({"queries": list(queries), "topk": k, "return_scores": True})
        answer = self._remote.post("/retrieve", asked, timeout=timeout)
        place = f"{self.url}/retrieve"
        results = answer.get("result") if isinstance(answer, dict) else None
        if not isinstance(results, list) or len(results) != len(queries):
            raise malformed(place, f"a 'result' of {len(queries)} lists", answer)
        if not all(isinstance(found, list) for found in results):
            raise malformed(place, "a list of documents per query", answer)
        return [
            [_hit(document, rank, place) for rank, document in enumerate(found[:k], start=1)]
            for found in results
        ]

    def _health(self) -> Mapping[str, Any]:
        try:
            about = self._remote.get("/health", timeout=_CHECK_SECONDS)
        except (RequestRefused, ValueError):  # Search-R1's own servers have no such page
            return {}
        return about if isinstance(about, dict) else {}


def _hit(item: Any, rank: int, place: str) -> Hit:
    """A document as one of the servers writes it: bare or beside its score, a text or fields."""
    wrapped = isinstance(item, dict) and "document" in item
    document, score = (item["document"], item.get("score")) if wrapped else (item, None)
    if score is None:
        score = 1.0 / rank
    if isinstance(document, str):
        document = {"contents": document}
    if isinstance(document, dict) and isinstance(score, int | float):
        title, text = document.get("title"), document.get("text")
        contents = document.get("contents")
        if isinstance(contents, str) and not (isinstance(title, str) and isinstance(text, str)):
            head, _, text = contents.partition("\n")
            title = head.strip()
            if len(title) > 1 and title[0] == title[-1] == '"':  # others are the title's own
                title = title[1:-1]
        if isinstance(title, str) and isinstance(text, str):
            name = document.get("id")
            # One that a server does not name is known by what it says.
            name = _digest(f"{title}\n{text}") if name is None else str(name)
            return Hit(Passage(name, title, text), float(score))
    raise malformed(place, "documents with `contents`, or with `title` and `text`", item)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=8).hexdigest()
