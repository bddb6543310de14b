"""The set of passages seen, their ids, and the corpus that is written from them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.retrieval.base import load_passages
from agentr1.sources.base import Context
from agentr1.sources.lines import stamp_of
from agentr1.sources.passages import LONG, Digests, PassageFile, digest, passage_id
from question_sets import lines_of, passage, write_lines


@given(st.lists(st.integers(0, 20) | st.integers(0, 2**64 - 1)))
def test_the_set_is_a_set(numbers: list[int]) -> None:
    # 0 and 1 are one member: 0 marks a free place.
    seen, expected = Digests(), set()
    for number in numbers:
        assert ((number or 1) in expected) == (number in seen)
        assert seen.add(number) == ((number or 1) not in expected)
        expected.add(number or 1)
    assert len(seen) == len(expected)


def test_the_set_grows_and_keeps_its_members() -> None:
    seen = Digests()
    numbers = [digest(str(i)) for i in range(20_000)]
    assert all(map(seen.add, numbers))
    assert not any(map(seen.add, numbers))
    assert all(number in seen for number in numbers)
    assert not any(digest(f"x{i}") in seen for i in range(20_000))
    assert len(seen._places) * seen._places.itemsize <= 24 * len(numbers) * 2


def test_neighbours_that_wrap_around_the_end_are_found() -> None:
    seen = Digests()
    crowded = [(i << 32) | 1023 for i in range(1, 600)]  # all belong at the last place of 1024
    assert all(map(seen.add, crowded))
    assert all(number in seen for number in crowded)


def test_an_id_depends_on_title_and_text_and_on_nothing_else() -> None:
    assert passage_id("T", "x") == hashlib.blake2b(b"T\0x", digest_size=8).hexdigest()
    assert len({passage_id("a", "b"), passage_id("ab", ""), passage_id("b", "a")}) == 3


def test_a_passage_is_written_once_and_read_by_the_retriever(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    with PassageFile(path) as file:
        first = file.add(Context("T", "x"))
        assert file.add(Context("T", "x")) == first
        assert file.add(Context("U", "x")) != first
        assert file.add(Context("V", "")) is None
        assert first in file
        assert "nothing" not in file
        stamp = file.stamp()
    assert (len(file), file.repeated, file.empty, file.characters) == (2, 1, 1, 4)
    assert [(p.id, p.title, p.text) for p in load_passages(path)] == [
        (first, "T", "x"),
        (passage_id("U", "x"), "U", "x"),
    ]
    assert stamp == stamp_of(path)


def test_a_passage_of_a_megabyte_is_kept_whole_and_counted(tmp_path: Path) -> None:
    with PassageFile(tmp_path / "corpus.jsonl") as file:
        file.add(Context("T", "x" * (1 << 20)))
        file.add(Context("T", "x" * (LONG - 1)))
    assert (file.long, file.longest) == (1, 1 << 20)
    assert len(lines_of(file.path)[0]["text"]) == 1 << 20


def test_a_corpus_keeps_its_ids_and_may_come_twice(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "source.jsonl", [passage(1), passage(2), passage(1)])
    with PassageFile(tmp_path / "corpus.jsonl") as file:
        file.add_file(source)
        file.add_file(source)
    assert [p["id"] for p in lines_of(file.path)] == ["p1", "p2"]
    assert file.repeated == 4


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([], "holds no passages"),
        ([passage(1), passage(2), passage(1, text="Other.")], "line 3: id 'p1'"),
        ([passage(1, id="")], "line 1: 'id'"),
        ([passage(1, id=7)], "line 1: 'id'"),
        ([passage(1, text=["x"])], "line 1: 'text'"),
    ],
)
def test_a_wrong_corpus_says_where(tmp_path: Path, records: list, said: str) -> None:
    source = write_lines(tmp_path / "source.jsonl", records)
    with PassageFile(tmp_path / "corpus.jsonl") as file, pytest.raises(ValueError) as raised:
        file.add_file(source)
    assert str(raised.value).startswith(str(source))
    assert said in str(raised.value)


def test_a_corpus_may_repeat_what_official_records_brought(tmp_path: Path) -> None:
    own = {"id": passage_id("T", "x"), "title": "T", "text": "x"}
    write_lines(tmp_path / "own.jsonl", [own, passage(1)])
    write_lines(tmp_path / "other.jsonl", [own | {"text": "y"}])
    with PassageFile(tmp_path / "corpus.jsonl") as file:
        file.add(Context("T", "x"))
        file.add_file(tmp_path / "own.jsonl")
        assert (len(file), file.repeated) == (2, 1)
        with pytest.raises(ValueError, match="an earlier passage with another title"):
            file.add_file(tmp_path / "other.jsonl")
