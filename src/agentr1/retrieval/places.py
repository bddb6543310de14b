"""From the name of a place to the passages there: a file, an index folder or a server's address.

Layer 1, above every kind of index: the one place that knows how a recipe writes each of them. Its
callers are the search tool, environments that retrieve on their own, and the server.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agentr1.retrieval.base import Index, Retriever, load_passages
from agentr1.retrieval.bm25 import Bm25Index
from agentr1.retrieval.gathering import Gathered
from agentr1.retrieval.http import HttpIndex
from agentr1.retrieval.opening import open_index
from agentr1.retrieval.opensearch import OpenSearchIndex
from agentr1.retrieval.qdrant import QdrantIndex
from agentr1.retrieval.remote import is_address

_FAST_PASSAGES = 10_000
"""Up to this size a BM25 search takes well under a millisecond, about what a thread costs."""
_REMOTE_SEARCHES = 4
"""Requests to one server at the same time: it has other cores, and the way there takes time."""
_REMOTE: dict[str, Callable[[str], HttpIndex | OpenSearchIndex | QdrantIndex]] = {
    "http": HttpIndex,
    "https": HttpIndex,
    "opensearch+http": OpenSearchIndex.at,
    "opensearch+https": OpenSearchIndex.at,
    "qdrant+http": QdrantIndex.at,
    "qdrant+https": QdrantIndex.at,
}


def open_place(place: str | Path, k: int = 1) -> Index:
    """Open the passages at a place for searching.

    Args:
        place: a passages file (`.jsonl`, `.jsonl.gz`: indexed with BM25 in memory), an index
            folder, or an address: `http://host:8000` of a server that speaks `/retrieve`,
            `opensearch+http://host:9200/INDEX`,
            `qdrant+http://host:6333/COLLECTION?encoder=LIBRARY:MODEL`.
        k: passages that a search will ask for at most.

    Raises:
        ConnectionError: no retriever answers at the address.
        FileNotFoundError, ValueError: nothing there that can be searched, or not with this `k`.
    """
    if is_address(place):
        scheme = str(place).partition("://")[0].lower()
        if scheme not in _REMOTE:
            raise ValueError(f"{place!r}: expected an address with one of {sorted(_REMOTE)}")
        index = _REMOTE[scheme](str(place))
        index.check(k)
        return index
    if not Path(place).exists():
        raise FileNotFoundError(f"{place}: expected a passages file or an index folder there")
    if Path(place).is_dir():
        return open_index(Path(place))
    return Bm25Index(load_passages(place))


def open_retriever(place: str | Path, k: int = 1) -> Retriever:
    """Open the passages at a place for many episodes at once; share it between them.

    Args, Raises:
        as in `open_place`.
    """
    index = open_place(place, k)
    if is_address(place):
        return Gathered(index, at_once=_REMOTE_SEARCHES)
    small = isinstance(index, Bm25Index) and len(index) <= _FAST_PASSAGES
    return Gathered(index, in_thread=not small)
