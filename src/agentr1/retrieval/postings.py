"""Builds the folder that `Bm25Index.open` maps: bm25s's own format, in bounded memory.

Layer 1. bm25s itself builds from lists of words, some 50 bytes for each word of each passage; here
two passes over files stand in for that, and the numbers come out the same to the last bit (tested).
What stays in memory is the vocabulary and one block of postings.
"""

from __future__ import annotations

import array
import collections
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import bm25s
import numpy as np
from tqdm.auto import tqdm

from agentr1.retrieval.base import Passage
from agentr1.retrieval.bm25 import METHOD, no_words, words_of

FILES = (
    *("data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy"),
    *("vocab.index.json", "params.index.json"),
)
"""What bm25s reads."""
BLOCK = 16_000_000
"""Postings sorted at once, 40 bytes each while that lasts."""
_CHUNK = 1_000_000
"""Words counted at once."""
_WORDS, _COUNTS, _UNIQUE, _LENGTHS = "words.i32", "counts.i32", "unique.i32", "lengths.i32"
_COUNTED = (_WORDS, _COUNTS, _UNIQUE, _LENGTHS)
"""Between the stages: of each posting its word and count, of each passage its postings and words.
"""


def refuse_wordless(passages: Iterable[Passage]) -> None:
    """Stop before counting a corpus that has no words; one with words is known by its first.

    Raises:
        ValueError: it has none.
    """
    if not any(words_of(f"{passage.title} {passage.text}") for passage in passages):
        raise no_words()


def count_words(passages: Iterable[Passage], total: int, folder: Path) -> None:
    """Stage one: number the words and count them in each passage.

    Args:
        passages: the corpus, in order; `refuse_wordless` has seen it.
        total: how many they are.
        folder: for the results; must exist.
    """
    numbers: collections.defaultdict[str, int] = collections.defaultdict()
    numbers.default_factory = numbers.__len__  # a new word gets the next number
    with (
        (folder / _WORDS).open("wb") as words,
        (folder / _COUNTS).open("wb") as counts,
        (folder / _UNIQUE).open("wb") as unique,
        (folder / _LENGTHS).open("wb") as lengths,
    ):
        ids, sizes = array.array("i"), array.array("i")
        for passage in tqdm(passages, "words", total, unit="passage", mininterval=1):
            before = len(ids)
            found = words_of(f"{passage.title} {passage.text}")
            ids.extend(map(numbers.__getitem__, found))
            sizes.append(len(ids) - before)
            if len(ids) >= _CHUNK:
                _write_counts(ids, sizes, (words, counts, unique, lengths))
                ids, sizes = array.array("i"), array.array("i")
        _write_counts(ids, sizes, (words, counts, unique, lengths))
    _write_vocabulary(numbers, folder / "vocab.index.json")


def _write_vocabulary(numbers: Mapping[str, int], path: Path) -> None:
    """As one JSON object, in parts: all at once would take half a kilobyte a word."""
    words = iter(numbers.items())
    with path.open("w", encoding="utf-8") as file:
        start = "{"
        while part := dict(itertools.islice(words, 10_000)):
            file.write(start + json.dumps(part, ensure_ascii=False)[1:-1])
            start = ", "
        file.write("}")


def _write_counts(ids: array.array, sizes: array.array, files: tuple[IO[bytes], ...]) -> None:
    """Append the postings of some passages, ordered by passage, then word."""
    lengths = np.frombuffer(sizes, dtype=np.int32) if sizes else np.zeros(0, np.int32)
    words = np.frombuffer(ids, dtype=np.int32) if ids else np.zeros(0, np.int32)
    owners = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    pairs, counts = np.unique((owners << 32) | words, return_counts=True)
    unique = np.bincount(pairs >> 32, minlength=len(lengths))
    for file, values in zip(files, (pairs & 0xFFFFFFFF, counts, unique, lengths), strict=True):
        file.write(values.astype(np.int32).tobytes())


