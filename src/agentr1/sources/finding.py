"""Which files under a path hold which split of a data set, and where its passages are.

Layer 1. Looks at names only. A folder may hold the official files, a download of the Hub's
repository, or rows of this project: `train`, `dev` and `test`, with a `corpus` in it or one above.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from agentr1.sources.records import ENDINGS
from agentr1.sources.table import SPLITS, DataSet

_ROWS = (".jsonl", ".jsonl.gz")
_SPELLINGS = {"train": ("train",), "dev": ("dev", "valid", "validation"), "test": ("test",)}


def find_splits(name: str, dataset: DataSet, source: Path) -> dict[str, list[Path]]:
    """Files of every split that is there, by split.

    Args:
        name: of the data set; a folder of this name under the source is looked into first.
        dataset: its entry in the table.
        source: folder, or one file that says in its name which split it is.

    Raises:
        FileNotFoundError: nothing of this data set is there.
        ValueError: it cannot be told which file is meant.
    """
    if source.is_file():
        return {_split_of(source): [source]}
    if not source.is_dir():
        raise FileNotFoundError(
            f"--source {source} does not exist; expected 'hub', a folder or a file"
        )
    for folder in (source / name, source):
        found = {s: files for s in SPLITS if (files := _files(folder, dataset, s))}
        if found:
            return found
    official = ", ".join(pattern for patterns in dataset.files.values() for pattern in patterns)
    raise FileNotFoundError(
        f"--source {source} holds no file of {name}: expected {official}, a download of the Hub's "
        f"{dataset.repository}, or rows in train, dev or test{' or '.join(_ROWS)}, there or in "
        f"{source / name}; name the file itself if it is called otherwise"
    )


def find_corpus(questions: Sequence[Path]) -> Path | None:
    """The file of passages that belongs to rows of ours: `corpus.*` beside them or one above."""
    folder = questions[0].absolute().parent
    for place in (folder, folder.parent):
        found = [path for end in _ROWS if (path := place / f"corpus{end}").is_file()]
        if found:
            return _only(found)
    return None


def _files(folder: Path, dataset: DataSet, split: str) -> list[Path]:
    """The files of one split in one folder; several only where the Hub cut them into pieces."""
    official = dataset.files.get(split, ())
    packed = [f"{pattern}.gz" for pattern in official if not pattern.endswith(".csv")]
    for pattern in (*official, *packed):
        if found := sorted(folder.glob(pattern)):
            return [_only(found)]
    if found := [path for end in _ROWS if (path := folder / f"{split}{end}").is_file()]:
        return [_only(found)]
    hub = dataset.hub_splits.get(split)
    for inner in (dataset.config, "data", ".") if hub else ():
        if found := sorted((folder / inner).glob(f"{hub}-*.parquet")):
            return found
    return []


def _only(found: Sequence[Path]) -> Path:
    if len(found) > 1:
        raise ValueError(
            f"{found[0].parent} has {' and '.join(path.name for path in found)}; name the one that "
            "is meant with --source, or remove the other"
        )
    return found[0]


def _split_of(file: Path) -> str:
    if not file.name.endswith(ENDINGS):
        raise ValueError(f"--source {file}: expected a file ending in {', '.join(ENDINGS)}")
    named = set(re.split(r"[^a-z]+", file.name.lower()))
    found = [split for split, words in _SPELLINGS.items() if named.intersection(words)]
    if len(found) != 1:
        raise ValueError(
            f"--source {file}: cannot tell which split this is; let its name say train, dev or "
            "test, or name its folder"
        )
    return found[0]
