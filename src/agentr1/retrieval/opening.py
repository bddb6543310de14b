"""An index folder, opened for searching: whatever its kind, one `Index` comes out.

Layer 1. Checks the manifest first, so that what opens can be trusted to be whole.
"""

from __future__ import annotations

from pathlib import Path

from agentr1.retrieval.bm25 import Bm25Index
from agentr1.retrieval.dense import DenseIndex
from agentr1.retrieval.hybrid import HybridIndex
from agentr1.retrieval.manifest import check_manifest
from agentr1.retrieval.passages import StoredPassages

BM25, DENSE = "bm25", "dense"
"""Folders of the parts of an index; a hybrid one has both."""


def open_index(
    folder: str | Path, corpus: str | Path | None = None
) -> Bm25Index | DenseIndex | HybridIndex:
    """Open an index that `agentr1 index` built.

    Args:
        folder: of the index.
        corpus: refuse an index that was built from any other file.

    Raises:
        FileNotFoundError: it is no index.
        ValueError: it is half built, damaged, of another schema or of another corpus.
        ImportError: its kind needs a library that is not installed.
    """
    folder = Path(folder)
    manifest = check_manifest(folder, Path(corpus) if corpus else None)
    passages = StoredPassages(folder)
    if manifest.kind == "bm25":
        return Bm25Index.open(folder / BM25, passages)
    settings = manifest.settings
    prefixes = (settings["query_prefix"], settings["passage_prefix"])
    dense = DenseIndex.open(folder / DENSE, passages, settings["encoder"], prefixes)
    if manifest.kind == "dense":
        return dense
    return HybridIndex(Bm25Index.open(folder / BM25, passages), dense)
