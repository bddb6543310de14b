"""What an index folder says of itself: of which corpus it is, how it was built, and how far.

Layer 1. The manifest is written before the first stage of a build and after each, in one piece; so
a half built, a foreign or an older folder is refused with the reason instead of answering wrongly.
Knows files, no passages and no ranking.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 2
"""Raised whenever an older folder could no longer be read."""
NAME = "manifest.json"
KINDS = ("bm25", "dense", "hybrid")
_SETTINGS = ("encoder", "query_prefix", "passage_prefix", "layout")
_SHAPE: Mapping[str, type] = {
    "kind": str,
    "corpus": dict,
    "settings": dict,
    "stages": dict,
    "files": dict,
    "versions": dict,
    "complete": bool,
    "schema": int,
}
_PACKAGES = ("agentr1", "bm25s", "numpy", "faiss-cpu", "model2vec", "sentence-transformers")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """An index folder in one record.

    Attributes:
        kind: bm25, dense or hybrid.
        corpus: the file it was built from: name, bytes, sha256.
        settings: what was asked for; part of what makes two indexes the same.
        stages: what is finished, with what came out of it (`passages` has the count).
        files: name to bytes of each finished file.
        versions: of the libraries that built it.
        complete: all stages are finished.
        schema: of the folder.
    """

    kind: str
    corpus: Mapping[str, Any]
    settings: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    complete: bool = False
    schema: int = SCHEMA

    @property
    def passages(self) -> int:
        """How many passages the corpus has."""
        return self.stages["passages"]["passages"]

    def lacking(self) -> str | None:
        """What a manifest must say beyond its keys and does not, if anything."""
        passages = self.stages.get("passages")
        if not {"name", "bytes", "sha256"} <= self.corpus.keys():
            return "name, bytes or sha256 of its corpus"
        if self.kind != "bm25" and not set(_SETTINGS) <= self.settings.keys():
            return f"one of the settings {', '.join(_SETTINGS)}"
        if passages is None:
            return "the stage of its passages" if self.complete or self.stages else None
        numbers = ("passages", "long", "longest")
        known = isinstance(passages, dict) and all(type(passages.get(n)) is int for n in numbers)
        return None if known else f"{', '.join(numbers)} in the stage of its passages"

    def finished(
        self, stage: str, result: Mapping[str, Any], folder: Path, names: Iterable[str]
    ) -> Manifest:
        """The record after one more stage.

        Args:
            stage: its name.
            result: what later readers need to know of it.
            folder: of the index.
            names: the files that it leaves behind.
        """
        sizes = {name: (folder / name).stat().st_size for name in names}
        return dataclasses.replace(
            self, stages={**self.stages, stage: result}, files={**self.files, **sizes}
        )

    def without(self, stage: str) -> Manifest:
        """The record before a stage, whose results are gone."""
        stages = {name: result for name, result in self.stages.items() if name != stage}
        return dataclasses.replace(self, stages=stages)

    def write(self, folder: Path) -> None:
        """Write it so that there is either the old one or the whole new one."""
        aside = folder / f".{NAME}-{os.getpid()}"
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        aside.write_text(text, encoding="utf-8")
        aside.replace(folder / NAME)


def read_manifest(folder: Path) -> Manifest:
    """Read what a folder says of itself, finished or not.

    Raises:
        FileNotFoundError: it is no index folder.
        ValueError: the manifest is broken, or of another schema.
    """
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no index: it has no {NAME}; build one with "
            f"`agentr1 index CORPUS --kind bm25 --out {folder}`"
        )
    again = f"remove {folder} and build the index again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        schema = record["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is broken ({error!r}): {again}") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}, this version reads {SCHEMA}: {again}")
    if record.keys() != _SHAPE.keys() or record["kind"] not in KINDS:
        raise ValueError(
            f"{path} is broken: expected the keys {sorted(_SHAPE)} and a kind among {KINDS}, got "
            f"{sorted(record)} and {record.get('kind')!r}: {again}"
        )
    if wrong := [name for name, kind in _SHAPE.items() if not isinstance(record[name], kind)]:
        raise ValueError(
            f"{path} is broken: {wrong[0]!r} is {record[wrong[0]]!r}, expected "
            f"{_SHAPE[wrong[0]].__name__}: {again}"
        )
    manifest = Manifest(**record)
    if lacking := manifest.lacking():
        raise ValueError(f"{path} is broken: it lacks {lacking}: {again}")
    return manifest


def check_manifest(folder: Path, corpus: Path | None = None) -> Manifest:
    """Read the manifest of an index that is to be searched.

    Args:
        folder: of the index.
        corpus: refuse an index that was built from any other file.

    Raises:
        FileNotFoundError, ValueError: see `read_manifest`; or it is half built, a file is missing
            or has another size, or the corpus is another.
    """
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise ValueError(
            f"{folder} is half built (finished: {', '.join(manifest.stages) or 'nothing'}): run "
            "the command that built it again, it goes on where it stopped"
        )
    check_files(folder, manifest)
    if corpus is not None:
        check_corpus(folder, manifest, corpus_record(corpus))
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Refuse a folder, finished or not, whose finished files are not as they were left.

    Raises:
        ValueError: a file is missing or has another size.
    """
    for name, size in manifest.files.items():
        path = folder / name
        found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
        if found != f"has {size} bytes":
            raise ValueError(
                f"{path} {found}, its manifest says {size}: it was changed, cut or not copied "
                f"whole; copy the index again, or remove {folder} and build it again"
            )


def check_corpus(folder: Path, manifest: Manifest, record: Mapping[str, Any]) -> None:
    """Refuse an index of another corpus, finished or not.

    Raises:
        ValueError: naming both.
    """
    if manifest.corpus["sha256"] != record["sha256"]:
        whole = manifest.complete
        raise ValueError(
            f"{folder} is {'an' if whole else 'a half built'} index of another corpus: of "
            f"{_named(manifest.corpus)}, not of {_named(record)}; use the corpus it was built "
            f"from, or {'build an index elsewhere' if whole else removal(folder)}"
        )


def removal(folder: Path) -> str:
    """The way out of a half built index of something else."""
    return f"remove {folder}: no finished index is lost"


def corpus_record(corpus: Path) -> dict[str, Any]:
    """Name, bytes and sha256 of a corpus file, as `sha256sum` prints it."""
    with corpus.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": corpus.name, "bytes": corpus.stat().st_size, "sha256": digest}


def installed_versions() -> dict[str, str]:
    """Of the libraries an index may depend on, those that are there."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _named(record: Mapping[str, Any]) -> str:
    return f"{record['name']} ({record['bytes']} bytes, sha256 {record['sha256'][:12]}...)"
