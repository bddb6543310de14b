"""How much building an index needs, and how much there is: asked before anything is built.

Layer 1. The need is estimated from the first passages of a corpus; the constants were measured
(`docs/retrieval.md`) and are a little generous. What is there is the least of what the machine, the
control groups of a container and the limit of the process leave.
"""

from __future__ import annotations

import gzip
import itertools
import math
import resource
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from agentr1.retrieval.base import Passage, read_passages
from agentr1.retrieval.bm25 import words_of
from agentr1.retrieval.dense import code_bytes, training_rows
from agentr1.retrieval.passages import line_of
from agentr1.retrieval.postings import BLOCK

_SAMPLE = 20_000
_SAMPLE_BYTES = 64_000_000
"""A sample ends with the passage that reaches either."""
_UNLIMITED = 1 << 60
"""Control groups of the first version say "no limit" with a number above this."""


class Need(NamedTuple):
    """What building is expected to take beyond what the process holds already.

    Attributes:
        passages: in the corpus, about.
        memory: bytes at the peak.
        mapped: bytes of files mapped beside that; the system takes their pages back when it needs
            them, but `ulimit -v` counts them.
        disk: bytes at the peak.
    """

    passages: int
    memory: int
    mapped: int
    disk: int


def estimate_need(corpus: Path, *, words: bool, dimensions: int = 0, ivfpq: bool = False) -> Need:
    """Estimate from the beginning of a corpus.

    Args:
        corpus: a passages file.
        words: a BM25 index is built.
        dimensions: of the embeddings, 0 for none.
        ivfpq: the embeddings are compressed.

    Raises:
        ValueError: the beginning cannot be read as passages.
    """
    sample, stored, read = _sample(corpus)
    if not sample:
        raise ValueError(f"{corpus} holds no passages, expected one JSON object a line")
    total = len(sample)
    if read is not None:
        total = max(total + 1, round(_plain_bytes(corpus) * total / read))
    growth = total / len(sample)
    texts = round(stored * growth) + 8 * total
    memory, disk = 60_000_000 + 24 * total, texts
    if words:
        vocabulary, postings = _vocabulary_and_postings(sample, growth)
        counting = 100_000_000 + 250 * vocabulary
        # A word is sorted whole, and it may stand in every passage.
        block = min(postings, max(BLOCK, total))
        sorting = 50_000_000 + 200 * vocabulary + 24 * total + 46 * block
        memory = max(memory, counting, sorting)
        disk += 16 * postings + 8 * total + 30 * vocabulary
    vectors = 4 * dimensions * total
    if dimensions:
        memory = max(memory, 300_000_000)
    if ivfpq:
        codes = total * code_bytes(dimensions)
        memory = max(memory, 200_000_000 + 8 * dimensions * training_rows(total) + 2 * codes)
        disk += codes
    return Need(total, memory, texts + vectors * ivfpq, disk + vectors)


def refuse_too_large(need: Need, folder: Path, available: int | None) -> None:
    """Stop before a build that cannot end well.

    Args:
        need: of the build.
        folder: where it will be, with what a stopped build left there; it or one above it exists.
        available: bytes of memory, None where the system does not say.

    Raises:
        RuntimeError: with the numbers and what to do.
    """
    if available is not None and need.memory > available:
        raise RuntimeError(
            f"building this index of about {need.passages} passages needs about "
            f"{gigabytes(need.memory)} of memory, {gigabytes(available)} are available: stop other "
            "programs, raise the limit of the container or of `ulimit -v`, or build it on a larger "
            "machine and copy the folder (searching needs less than building)"
        )
    place = next(above for above in (folder, *folder.absolute().parents) if above.exists())
    free = shutil.disk_usage(place).free
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if need.disk - there > free:
        raise RuntimeError(
            f"building this index of about {need.passages} passages needs about "
            f"{gigabytes(need.disk)} of disk, {place} has {gigabytes(free)} left: choose another "
            "--out or make room"
        )


