"""Files to records: every format gives what was written, and every broken file says where."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentr1.sources import records
from agentr1.sources.records import read_records
from question_sets import write_array, write_csv, write_lines

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(TEXT, VALUE, max_size=4), max_size=6)


def read(path: Path) -> list[dict]:
    return [dict(record) for _, record in read_records(path)]


@given(OBJECTS, st.integers(1, 40), st.sampled_from([None, 1, 4]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_an_array_comes_back_whatever_window_it_is_read_through(
    tmp_path_factory, found: list[dict], window: int, indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(found, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_CHUNK", window)
        assert read(path) == found


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_lines_come_back_with_their_numbers(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / name, [{"a": "ß"}, "", {"a": "\u2028"}])
    found = [(place, record["a"]) for place, record in read_records(path)]
    assert found == [(f"{path}, line 1", "ß"), (f"{path}, line 3", "\u2028")]


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": '{"a": 1}\n', "a.json": '[{"a": 1}]', "a.csv": "a\n1\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert [list(record) for record in read(tmp_path / name)] == [["a"]]


def test_an_array_says_line_and_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n\n{"a":\n 2}\n]')
    places = [place for place, _ in read_records(tmp_path / "a.json")]
    assert places == [
        f"{tmp_path}/a.json, line 2, record 1",
        f"{tmp_path}/a.json, line 4, record 2",
    ]


def test_a_sheet_keeps_quoted_breaks_and_counts_its_lines(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "a.csv",
        [{"Question": 'a "b",\nc', "Answer": "x"}, {"Question": "d", "Answer": ""}],
    )
    found = list(read_records(path))
    assert [r["Question"] for _, r in found] == ['a "b",\nc', "d"]
    assert [place for place, _ in found] == [f"{path}, line 3", f"{path}, line 4"]


def test_a_table_comes_back(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"a": 1, "b": ["x"]}, {"a": 2, "b": []}]).to_parquet(tmp_path / "a.parquet")
    found = list(read_records(tmp_path / "a.parquet"))
    assert found == [
        (f"{tmp_path}/a.parquet, row 1", {"a": 1, "b": ["x"]}),
        (f"{tmp_path}/a.parquet, row 2", {"a": 2, "b": []}),
    ]


BROKEN = {
    "no JSON": ("a.jsonl", b'{"a": 1}\n{"a": \n', ["line 2", "one JSON object a line", "{"]),
    "too deep": ("a.jsonl", b"{}\n" + b"[" * 100_000, ["line 2", "one JSON object a line"]),
    "too many digits": ("a.jsonl", b'{}\n{"a": ' + b"1" * 5000 + b"}", ["line 2", "one JSON"]),
    "too deep in an array": ("a.json", b"[{}, " + b"[" * 100_000, ["record 2", "JSON object"]),
    "too many digits in an array": ("a.json", b"[" + b"1" * 5000 + b"]", ["record 1", "JSON"]),
    "no object": ("a.jsonl", b"{}\n[1]\n", ["line 2", "JSON object", "[1]"]),
    "no UTF-8": ("a.jsonl", b'{}\n{"a": "\xe9"}\n', ["line 2", "byte 7 is 0xe9", "iconv"]),
    "wrong ending": ("a.txt", b"{}\n", [".jsonl", ".csv"]),
    "no gzip": ("a.jsonl.gz", b"{}\n", ["unpacked", "fetch it again"]),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b"{}\n" * 9)[:-9], ["unpacked", "cut short"]),
    "cut array": ("a.json", b'[{"a": 1}, {"a": ', ["line 1, record 2", "JSON object"]),
    "open array": ("a.json", b'[{"a": 1}', ["end of the file", "cut short"]),
    "no comma": ("a.json", b'[{"a": 1} {"a": 1}]', ["record 2", "','", "'{'"]),
    "no object in an array": ("a.json", b'[{"a": 1}, 7]', ["record 2", "JSON object", "7"]),
    "broken in an array": ("a.json", b'[{"a": 1},\n{"a" 2}, ' + b" " * 99, ["line 2, record 2"]),
    "no UTF-8 in an array": ("a.json", b'[{"a": 1}, {"a": "\xe9"}]', ["UTF-8", "0xe9", "iconv"]),
    "more after an array": ("a.json", b"[{}] x", ["nothing after", "'x'"]),
    "too few columns": ("a.csv", b"a,b\n1,2\n3\n", ["line 3", "2 columns", "['a', 'b']"]),
    "too many columns": ("a.csv", b"a,b\n1,2,3\n", ["line 2", "another number"]),
    "no UTF-8 in a sheet": ("a.csv", b"a,b\n1,\xe9\n", ["line 2", "0xe9"]),
    "an open quote": ("a.csv", b'a,b\n1,"2\n', ["line 2", "no CSV"]),
}


@pytest.mark.parametrize(("name", "content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_says_where_and_what_was_expected(
    tmp_path: Path, name: str, content: bytes, said: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read(tmp_path / name)
    assert str(raised.value).startswith(str(tmp_path / name))
    for words in said:
        assert words in str(raised.value)


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text("[" + "1, " * 1000)
    with pytest.raises(
        ValueError, match=r"line 1: a line of more than .* let its name end in .json"
    ):
        read(path)
    with pytest.raises(ValueError, match="record 1: expected a JSON object"):
        read(write_array(tmp_path / "b.json", [{"a": "x" * (3 << 20)}]))
