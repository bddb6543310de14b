"""JSON lines being written, with the checksum of the file as it grows.

Layer 1. Used for rows and for passages alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHUNK = 1 << 20


class LineFile:
    """A file of JSON lines, one `write` each; a context manager that closes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb", buffering=CHUNK)
        self._sha256 = hashlib.sha256()
        self._lines = 0

    def __len__(self) -> int:
        return self._lines

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._sha256.update(line)
        self._lines += 1

    def stamp(self) -> dict[str, Any]:
        """Name, size and checksum of what was written so far, for the card."""
        self._file.flush()
        return {
            "file": self.path.name,
            "bytes": self._file.tell(),
            "sha256": self._sha256.hexdigest(),
        }


def stamp_of(path: Path) -> dict[str, Any]:
    """Name, size and checksum of a file that is there."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256}
