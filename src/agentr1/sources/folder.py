"""The folder of a prepared data set: what it may replace, and how it changes in one piece.

Layer 1. Files are written aside, in `.partial`, and renamed when all are complete, `card.json` as
the last. Where that is cut off, `.partial` keeps the files that are left and a list that says so,
and whoever writes the folder next renames them first. Knows names and bytes, no questions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agentr1.locks import locked
from agentr1.sources.lines import stamp_of
from agentr1.sources.table import SPLITS

CARD = "card.json"
README = "README.md"
CORPUS = "corpus.jsonl"
SCHEMA = 1
"""Of the card."""
_KEYS = {"name": str, "splits": dict, "corpus": (dict, type(None)), "commands": list}
_STAMP = {"file": str, "bytes": int, "sha256": str}
_SPLIT = {**_STAMP, "n": dict, "seed": (int, type(None)), "origins": dict, "sources": dict}
_SOURCE = {"read": int, "left_out": dict}
"""What a card must hold to be added to, and of which type."""
_ASIDE = ".partial"
_LOCK = "lock"
_COMPLETE = "complete.json"
"""Beside files that are all complete: the names that the folder holds and shall not any longer."""
_NAMES = (CARD, README, *(f"{s}.jsonl{end}" for s in (*SPLITS, "corpus") for end in ("", ".gz")))


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of a prepared folder, or None where nothing of this kind is.

    Raises:
        FileExistsError: files are there that no card describes.
        ValueError: the card is not one of ours.
    """
    found = [name for name in _NAMES if (folder / name).exists()]
    if not found:
        return None
    if CARD not in found:
        raise FileExistsError(
            f"--out {folder} holds {', '.join(found)} and no {CARD}, so it was made by hand or its "
            "writing was cut off; give another --out, or --force to replace these files"
        )
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        known = card["schema"] == SCHEMA
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CARD} is no card of a data set: {error}; {_ways()}") from error
    if not known:
        raise ValueError(
            f"{folder / CARD} has schema {card['schema']}, expected {SCHEMA}; {_ways()}"
        )
    if not _is_whole(card):
        raise ValueError(f"{folder / CARD} lacks something that every card has; {_ways()}")
    return card


def _is_whole(card: Mapping[str, Any]) -> bool:
    """Whether a card has everything that is read of it, in its place."""
    if not _has(card, _KEYS) or not all(isinstance(words, str) for words in card["commands"]):
        return False
    splits = card["splits"]
    return (
        (card["corpus"] is None or _has(card["corpus"], _STAMP))
        and all(name in SPLITS and _has(split, _SPLIT) for name, split in splits.items())
        and all(_has(s, _SOURCE) for split in splits.values() for s in split["sources"].values())
    )


def _has(record: Any, keys: Mapping[str, Any]) -> bool:
    return isinstance(record, dict) and all(isinstance(record.get(k), t) for k, t in keys.items())


def check_files(folder: Path, card: Mapping[str, Any]) -> None:
    """See that the files are those the card describes.

    Raises:
        ValueError: one is missing or has changed.
    """
    for stamp in filter(None, (*card["splits"].values(), card["corpus"])):
        path = folder / stamp["file"]
        if not path.is_file() or stamp_of(path)["sha256"] != stamp["sha256"]:
            raise ValueError(
                f"{path} has changed since {CARD} was written, or is missing; {_ways()}"
            )


def _ways() -> str:
    return "give another --out, or --force to write it anew"


def is_being_written(folder: Path) -> bool:
    """Whether a process writes the folder, or one that did was cut off."""
    return (folder / _ASIDE).exists()


class Staging:
    """`.partial` in the folder while it is being written; gone afterwards, unless renaming failed.

    Attributes:
        folder: the one being written; made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._aside = folder / _ASIDE

    def __enter__(self) -> Self:
        self._made = not self.folder.exists()
        self._aside.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.path(_LOCK), self.folder)
        try:  # what a process left that was cut off
            if self.path(_COMPLETE).exists():
                self._rename()
            for name in self._written():
                self.path(name).unlink()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.path(_COMPLETE).exists():
            shutil.rmtree(self._aside)
        self._lock.close()
        if self._made and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def path(self, name: str) -> Path:
        """Where to write a file."""
        return self._aside / name

    def publish(self, *, replace: bool) -> None:
        """Put every file written so far under its real name.

        Args:
            replace: remove what the folder held of this kind and was not written now.

        Raises:
            OSError: a file cannot be renamed; nothing is lost, the next `Staging` goes on.
        """
        written = self._written()
        dropped = [name for name in _NAMES if replace and name not in written]
        half = self.path(f"{_COMPLETE}.half")
        half.write_text(json.dumps(dropped), encoding="utf-8")
        half.replace(self.path(_COMPLETE))
        self._rename()

    def _rename(self) -> None:
        """Put what is complete in its place; what was done before a cut is done already."""
        complete = self.path(_COMPLETE)
        try:
            for name in json.loads(complete.read_text(encoding="utf-8")):
                (self.folder / name).unlink(missing_ok=True)
            for name in sorted(self._written(), key=lambda name: (name == CARD, name)):
                self.path(name).replace(self.folder / name)
            complete.unlink()
        except OSError as error:
            raise OSError(
                f"{error}: all files are complete and those not yet in their place are in "
                f"{self._aside}; mend this and give the same command again, which goes on there"
            ) from error

    def _written(self) -> set[str]:
        return {path.name for path in self._aside.iterdir()} - {_LOCK, _COMPLETE}
