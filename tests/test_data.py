"""Rows from files: what is read, what is refused and in which words, what Arrow gives back."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentr1.data import find_corpus, find_split, load_rows, to_dataset
from agentr1.prepare import prepare
from agentr1.retrieval.build import IndexSettings, build_index

MULTIHOP = Path(__file__).resolve().parents[2] / "shared" / "data" / "multihop"
QUICKSTART = Path(__file__).resolve().parents[1] / "data" / "quickstart"


def row(number=0, **columns):
    return {"id": f"q{number}", "question": "Who?", "answers": ["Ada"]} | columns


def write(path: Path, *records) -> Path:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# Reading


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_rows_keep_their_columns_and_get_a_prompt(tmp_path, name):
    path = write(tmp_path / name, row(hops=2, extra={"a": [1]}))
    assert load_rows(path) == [
        row(hops=2, extra={"a": [1]}, prompt=[{"role": "user", "content": "Who?"}])
    ]


@pytest.mark.parametrize(
    ("columns", "answers"),
    [
        ({"answers": ["a", "b"]}, ["a", "b"]),
        ({"answer": "a"}, ["a"]),
        ({"answer": 18}, ["18"]),
        ({"answer": "a", "answers": None}, ["a"]),
        ({"answer": "a", "answers": ["b"]}, ["b"]),
        ({"answers": [1.5, "x"]}, ["1.5", "x"]),
    ],
)
def test_answers_become_a_list_of_text(tmp_path, columns, answers):
    record = {"id": "q", "question": "Who?"} | columns
    assert load_rows(write(tmp_path / "train.jsonl", record))[0]["answers"] == answers


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = write(tmp_path / "train.jsonl", "\ufeff" + json.dumps(row(0)), "", row(1), "   ")
    assert [r["id"] for r in load_rows(path)] == ["q0", "q1"]


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path):
    path = write(tmp_path / "train.jsonl", row(0), row(1), "not json")
    assert [r["id"] for r in load_rows(path, limit=2)] == ["q0", "q1"]
    with pytest.raises(ValueError, match="line 3"):
        load_rows(path, limit=3)


# Refusals: file, line, value, expectation


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{", r"expected one JSON object a line, got \{ "),
        ("[1]", r"expected a JSON object, got \[1\]"),
        ({"question": "Who?", "answers": ["a"]}, "'id' must be a text.*got None"),
        (row(id=7), "'id' must be a text.*got 7"),
        (row(id=" "), "'id' must be a text"),
        (row(question=None), "'question' must be a text"),
        (row(question=["Who?"]), "'question' must be a text"),
        ({"id": "q", "question": "Who?"}, r"expected 'answers'.*got None among.*'id', 'question'"),
        (row(answers=[]), r"expected 'answers'.*got \[\]"),
        (row(answers="Ada"), "expected 'answers'.*got 'Ada'"),
        (row(answers=[None]), r"expected 'answers'.*got \[None\]"),
        (row(answers=[True]), r"expected 'answers'.*got \[True\]"),
        (row(answers={"x" * 200: 1}), r"\.\.\. among the columns"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, record, says):
    path = write(tmp_path / "train.jsonl", row(100), record)
    with pytest.raises(ValueError, match=says) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_an_id_twice_is_refused_with_both_lines(tmp_path):
    path = write(tmp_path / "train.jsonl", row(0), row(1), row(0))
    with pytest.raises(ValueError, match="line 3: id 'q0' is also on line 1"):
        load_rows(path)


def test_files_that_cannot_be_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        load_rows(write(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"\.jsonl or \.jsonl\.gz files, got 'train\.csv'"):
        load_rows(tmp_path / "train.csv")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_rows(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="at least 1, or unset, got 0"):
        load_rows(tmp_path / "train.jsonl", limit=0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"plain text\n",
        lambda data: data[: len(data) // 2],
        lambda data: data[:20] + b"\x00\xff" + data[22:],
    ],
)
def test_a_damaged_archive_is_named(tmp_path, damage):
    path = write(tmp_path / "train.jsonl.gz", *(row(i, text=str(i * i)) for i in range(200)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz cannot be unpacked after "):
        load_rows(path)


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (json.dumps(row(question="Où?"), ensure_ascii=False).encode("latin-1"), "0xf9, expected U"),
        (b'{"id": "q", "question": ' + b"[" * 100_000, "recursion"),
        (b'{"id": "q", "question": "Who?", "answers": [' + b"1" * 5000 + b"]}", "digits"),
        (json.dumps(row(question="a \ud800 b")).encode(), "'question' cannot be written as UTF-8"),
        (json.dumps(row(answers=["\udc00"])).encode(), "'answers' cannot be written as UTF-8"),
        (json.dumps(row(note={"\ud83d": 1})).encode(), "'note' cannot be written as UTF-8"),
    ],
)
@pytest.mark.parametrize("questions", [True, False])
def test_a_line_that_cannot_be_decoded_or_encoded_is_named(tmp_path, name, bad, says, questions):
    path = tmp_path / name
    good = [json.dumps(row(i, question="Où?"), ensure_ascii=False).encode() for i in range(500)]
    content = b"\n".join([*good[:3], b"", bad, *good[3:]])
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    with pytest.raises(ValueError, match=says) as caught:
        load_rows(path, questions=questions)
    assert str(caught.value).startswith(f"{path}, line 5: ")


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row(question="Who is \U0001f600?")))
    assert r"\ud83d\ude00" in path.read_text()
    assert load_rows(path)[0]["question"] == "Who is \U0001f600?"


# Finding


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_find_split_and_corpus(tmp_path, ending):
    folder = tmp_path / "hotpot"
    folder.mkdir()
    train = write(folder / f"train{ending}", row())
    assert find_split(folder, "train") == train
    above = write(tmp_path / f"corpus{ending}", "{}")
    assert find_corpus(folder) == above
    own = write(folder / f"corpus{ending}", "{}")
    assert find_corpus(folder) == own
    assert find_corpus(folder, above) == above
    assert find_corpus(folder, tmp_path) == above


def test_an_index_of_passages_that_were_replaced_since_is_refused(tmp_path):
    def prepared(title):
        write(tmp_path / "own" / "dev.jsonl", row(source="nq"))
        write(tmp_path / "own" / "corpus.jsonl", {"id": "p", "title": title, "text": "A city."})
        prepare("nq", tmp_path / "out", source=str(tmp_path / "own"), force=True)

    (tmp_path / "own").mkdir()
    prepared("Ulm")
    folder = tmp_path / "out"
    build_index(folder / "corpus.jsonl", folder / "index", IndexSettings())
    assert find_corpus(folder, folder / "index") == folder / "index"
    prepared("Uhm")  # as many bytes: it is the content that counts
    with pytest.raises(ValueError, match="an index of another corpus"):
        find_corpus(folder, folder / "index")
    (folder / "index").rename(tmp_path / "index")  # elsewhere it is nobody's but the user's
    assert find_corpus(folder, tmp_path / "index") == tmp_path / "index"


def test_an_index_folder_and_a_servers_address_are_places_of_a_corpus(tmp_path):
    write(tmp_path / "corpus.jsonl", "{}")
    index = tmp_path / "index"
    index.mkdir()
    (index / "manifest.json").write_text("{}")
    assert find_corpus(tmp_path, index) == index
    for address in ("http://host:8000", "https://host", "opensearch+http://host:9200/wiki"):
        assert find_corpus(tmp_path, address) == address


def test_dev_stands_in_for_test_only_where_the_caller_says_so(tmp_path):
    dev = write(tmp_path / "dev.jsonl", row())
    assert find_split(tmp_path, "test", dev_for_test=True) == dev
    with pytest.raises(FileNotFoundError, match=r"no split 'test'.*it has dev\.jsonl$"):
        find_split(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="no split 'train'"):
        find_split(tmp_path, "train", dev_for_test=True)


def test_a_missing_file_is_reported_with_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl or \.jsonl\.gz files"):
        find_split(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        find_split(tmp_path / "absent", "train")
    with pytest.raises(FileNotFoundError) as caught:
        find_corpus(tmp_path / "hotpot")
    assert f"{tmp_path / 'hotpot'} or {tmp_path}" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"expected corpus\.jsonl.*absent"):
        find_corpus(tmp_path, tmp_path / "absent")


def test_two_files_of_one_name_are_ambiguous(tmp_path):
    write(tmp_path / "train.jsonl", row())
    write(tmp_path / "train.jsonl.gz", row())
    with pytest.raises(ValueError, match=r"both train\.jsonl and train\.jsonl\.gz"):
        find_split(tmp_path, "train")


# Arrow

# Few digits: the JSON columns of `datasets` round the 17th significant one.
NUMBERS = st.integers(-(2**60), 2**60) | st.integers(-(10**6), 10**6).map(lambda n: n / 8)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text()
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = st.dictionaries(
    st.sampled_from(["type", "hops", "level", "solution", "supporting_titles", "decomposition"]),
    JSON,
)


@settings(max_examples=40)
@given(st.lists(COLUMNS, min_size=1, max_size=4))
def test_a_dataset_gives_back_what_it_got(extras):
    rows = [row(n, **extra) for n, extra in enumerate(extras)]
    names = {name for r in rows for name in r}
    expected = [{name: r.get(name) for name in names} for r in rows]
    assert list(to_dataset(rows)) == expected


def test_texts_that_look_like_json_stay_texts():
    rows = [row(0, solution="18", mixed="18"), row(1, solution="{}", mixed=18)]
    got = to_dataset(rows)
    assert got["solution"][:] == ["18", "{}"]
    assert got["mixed"][:] == ["18", 18]


def test_nested_values_do_not_grow_their_neighbours_keys():
    rows = [row(0, arguments={"city": "Rome"}), row(1, arguments={"year": 1})]
    assert to_dataset(rows)["arguments"][:] == [{"city": "Rome"}, {"year": 1}]


# Real files


@pytest.mark.parametrize("name", ["hotpotqa", "2wiki", "musique", "bamboogle"])
def test_real_multihop_questions(name):
    if not MULTIHOP.is_dir():
        pytest.skip(f"no real questions at {MULTIHOP}")
    rows = load_rows(find_split(MULTIHOP / name, "dev"))
    dataset = to_dataset(rows)
    assert len(dataset) == len(rows) >= 125
    assert dataset[0]["answers"] == rows[0]["answers"]
    assert dataset[-1]["supporting_titles"] == rows[-1]["supporting_titles"]
    assert find_corpus(MULTIHOP / name) == MULTIHOP / "corpus.jsonl.gz"


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_quickstart_questions(split):
    if not (QUICKSTART / f"{split}.jsonl").is_file():
        pytest.skip("the quickstart's data has not been made")
    rows = load_rows(find_split(QUICKSTART, split))
    assert to_dataset(rows)[0] == rows[0]
