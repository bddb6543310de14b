"""Search over a corpus as a tool.

Layer 1. It turns a retriever's passages into text; which index is behind it, in process or over
HTTP, is the retriever's matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentr1.retrieval.base import Retriever, load_passages
from agentr1.retrieval.bm25 import Bm25Index
from agentr1.tools.threads import in_daemon_thread

_FAST_PASSAGES = 10_000
"""Up to this size a BM25 search takes well under a millisecond, about what a thread costs."""


class Search:
    """The tool `search`.

    Args:
        retriever: ranks the passages.
        k: passages a search returns at most.
        in_thread: search off the event loop. False only for a retriever that answers within a
            millisecond: anything slower would hold up every other rollout.
    """

    name = "search"
    description = "Search the corpus for passages."
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to look for."}},
        "required": ["query"],
    }

    def __init__(self, retriever: Retriever, k: int = 3, in_thread: bool = True) -> None:
        if k < 1:
            raise ValueError(f"k is {k}, expected at least one passage")
        self.retriever = retriever
        self.k = k
        self.in_thread = in_thread

    @classmethod
    def from_corpus(cls, path: str | Path, k: int = 3) -> Search:
        """Index a corpus file with BM25; build it once and share it between environments."""
        passages = load_passages(path)
        return cls(Bm25Index(passages), k, in_thread=len(passages) > _FAST_PASSAGES)

    async def __call__(self, query: str) -> str:
        """Return the best passages, one `title: text` a line."""
        if self.in_thread:
            found = await in_daemon_thread(self.retriever.search, query=query, k=self.k)
        else:
            found = self.retriever.search(query, self.k)
        return "\n".join(f"{passage.title}: {passage.text}" for passage in found) or "No results."