def write_postings(folder: Path, block: int = BLOCK) -> None:
    """Stage two: per word the passages that hold it and what it is worth there.

    Args:
        folder: holds the results of `count_words`.
        block: postings to sort at once.
    """
    unique = np.fromfile(folder / _UNIQUE, dtype=np.int32)
    lengths = np.fromfile(folder / _LENGTHS, dtype=np.int32)
    frequencies = _frequencies(folder)  # (words,): passages that hold the word
    ends = np.concatenate([[0], np.cumsum(frequencies)])
    np.save(folder / "indptr.csc.index.npy", ends)
    weights = _Weights(lengths, frequencies)
    with (
        (folder / "data.csc.index.npy").open("wb") as data,
        (folder / "indices.csc.index.npy").open("wb") as indices,
    ):
        _npy_header(data, "<f4", int(ends[-1]))
        _npy_header(indices, "<i4", int(ends[-1]))
        with tqdm(desc="postings", total=int(ends[-1]), unit_scale=True, mininterval=1) as bar:
            for first, last in _ranges(ends, block):
                words, counts, places = _gather(folder, unique, first, last)
                order = np.argsort(words, kind="stable")
                words, counts, places = words[order], counts[order], places[order]
                weights.of(words, counts, places).tofile(data)
                places.tofile(indices)
                bar.update(len(words))
    _write_parameters(folder, len(lengths))


def counted(folder: Path) -> dict[str, int]:
    """The results of `count_words` that are there, and their sizes."""
    paths = [folder / name for name in (*_COUNTED, "vocab.index.json")]
    return {path.name: path.stat().st_size for path in paths if path.is_file()}


def drop_counts(folder: Path) -> None:
    """Remove the results of `count_words` when the postings are safe."""
    for name in _COUNTED:
        (folder / name).unlink(missing_ok=True)


class _Weights:
    """BM25 as bm25s computes it, in the same order and precision of operations."""

    def __init__(self, lengths: np.ndarray, frequencies: np.ndarray) -> None:
        settings = bm25s.BM25(method=METHOD)
        total = len(lengths)
        rarity = [math.log(1 + (total - df + 0.5) / (df + 0.5)) for df in frequencies.tolist()]
        self._rarity = np.array(rarity, dtype=np.float32)  # (words,)
        average = lengths.mean() or 1.0
        self._norms = settings.k1 * ((1 - settings.b) + settings.b * lengths / average)

    def of(self, words: np.ndarray, counts: np.ndarray, places: np.ndarray) -> np.ndarray:
        """What each word is worth in each passage, as float32."""
        share = counts / (self._norms[places] + counts)
        return (self._rarity[words] * share).astype(np.float32)


def _frequencies(folder: Path) -> np.ndarray:
    frequencies = np.zeros(0, np.int64)
    for words in _chunks(folder / _WORDS):
        found = np.bincount(words, minlength=len(frequencies))
        found[: len(frequencies)] += frequencies
        frequencies = found
    return frequencies


def _ranges(ends: np.ndarray, block: int) -> Iterator[tuple[int, int]]:
    """Cut the words into ranges of about `block` postings, at least one word each."""
    first = 0
    while first < len(ends) - 1:
        last = int(np.searchsorted(ends, ends[first] + block, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def _gather(
    folder: Path, unique: np.ndarray, first: int, last: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words, counts and passages of the postings of a range of words, in order of passages."""
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    ends = np.cumsum(unique)  # (passages,): postings up to and with each
    start = 0
    both = zip(_chunks(folder / _WORDS), _chunks(folder / _COUNTS), strict=True)
    for words, counts in both:
        here = np.flatnonzero((words >= first) & (words < last))
        places = np.searchsorted(ends, start + here, side="right").astype(np.int32)
        kept.append((words[here], counts[here], places))
        start += len(words)
    parts = list(zip(*kept, strict=True))
    words, counts, places = (np.concatenate(part) for part in parts)
    return words, counts, places


def _chunks(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(values := np.fromfile(file, dtype=np.int32, count=_CHUNK)):
            yield values


def _npy_header(file: IO[bytes], kind: str, length: int) -> None:
    """Begin a .npy file whose numbers are appended as they come."""
    header = {"descr": kind, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_parameters(folder: Path, passages: int) -> None:
    settings = bm25s.BM25(method=METHOD, backend="numpy")
    names = ("k1", "b", "delta", "method", "idf_method", "dtype", "int_dtype", "backend")
    parameters = {name: getattr(settings, name) for name in names}
    parameters |= {"num_docs": passages, "version": bm25s.__version__}
    (folder / "params.index.json").write_text(json.dumps(parameters), encoding="utf-8")
