"""Builds an index folder in stages, each of which is done once however often it is interrupted.

Layer 1. Knows the order of the stages and which files each leaves behind, nothing of how they rank.
    folder/  manifest.json  passages.*  bm25/*  dense/*  .lock
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentr1.locks import locked
from agentr1.retrieval import dense, postings
from agentr1.retrieval.encoders import DEFAULT, Encoder, lasting
from agentr1.retrieval.manifest import (
    KINDS,
    NAME,
    Manifest,
    check_corpus,
    check_files,
    corpus_record,
    installed_versions,
    read_manifest,
    removal,
)
from agentr1.retrieval.memory import Need, available_memory, estimate_need, refuse_too_large
from agentr1.retrieval.opening import BM25, DENSE
from agentr1.retrieval.passages import ENDS, TEXTS, StoredPassages, store

_FILES: Mapping[str, Sequence[str]] = {
    "passages": (TEXTS, ENDS),
    "words": (),
    "postings": tuple(f"{BM25}/{name}" for name in postings.FILES),
    "vectors": (f"{DENSE}/{dense.VECTORS}",),
    "ivfpq": (f"{DENSE}/{dense.IVFPQ}",),
}
"""What each stage leaves behind that an index is read from."""
_LOCK = ".lock"

LAYOUTS = ("auto", "flat", "ivfpq")


@dataclasses.dataclass(frozen=True)
class IndexSettings:
    """What makes two indexes of one corpus the same.

    Attributes:
        kind: bm25, dense or hybrid.
        encoder: `LIBRARY:MODEL` of the embeddings.
        query_prefix: put before a query; models of the E5 kind want "query: ".
        passage_prefix: put before a passage; those models want "passage: ".
        layout: flat is exact, ivfpq compressed; auto is flat for up to a million passages.
    """

    kind: str = "bm25"
    encoder: str = DEFAULT
    query_prefix: str = ""
    passage_prefix: str = ""
    layout: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what no index is."""
        for name, value, known in (("kind", self.kind, KINDS), ("layout", self.layout, LAYOUTS)):
            if value not in known:
                raise ValueError(f"{name} {value!r}: expected one of {', '.join(known)}")

    @property
    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: for words alone there is nothing to choose."""
        if self.kind == "bm25":
            return {}
        recorded = {k: v for k, v in dataclasses.asdict(self).items() if k != "kind"}
        return recorded | {"encoder": lasting(self.encoder)}


def build_index(
    corpus: Path,
    folder: Path,
    settings: IndexSettings,
    announce: Callable[[Need, int | None], None] = lambda need, available: None,
) -> Manifest:
    """Build an index, or finish one that was interrupted; a finished one is left as it is.

    Args:
        corpus: a passages file.
        folder: new, empty, or of the same index.
        settings: of the index.
        announce: told the need and the available memory, before anything is built.

    Raises:
        ValueError: the corpus is malformed, or the folder holds something else.
        RuntimeError: the index cannot fit in memory or on disk, or another process is building it.
        ImportError: a library is not installed.
    """
    if not corpus.is_file():
        raise FileNotFoundError(f"there is no corpus {corpus}: expected a .jsonl or .jsonl.gz file")
    record = corpus_record(corpus)
    manifest = _begun(record, folder, settings)
    if manifest.complete:
        return manifest
    encoder = None if settings.kind == "bm25" else Encoder(settings.encoder)
    need = _need(corpus, settings, encoder)
    available = available_memory(need.mapped)
    announce(need, available)
    refuse_too_large(need, folder, available)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / _LOCK, folder):
        # Asked again: another process may have come this far before the lock was ours.
        manifest = _begun(record, folder, settings)
        return manifest if manifest.complete else _built(manifest, corpus, folder, encoder)


def _built(manifest: Manifest, corpus: Path, folder: Path, encoder: Encoder | None) -> Manifest:
    """Go through the stages that are not done; the lock is held."""
    manifest.write(folder)
    manifest = _run(manifest, folder, "passages", lambda: _store(manifest, corpus, folder))
    passages = StoredPassages(folder)
    if manifest.kind != "dense":
        manifest = _build_words(manifest, folder, passages)
    if encoder is not None:
        manifest = _build_vectors(manifest, folder, passages, encoder)
    manifest = dataclasses.replace(manifest, complete=True)
    manifest.write(folder)
    return manifest


def _store(manifest: Manifest, corpus: Path, folder: Path) -> Mapping[str, Any]:
    """Copy the passages, and refuse those that this index cannot be made of.

    Before the stage is on record: until then the folder is free for any other build.
    """
    stored = store(corpus, folder)
    if manifest.kind != "dense":
        postings.refuse_wordless(StoredPassages(folder))
    if manifest.kind != "bm25" and _layout(manifest.settings["layout"], stored.passages) == "ivfpq":
        dense.refuse_too_few(stored.passages)
    return stored._asdict()


def _begun(record: Mapping[str, Any], folder: Path, settings: IndexSettings) -> Manifest:
    """The folder's manifest if it is of this very index, a new one if it is free."""
    new = Manifest(settings.kind, record, settings.recorded, versions=installed_versions())
    if not folder.exists() or (folder.is_dir() and not _names(folder)):
        return new
    if not (folder / NAME).is_file():
        raise ValueError(f"{folder} holds something else than an index: choose another --out")
    manifest = read_manifest(folder)
    if not manifest.stages:  # as after a corpus that was refused, which is mended by now
        return new
    check_corpus(folder, manifest, record)
    there, asked = (manifest.kind, dict(manifest.settings)), (settings.kind, settings.recorded)
    if there != asked:
        whole = manifest.complete
        raise ValueError(
            f"{folder} holds another{'' if whole else ', half built'} index of this corpus: "
            f"{_said(*there)}, asked for {_said(*asked)}; choose another --out or "
            f"{'remove it' if whole else removal(folder)}"
        )
    check_files(folder, manifest)
    return manifest


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {_LOCK}