def available_memory(mapped: int = 0, root: Path = Path("/")) -> int | None:
    """Bytes this process may still take; None where the system does not say.

    Args:
        mapped: bytes of files that it is going to map.
        root: below which the system shows its numbers.
    """
    limits = [*_of_machine(root), *_of_groups(root)]
    limits += [left - mapped for left in _of_process(root)]
    return max(0, min(limits)) if limits else None


def gigabytes(size: int) -> str:
    """Write a size as people say it."""
    return f"{size / 1e9:.1f} GB"


class _Sample(NamedTuple):
    """The first passages of a corpus.

    Attributes:
        passages: themselves.
        stored: bytes they take in an index.
        read: bytes of the lines they were read from; None if the corpus has no more passages.
    """

    passages: list[Passage]
    stored: int
    read: int | None


def _sample(corpus: Path) -> _Sample:
    passages: list[Passage] = []
    stored = last = 0
    for number, passage in read_passages(corpus):
        if len(passages) == _SAMPLE or stored >= _SAMPLE_BYTES:
            opener = gzip.open if corpus.suffix == ".gz" else open
            with opener(corpus, "rb") as lines:
                return _Sample(passages, stored, sum(map(len, itertools.islice(lines, last))))
        passages.append(passage)
        stored += len(line_of(passage))
        last = number
    return _Sample(passages, stored, None)


def _plain_bytes(corpus: Path) -> float:
    """Size of a corpus when uncompressed, by how well its beginning was compressed."""
    size = corpus.stat().st_size
    if corpus.suffix != ".gz":
        return size
    with corpus.open("rb") as file:
        head = file.read(4_000_000)
    unpacking = zlib.decompressobj(wbits=31)
    plain = len(unpacking.decompress(head))
    return size * plain / max(1, len(head) - len(unpacking.unused_data))


def _vocabulary_and_postings(sample: Sequence[Passage], growth: float) -> tuple[int, int]:
    """Different words of the whole corpus, and pairs of a word and a passage.

    Text follows Heaps' law (within 5% on 67,000 paragraphs of Wikipedia); identifiers and made-up
    names come at a constant rate. In between is safe for text and not far off for the others.
    """
    seen: set[str] = set()
    half = postings = 0
    for number, passage in enumerate(sample):
        if number == len(sample) // 2:
            half = len(seen)
        found = set(words_of(f"{passage.title} {passage.text}"))
        postings += len(found)
        seen |= found
    by_power = len(seen) * growth ** math.log2(len(seen) / half) if half else len(seen) * growth
    by_rate = len(seen) + (len(seen) - half) * 2 * (growth - 1)
    return round(math.sqrt(by_power * by_rate)), round(postings * growth)


def _of_machine(root: Path) -> Iterator[int]:
    yield from _fields(root / "proc/meminfo", "MemAvailable:", 1024)


def _of_process(root: Path) -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield from (limit - used for used in _fields(root / "proc/self/status", "VmSize:", 1024))


def _of_groups(root: Path) -> Iterator[int]:
    """What each control group above this process leaves; file caches can be given back."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = mount / path.lstrip("/")
        # Inside a container the path may be that of the host: the mount itself is then the group.
        for folder in dict.fromkeys((group, *group.parents, mount)):
            if folder == mount or mount in folder.parents:
                yield from _left_in(folder, names)


def _left_in(folder: Path, names: tuple[str, str, str]) -> Iterator[int]:
    limit, usage = (next(iter(_lines(folder / name)), "") for name in names[:2])
    if limit.isdigit() and usage.isdigit() and int(limit) < _UNLIMITED:
        cached = sum(_fields(folder / "memory.stat", names[2], 1))
        yield int(limit) - int(usage) + cached


def _fields(path: Path, name: str, unit: int) -> list[int]:
    found = (line.split() for line in _lines(path))
    return [int(words[1]) * unit for words in found if words and words[0] == name]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
