"""Reading a corpus: what is read, and that every mistake in it is named with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from agentr1.retrieval.base import Passage, load_passages

GOOD = b'{"id": 1, "title": "x", "text": "y"}\n'


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_plain_and_gzipped_files_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    record = {"id": 7, "title": "Keldora", "text": "Ā town.", "extra": 1}
    content = "\ufeff".encode() + (json.dumps(record, ensure_ascii=False) + "\n\n").encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert load_passages(path) == [Passage("7", "Keldora", "Ā town.")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "expected one JSON object a line, got b'not json"),
        (b"[" * 100_000, "expected one JSON object a line"),
        (b'{"id": 1, "n": ' + b"1" * 5000 + b"}", "expected one JSON object a line"),
        (b"[1]", "expected an object with id, title and text"),
        (b'{"id": 1, "title": "x"}', r"'text' must be a text, got None .*\['id', 'title'\]"),
        (b'{"id": 1, "title": 5, "text": ""}', "'title' must be a text, got 5"),
        (b'{"id": true, "title": "", "text": ""}', "'id' must be a text, got True"),
        (b'{"id": " ", "title": "", "text": ""}', "'id' is empty"),
        (b'{"id": "a", "title": "", "text": "\\ud800"}', "'text' holds half of a surrogate pair"),
        (b'{"id": "a", "title": "", "text": "\xe9"}', r"not UTF-8 at byte 34: b'\\xe9"),
        (b'{"id": "1", "title": "", "text": ""}', "id '1' is also on line 1"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"corpus.jsonl, line 3: .*{reason}"):
        load_passages(path)


def test_other_files_and_broken_compression_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ending in \.jsonl"):
        load_passages(tmp_path / "corpus.csv")
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD)[:-9])
    with pytest.raises(ValueError, match="cannot be read after line"):
        load_passages(path)
    path.write_bytes(GOOD)
    with pytest.raises(ValueError, match="compressed with gzip"):
        load_passages(path)
