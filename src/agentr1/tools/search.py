"""Search over a corpus as a tool.

Layer 1. It turns a retriever's passages into text; which index is behind it, in process or over
HTTP, is the retriever's matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentr1.retrieval.base import Passage, Retriever
from agentr1.retrieval.limits import LONGEST_QUERY
from agentr1.retrieval.places import open_retriever
from agentr1.tools.base import ToolError


class Search:
    """The tool `search`.

    Args:
        retriever: ranks the passages.
        k: passages a search returns at most.
        passage_chars: longer passages are cut there, at the end of a word; None shows them whole.
    """

    name = "search"
    description = "Search the corpus for passages."
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to look for."}},
        "required": ["query"],
    }

    def __init__(self, retriever: Retriever, k: int = 3, passage_chars: int | None = None) -> None:
        if k < 1:
            raise ValueError(f"k is {k}, expected at least one passage")
        if passage_chars is not None and passage_chars < 1:
            raise ValueError(f"passage_chars is {passage_chars}, expected at least 1, or None")
        self.retriever = retriever
        self.k = k
        self.passage_chars = passage_chars

    @classmethod
    def from_corpus(cls, place: str | Path, k: int = 3, passage_chars: int | None = None) -> Search:
        """Open a passages file, an index folder or a server's address for searching.

        Build it once and share it between environments.

        Raises:
            ConnectionError: no retriever answers at the address.
            ValueError: it does not return as many as `k` passages.
        """
        return cls(open_retriever(place, k), k, passage_chars)

    async def __call__(self, query: str) -> str:
        """Return the best passages, one `title: text` a line."""
        if len(query) > LONGEST_QUERY:
            raise ToolError(
                f"the query has {len(query)} characters, expected at most {LONGEST_QUERY}"
            )
        # JSON can spell half a surrogate pair, which is no text that could be sent or searched.
        query = query.encode("utf-8", errors="replace").decode("utf-8")
        found = await self.retriever.find(query, self.k)
        lines = (result_line(hit.passage, self.passage_chars) for hit in found)
        return "\n".join(lines) or "No results."


def result_line(passage: Passage, limit: int | None = None) -> str:
    """A passage without line breaks: whoever reads results finds the titles at line starts.

    Args:
        passage: what was found.
        limit: characters from which its text is cut.
    """
    return " ".join(f"{passage.title}: {shortened(passage.text, limit)}".splitlines())


def shortened(text: str, limit: int | None) -> str:
    """A passage's text as a result shows it: cut at the end of a word where it is too long."""
    if limit is None or len(text) <= limit:
        return text
    return f"{text[: limit + 1].rpartition(' ')[0] or text[:limit]} ..."
