"""Ranking of passages by the cosine of embeddings: exact, or compressed by FAISS's IVF-PQ.

Layer 1. The vectors lie in one file of float32, mapped for searching and appended to while
building, so that an interrupted build goes on at the last chunk. FAISS proposes a few more
candidates than asked for; these are scored anew from the vectors, so that the order depends neither
on the batch a query came in nor on the compression, and ties go to the earlier passage.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from agentr1.retrieval.base import LONG, Hit, Passage
from agentr1.retrieval.encoders import Encoder

VECTORS, IVFPQ = "vectors.f32", "ivfpq.faiss"
FLAT_UP_TO = 1_000_000
"""Passages from which `auto` compresses: beyond, an exact search takes seconds a batch."""
LEAST_FOR_IVFPQ = 5_000
_CHUNK = 4096
_SPARE = 32
"""Candidates beyond k, so that rounding in FAISS cannot push one of the best k out."""
_SPARE_IVFPQ = 200


class DenseIndex:
    """A ranked search by meaning.

    Args:
        passages: the corpus.
        vectors: one row a passage, of length one.
        encoder: for queries; the one that made the vectors.
        query_prefix: put before every query.
        ivfpq: a FAISS index over the same vectors; by default the search is exact.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        vectors: np.ndarray,
        encoder: Encoder,
        *,
        query_prefix: str = "",
        ivfpq: Any = None,
    ) -> None:
        self.passages = passages
        self._vectors = vectors  # (passages, dimensions)
        self._encoder = encoder
        self._prefix = query_prefix
        self._ivfpq = ivfpq
        self._faiss = _faiss()

    @classmethod
    def open(
        cls, folder: Path, passages: Sequence[Passage], encoder: str, prefixes: tuple[str, str]
    ) -> DenseIndex:
        """Map an index that was built into a folder.

        Args:
            folder: of the vectors.
            passages: the corpus.
            encoder: name of the model that made the vectors.
            prefixes: of queries and of passages.

        Raises:
            ValueError: the model under this name is not the one that made the vectors.
        """
        model = Encoder(encoder)
        rows = np.memmap(folder / VECTORS, dtype=np.float32, mode="r")
        size = len(rows) // len(passages)
        probe = model.encode([_text(passages[0], prefixes[1])])[0]
        if size != model.dimensions or np.abs(probe - rows[:size]).max() > 1e-2:
            raise ValueError(
                f"{folder} was not built with this {encoder!r}: its first passage has another "
                "vector now; put the model back, or remove the index and build it again"
            )
        path = folder / IVFPQ
        ivfpq = _faiss().read_index(str(path), _faiss().IO_FLAG_MMAP) if path.exists() else None
        vectors = np.asarray(rows).reshape(len(passages), size)
        return cls(passages, vectors, model, query_prefix=prefixes[0], ivfpq=ivfpq)

    def __len__(self) -> int:
        return len(self.passages)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return per query the `k` passages nearest in meaning; the score is the cosine."""
        return [
            [Hit(self.passages[place], score) for place, score in ranking]
            for ranking in self.rank(queries, k)
        ]

    def rank(self, queries: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """Return per query the places in the corpus that `search` finds, with their scores."""
        if k < 1:
            raise ValueError(f"expected k of at least 1, got {k}")
        if not queries:
            return []
        vectors = self._encoder.encode([self._prefix + query for query in queries])  # (Q, D)
        found = self._candidates(vectors, k)
        return [self._best(*pair, k) for pair in zip(vectors, found, strict=True)]

    def _candidates(self, vectors: np.ndarray, k: int) -> np.ndarray:
        """Places that may be among the best `k`, (Q, candidates); -1 for none."""
        if self._ivfpq is None:
            count = min(k + _SPARE, len(self.passages))
            metric = self._faiss.METRIC_INNER_PRODUCT
            return self._faiss.knn(vectors, self._vectors, count, metric=metric)[1]
        count = min(4 * k + _SPARE_IVFPQ, len(self.passages))
        probes = max(32, self._ivfpq.nlist // 32)
        parameters = self._faiss.SearchParametersIVF(nprobe=min(probes, self._ivfpq.nlist))
        return self._ivfpq.search(vectors, count, params=parameters)[1]

    def _best(self, query: np.ndarray, found: np.ndarray, k: int) -> list[tuple[int, float]]:
        places = np.unique(found[found >= 0])
        if not query.any():
            return []
        # Summed row by row: equal vectors get equal scores, wherever they stand.
        scores = (self._vectors[places].astype(np.float64) * query).sum(axis=1)
        order = np.argsort(-scores, kind="stable")[:k]
        return list(zip(places[order].tolist(), scores[order].tolist(), strict=True))


def encode_passages(
    passages: Sequence[Passage], encoder: Encoder, prefix: str, folder: Path
) -> None:
    """Write the vectors, going on where an interrupted call stopped.

    Args:
        passages: the corpus.
        encoder: the model.
        prefix: put before every passage.
        folder: must exist.
    """
    path = folder / VECTORS
    row = 4 * encoder.dimensions
    path.touch()
    done = path.stat().st_size // row
    with path.open("r+b") as file, _bar("vectors", len(passages), done) as bar:
        file.seek(done * row)  # over a row that was cut
        for start in range(done, len(passages), _CHUNK):
            texts = [_text(passage, prefix) for passage in passages[start : start + _CHUNK]]
            file.write(encoder.encode(texts).tobytes())
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(texts))


def refuse_too_few(passages: int) -> None:
    """Stop before encoding a corpus that no compression can be learned from."""
    if passages < LEAST_FOR_IVFPQ:
        raise ValueError(
            f"IVF-PQ needs at least {LEAST_FOR_IVFPQ} passages to learn from, the corpus has "
            f"{passages}: build with --layout flat"
        )


def compress(folder: Path, passages: int, dimensions: int) -> None:
    """Build the IVF-PQ index of vectors that are written.

    Args:
        folder: of the vectors.
        passages: how many rows they have.
        dimensions: of each.
    """
    faiss = _faiss()
    lists, code = _lists(passages), code_bytes(dimensions) - 8
    index = faiss.index_factory(dimensions, f"IVF{lists},PQ{code}", faiss.METRIC_INNER_PRODUCT)
    picked = np.random.default_rng(0).choice(passages, training_rows(passages), replace=False)
    rows = np.memmap(folder / VECTORS, np.float32, "r", shape=(passages, dimensions))
    index.train(np.array(rows[np.sort(picked)]))
    del rows
    with _bar("compressing", passages, 0) as bar:
        for chunk in _rows(folder / VECTORS, dimensions):
            index.add(chunk)
            bar.update(len(chunk))
    faiss.write_index(index, str(folder / IVFPQ))


def code_bytes(dimensions: int) -> int:
    """Bytes of memory that a compressed vector takes: a byte per four dimensions, and its id."""
    return 8 + max(size for size in range(1, dimensions // 4 + 1) if dimensions % size == 0)


def training_rows(passages: int) -> int:
    """Vectors that the compression is learned from."""
    return min(passages, 64 * _lists(passages))


def _lists(passages: int) -> int:
    return max(1, min(round(4 * math.sqrt(passages)), passages // 39))


def _rows(path: Path, dimensions: int) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(values := np.fromfile(file, np.float32, 16 * _CHUNK * dimensions)):
            yield values.reshape(-1, dimensions)


def _text(passage: Passage, prefix: str) -> str:
    # What no encoder sees is not held in memory for thousands of passages.
    return f"{prefix}{passage.title} {passage.text[:LONG]}"


def _bar(name: str, total: int, done: int) -> tqdm:
    return tqdm(desc=name, total=total, initial=done, unit="passage", mininterval=1)


def _faiss() -> ModuleType:
    if importlib.util.find_spec("faiss") is None:
        raise ImportError(
            "dense search needs faiss, which is not installed: pip install 'agentr1[search]'"
        )
    import faiss

    return faiss
