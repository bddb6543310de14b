"""What a retriever's server takes on, and what a search asks of one at most.

Layer 1, apart from `server.py`, so that a command can show them without the server's libraries and
clients know them without the server.
"""

from __future__ import annotations

import dataclasses

LONGEST_QUERY = 2000
"""Characters that the search tool sends. One request to a server holds the queries of many
episodes: it must not be refused for the query of one of them."""
QUERY_BYTES = 6 * LONGEST_QUERY + 100
"""What one query takes of a request at most, all around it included: JSON spells a control
character with six."""
OF_REQUESTS: tuple[str, ...] = ("max_k", "max_queries", "max_hits", "max_chars", "max_bytes")
"""The limits that a server tells its clients at `/health`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes on.

    Search-R1's client sends the queries of a whole training batch in one request, so the limits of
    a request are wide; they are there to stop mistakes.

    Attributes:
        default_k: passages per query where a request does not say.
        max_k: passages per query at most.
        max_queries: queries of one request.
        max_chars: characters of one query.
        max_bytes: of one request's body.
        max_hits: passages of one answer: queries times passages per query.
        max_seconds: that a request waits and is searched for; what still waits by then is dropped.
        max_batch: queries of one search of the index.
        max_waiting: queries that wait or are searched for at once; a request beyond that is told to
            come back later.
        searches: searches of the index at the same time.
    """

    default_k: int = 3
    max_k: int = 100
    max_queries: int = 4096
    max_chars: int = 10_000
    max_bytes: int = 16 * 2**20
    max_hits: int = 50_000
    max_seconds: int = 60
    max_batch: int = 64
    max_waiting: int = 8192
    searches: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)}, expected at least 1, like its "
                    f"default {field.default}"
                )
        if self.default_k > self.max_k:
            raise ValueError(
                f"default_k is {self.default_k}, more than max_k={self.max_k}; raise max_k"
            )
