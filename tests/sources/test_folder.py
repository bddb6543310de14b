"""A folder changes in one piece or not at all, and is never overwritten unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentr1.sources.folder import SCHEMA, Staging, check_files, is_being_written, read_card
from agentr1.sources.lines import LineFile, stamp_of


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stage(staging: Staging, *files: str) -> None:
    for name in files:
        staging.path(name).write_text(f"new {name}")


def test_files_appear_together_and_nothing_else_stays(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with Staging(out) as staging:
        stage(staging, "card.json", "train.jsonl")
        assert names(out) == {".partial"}
        staging.publish(replace=False)
    assert names(out) == {"card.json", "train.jsonl"}


def test_a_failure_leaves_the_old_files_and_no_new_folder(tmp_path: Path) -> None:
    for out in (tmp_path / "old", tmp_path / "new"):
        if out.name == "old":
            out.mkdir()
            (out / "train.jsonl").write_text("old")
        with pytest.raises(KeyboardInterrupt), Staging(out) as staging:
            stage(staging, "train.jsonl")
            raise KeyboardInterrupt
    assert (tmp_path / "old" / "train.jsonl").read_text() == "old"
    assert names(tmp_path / "old") == {"train.jsonl"}
    assert not (tmp_path / "new").exists()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "dev.jsonl").write_text("half")
    with Staging(tmp_path) as staging:
        stage(staging, "train.jsonl")
        staging.publish(replace=False)
    assert names(tmp_path) == {"train.jsonl"}


def test_a_file_that_cannot_be_renamed_loses_nothing_and_is_renamed_later(tmp_path: Path) -> None:
    for name in ("card.json", "corpus.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("old")
    (tmp_path / "dev.jsonl").mkdir()
    new = {"card.json", "corpus.jsonl", "dev.jsonl"}
    with pytest.raises(OSError, match="same command again"), Staging(tmp_path) as staging:
        stage(staging, *new)
        staging.publish(replace=True)
    for _ in range(2):
        assert is_being_written(tmp_path)
        assert (tmp_path / "card.json").read_text() == "old"
        assert (tmp_path / "corpus.jsonl").read_text() == "new corpus.jsonl"
        assert (tmp_path / ".partial" / "dev.jsonl").read_text() == "new dev.jsonl"
        with pytest.raises(OSError, match="same command again"), Staging(tmp_path):
            pass
    (tmp_path / "dev.jsonl").rmdir()
    with Staging(tmp_path):
        assert {name: (tmp_path / name).read_text() for name in new} == {n: f"new {n}" for n in new}
    assert names(tmp_path) == new


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    with Staging(tmp_path) as first:
        stage(first, "train.jsonl")
        with pytest.raises(RuntimeError, match="another process is writing"), Staging(tmp_path):
            pass
        first.publish(replace=False)
    assert names(tmp_path) == {"train.jsonl"}


def test_replacing_takes_old_data_away_and_nothing_of_the_user(tmp_path: Path) -> None:
    for name in ("train.jsonl.gz", "corpus.jsonl", "card.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    with Staging(tmp_path) as staging:
        stage(staging, "card.json", "dev.jsonl")
        staging.publish(replace=True)
    assert names(tmp_path) == {"card.json", "dev.jsonl", "notes.txt"}


def test_a_folder_without_a_card_is_somebody_elses(tmp_path: Path) -> None:
    assert read_card(tmp_path / "nowhere") is None
    (tmp_path / "notes.txt").touch()
    assert read_card(tmp_path) is None
    (tmp_path / "dev.jsonl.gz").touch()
    with pytest.raises(FileExistsError, match=r"holds dev.jsonl.gz and no card.json.* --force"):
        read_card(tmp_path)


CARD = {"schema": SCHEMA, "name": "nq", "splits": {}, "corpus": None, "commands": []}


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", json.dumps({"schema": SCHEMA + 1}), json.dumps({"schema": SCHEMA})),
        *(json.dumps(CARD | {name: None}) for name in ("name", "splits", "commands")),
        *(json.dumps(CARD | more) for more in ({"corpus": 3}, {"commands": [4]})),
        json.dumps(CARD | {"splits": {"train": {"file": "train.jsonl"}}}),
    ],
)
def test_a_strange_card_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ValueError, match=r"card.json .* --force"):
        read_card(tmp_path)


def test_changed_files_are_noticed(tmp_path: Path) -> None:
    with LineFile(tmp_path / "train.jsonl") as file:
        file.write({"a": "é"})
        stamp = file.stamp()
    card = {"splits": {"train": stamp}, "corpus": None}
    assert stamp == stamp_of(tmp_path / "train.jsonl")
    check_files(tmp_path, card)
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"train.jsonl has changed"):
        check_files(tmp_path, card)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="or is missing"):
        check_files(tmp_path, card)
