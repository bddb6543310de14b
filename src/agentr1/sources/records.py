"""Files to records, one at a time, whatever the file's size: JSONL, a JSON array, CSV, parquet.

Layer 1. Only the record being parsed is in memory, also of an array that is one line of 500 MB.
Every record comes with its place, file and line number, for whoever finds something wrong in it.
Knows no data set.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
MAX_RECORD = 64 << 20
"""Bytes; what is longer is not one record but a file of another format."""
_CHUNK = 1 << 20
_Stream = io.BufferedReader | gzip.GzipFile


def read_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the place and the fields of every record.

    Raises:
        ValueError: the file is not what its ending says, is not UTF-8 or is cut short; or a record
            is no object.
        OSError: the file cannot be opened.
    """
    if not path.name.endswith(ENDINGS):
        raise ValueError(f"{path}: expected a file ending in {', '.join(ENDINGS)}")
    if path.suffix == ".parquet":
        yield from _table(path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    place = str(path)
    try:
        with opener(path, "rb") as stream:
            found = _objects(path, stream)
            while (entry := next(found, None)) is not None:
                place, record = entry
                if not isinstance(record, dict):
                    raise ValueError(f"{place}: expected a JSON object, got {_short(repr(record))}")
                yield place, record
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path} cannot be unpacked after {place}: {error}; it is cut short or no gzip file, "
            "fetch it again"
        ) from error


def _objects(path: Path, stream: _Stream) -> Iterator[tuple[str, Any]]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        return _rows(path, stream)
    start = stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if name.endswith(".json") and start.startswith(b"["):
        return _array(path, stream)
    return _lines(path, stream)


def _lines(path: Path, stream: _Stream) -> Iterator[tuple[str, Any]]:
    for place, line in _texts(path, stream):
        if line.strip():
            yield place, _parsed(line, place)


def _texts(path: Path, stream: _Stream) -> Iterator[tuple[str, str]]:
    """Places and decoded lines."""
    number = 0
    while line := stream.readline(MAX_RECORD + 1):
        number += 1
        place = f"{path}, line {number}"
        if len(line) > MAX_RECORD:
            raise ValueError(
                f"{place}: a line of more than {MAX_RECORD >> 20} MB, expected one record a line; "
                "if the file is one JSON array, let its name end in .json"
            )
        try:
            yield place, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{place}: byte {error.start} is 0x{line[error.start]:02x}, expected UTF-8; "
                "convert the file, say with iconv -t utf-8"
            ) from error


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a ValueError
        raise ValueError(
            f"{place}: expected one JSON object a line, got {_short(line.strip())} ({error})"
        ) from error


def _rows(path: Path, stream: _Stream) -> Iterator[tuple[str, Any]]:
    lines = (line for _, line in _texts(path, stream))
    rows = csv.DictReader(lines, strict=True)
    try:
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{place}: expected the {len(rows.fieldnames or ())} columns of "
                    f"line 1, {rows.fieldnames}, got another number of them"
                )
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.reader.line_num}: no CSV, {error}") from error


def _array(path: Path, stream: _Stream) -> Iterator[tuple[str, Any]]:
    text = _Text(path, stream)
    text.take("[")
    while text.next_character() != "]":
        if text.records:
            text.take(",")
        yield text.value()
    text.take("]")
    if rest := text.next_character():
        raise ValueError(f"{text.place}: expected nothing after the closing ], got {rest!r}")


class _Text:
    """A JSON array of which a window is in memory.

    Attributes:
        records: values taken so far.
    """

    def __init__(self, path: Path, stream: _Stream) -> None:
        self.records = 0
        self._path = path
        self._stream = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self._decoder = json.JSONDecoder()
        self._window = ""
        self._at = 0
        self._line = 1
        self._counted = 0  # the line breaks of the window up to here are in `_line`

    @property
    def place(self) -> str:
        self._line += self._window.count("\n", self._counted, self._at)
        self._counted = self._at
        return f"{self._path}, line {self._line}, record {self.records + 1}"

    def next_character(self) -> str:
        """The next one that is no white space, not taken; "" at the end of the file."""
        while True:
            while self._at < len(self._window) and self._window[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._grow():
                return ""

    def take(self, character: str) -> None:
        found = self.next_character()
        if found != character:
            raise ValueError(
                f"{self.place}: expected {character!r}, got {found!r}"
                + ("" if found else ", the end of the file: it is cut short, fetch it again")
            )
        self._at += 1

    def value(self) -> tuple[str, Any]:
        """The next value and its place."""
        self.next_character()
        place = self.place
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._window, self._at)
            except (ValueError, RecursionError) as error:
                if len(self._window) - self._at <= MAX_RECORD and self._cut(error) and self._grow():
                    continue
                raise ValueError(
                    f"{place}: expected a JSON object, got "
                    f"{_short(self._window[self._at : self._at + 100])} ({error})"
                ) from error
            self.records += 1
            return place, value

    def _cut(self, error: Exception) -> bool:
        """Whether a parser may have failed only because the window ends."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        # An open string is named by where it begins; all else by where the parser stood, which is
        # a literal or an escape away from the end.
        return "Unterminated" in error.msg or error.pos >= len(self._window) - 16

    def _grow(self) -> bool:
        """Read on, forgetting what was taken; False at the end of the file."""
        _ = self.place  # counts the lines that are forgotten
        try:
            more = self._stream.read(_CHUNK)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.place}: not UTF-8 within the next {_CHUNK >> 20} MB ({error.reason}, byte "
                f"0x{error.object[error.start]:02x}); convert the file, say with iconv -t utf-8"
            ) from error
        self._window = self._window[self._at :] + more
        self._at = self._counted = 0
        return bool(more)


def _table(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Imported here: it costs a gigabyte of address space, and only this needs it.
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