def _need(corpus: Path, settings: IndexSettings, encoder: Encoder | None) -> Need:
    dimensions = encoder.dimensions if encoder is not None else 0
    words = settings.kind != "dense"
    need = estimate_need(corpus, words=words, dimensions=dimensions)
    if encoder is not None and _layout(settings.layout, need.passages) == "ivfpq":
        need = estimate_need(corpus, words=words, dimensions=dimensions, ivfpq=True)
    return need


def _build_words(manifest: Manifest, folder: Path, passages: StoredPassages) -> Manifest:
    part = folder / BM25
    part.mkdir(exist_ok=True)
    counted = manifest.stages.get("words")
    if "postings" not in manifest.stages and counted != postings.counted(part):
        manifest = manifest.without("words")  # its results are no part of an index: look for them
    manifest = _run(manifest, folder, "words", lambda: _count_words(passages, part))
    manifest = _run(manifest, folder, "postings", lambda: postings.write_postings(part))
    postings.drop_counts(part)
    return manifest


def _count_words(passages: StoredPassages, part: Path) -> Mapping[str, int]:
    postings.count_words(passages, len(passages), part)
    return postings.counted(part)


def _build_vectors(
    manifest: Manifest,
    folder: Path,
    passages: StoredPassages,
    encoder: Encoder,
) -> Manifest:
    part = folder / DENSE
    part.mkdir(exist_ok=True)
    layout = _layout(manifest.settings["layout"], len(passages))
    prefix = manifest.settings["passage_prefix"]
    encode = functools.partial(dense.encode_passages, passages, encoder, prefix, part)
    manifest = _run(manifest, folder, "vectors", encode)
    if layout == "ivfpq":
        compress = functools.partial(dense.compress, part, len(passages), encoder.dimensions)
        manifest = _run(manifest, folder, "ivfpq", compress)
    return manifest


def _layout(layout: str, passages: int) -> str:
    if layout != "auto":
        return layout
    return "flat" if passages <= dense.FLAT_UP_TO else "ivfpq"


def _run(
    manifest: Manifest, folder: Path, stage: str, work: Callable[[], Mapping[str, Any] | None]
) -> Manifest:
    """Do a stage unless it is done, and record what it left."""
    if stage not in manifest.stages:
        result = work() or {}
        manifest = manifest.finished(stage, result, folder, _FILES[stage])
        manifest.write(folder)
    return manifest


def _said(kind: str, settings: Mapping[str, Any]) -> str:
    return ", ".join([kind, *(f"{name}={value!r}" for name, value in settings.items())])
