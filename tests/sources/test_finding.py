"""Which files are taken: official names, a download of the Hub, our own; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentr1.sources.finding import find_corpus, find_splits
from agentr1.sources.table import DATA_SETS

OFFICIAL = {
    "hotpotqa": {"train": "hotpot_train_v1.1.json", "dev": "hotpot_dev_distractor_v1.json"},
    "2wiki": {"train": "train.json", "dev": "dev.json"},
    "musique": {"train": "musique_ans_v1.0_train.jsonl", "dev": "musique_ans_v1.0_dev.jsonl"},
    "bamboogle": {"test": "Bamboogle Prerelease - Sheet1.csv"},
    "nq": {"train": "NQ-open.train.jsonl", "dev": "NQ-open.dev.jsonl"},
    "gsm8k": {"train": "train.jsonl", "test": "test.jsonl"},
}


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(name: str, source: Path) -> dict[str, list[str]]:
    splits = find_splits(name, DATA_SETS[name], source)
    return {s: [str(file.relative_to(source)) for file in files] for s, files in splits.items()}


@pytest.mark.parametrize("name", DATA_SETS)
@pytest.mark.parametrize("inner", ["", "{}"])
def test_official_files_are_found(tmp_path: Path, name: str, inner: str) -> None:
    folder = tmp_path / inner.format(name)
    touch(*(folder / file for file in OFFICIAL[name].values()), folder / "test_no_answers.json")
    assert {s: [Path(f).name for f in files] for s, files in found(name, tmp_path).items()} == {
        split: [file] for split, file in OFFICIAL[name].items()
    }


def test_packed_files_and_the_preferred_of_two_are_found(tmp_path: Path) -> None:
    touch(
        tmp_path / "hotpot_train_v1.1.json.gz",
        tmp_path / "hotpot_dev_fullwiki_v1.json",
        tmp_path / "hotpot_dev_distractor_v1.json",
    )
    assert found("hotpotqa", tmp_path) == {
        "train": ["hotpot_train_v1.1.json.gz"],
        "dev": ["hotpot_dev_distractor_v1.json"],
    }


def test_pieces_of_a_download_are_taken_in_order(tmp_path: Path) -> None:
    names = [f"distractor/train-0000{i}-of-00002.parquet" for i in range(2)]
    touch(*(tmp_path / name for name in reversed(names)), tmp_path / "fullwiki/test-0.parquet")
    assert found("hotpotqa", tmp_path) == {"train": names}


def test_rows_of_ours_are_found_in_any_split(tmp_path: Path) -> None:
    touch(tmp_path / "bamboogle" / "dev.jsonl.gz", tmp_path / "corpus.jsonl")
    assert found("bamboogle", tmp_path) == {"dev": ["bamboogle/dev.jsonl.gz"]}
    assert find_corpus([tmp_path / "bamboogle" / "dev.jsonl.gz"]) == tmp_path / "corpus.jsonl"


def test_one_file_says_its_split(tmp_path: Path) -> None:
    for name, split in {
        "my_dev.jsonl.gz": "dev",
        "Validation-1.json": "dev",
        "train.csv": "train",
    }.items():
        touch(tmp_path / name)
        assert find_splits("nq", DATA_SETS["nq"], tmp_path / name) == {split: [tmp_path / name]}


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    nq = DATA_SETS["nq"]
    with pytest.raises(FileNotFoundError, match=r"--source .*/nowhere does not exist"):
        find_splits("nq", nq, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file of nq: expected NQ-open.train.jsonl"):
        find_splits("nq", nq, tmp_path)
    touch(tmp_path / "both" / "dev.jsonl", tmp_path / "both" / "dev.jsonl.gz")
    with pytest.raises(ValueError, match=r"dev.jsonl and dev.jsonl.gz; name the one"):
        find_splits("nq", nq, tmp_path / "both")
    touch(
        tmp_path / "some.jsonl",
        tmp_path / "latest.jsonl",
        tmp_path / "train_dev.jsonl",
        tmp_path / "train.txt",
    )
    for name, said in {
        "some.jsonl": "cannot tell which split",
        "latest.jsonl": "cannot tell which split",
        "train_dev.jsonl": "cannot tell which split",
        "train.txt": "expected a file ending",
    }.items():
        with pytest.raises(ValueError, match=said):
            find_splits("nq", nq, tmp_path / name)
