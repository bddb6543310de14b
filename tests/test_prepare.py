"""`agentr1 data`: what a folder holds afterwards, what is refused, and that memory stays small."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

import question_sets as made
from agentr1.cli import main
from agentr1.data import find_corpus, find_split, load_rows
from agentr1.prepare import prepare
from agentr1.retrieval.base import load_passages
from agentr1.sources.folder import Staging, check_files
from agentr1.sources.lines import stamp_of
from agentr1.sources.table import DATA_SETS, MIX_ROWS, NAMES
from question_sets import lines_of, write_array, write_csv, write_lines, write_own

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
REAL_TOO = ("2wiki", "musique", "bamboogle")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def official(folder: Path, train: int = 12, dev: int = 4) -> Path:
    """Release files of all data sets, each in a folder of its name."""
    both = {"train": range(train), "dev": range(train, train + dev)}
    for split, numbers in both.items():
        hotpot = {"train": "hotpot_train_v1.1.json", "dev": "hotpot_dev_distractor_v1.json"}
        write_array(folder / "hotpotqa" / hotpot[split], map(made.hotpotqa, numbers))
        write_array(folder / "2wiki" / f"{split}.json", map(made.twowiki, numbers))
        write_lines(folder / f"musique/musique_ans_v1.0_{split}.jsonl", map(made.musique, numbers))
        write_lines(folder / "nq" / f"NQ-open.{split}.jsonl", map(made.nq, numbers))
    write_lines(folder / "gsm8k" / "train.jsonl", map(made.gsm8k, range(train)))
    write_lines(folder / "gsm8k" / "test.jsonl", map(made.gsm8k, range(train, train + dev)))
    write_csv(folder / "bamboogle" / "Bamboogle Prerelease.csv", map(made.bamboogle, range(dev)))
    return folder


# What is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hotpotqa", "2wiki", "musique", "bamboogle", "nq", "gsm8k"])
def test_official_files_become_a_folder_that_recipes_read(tmp_path: Path, name: str) -> None:
    source, out = official(tmp_path / "source"), tmp_path / "out"
    card = prepare(name, out, source=str(source), command=["data", name])
    for split, record in card["splits"].items():
        rows = load_rows(find_split(out, split))
        assert len(rows) == record["questions"] == record["sources"][name]["questions"]
        assert {row["source"] for row in rows} == {name}
        assert all(row["answers"] for row in rows)
        assert record.items() >= stamp_of(out / f"{split}.jsonl").items()
    with_passages = name in ("hotpotqa", "2wiki", "musique")
    assert (card["corpus"] is not None) is with_passages
    assert names(out) == {
        *(f"{split}.jsonl" for split in card["splits"]),
        *(["corpus.jsonl"] if with_passages else []),
        *("card.json", "README.md"),
    }
    if with_passages:
        passages = {passage.id: passage for passage in load_passages(find_corpus(out))}
        assert len(passages) == card["corpus"]["passages"]
        for row in load_rows(out / "train.jsonl"):
            assert [passages[i].title for i in row["gold_ids"]] == row["supporting_titles"]


def test_a_row_has_the_columns_of_its_question(tmp_path: Path) -> None:
    source = official(tmp_path / "source")
    prepare("hotpotqa", tmp_path / "h", source=str(source))
    row = lines_of(tmp_path / "h" / "train.jsonl")[7]
    assert row | {"gold_ids": len(row["gold_ids"])} == {
        "id": "hp7",
        "question": "Which river runs through town 7?",
        "answers": ["River 7"],
        "type": "bridge",
        "hops": 2,
        "level": "hard",
        "supporting_titles": ["Town 7", "River 7"],
        "gold_ids": 2,
        "source": "hotpotqa",
    }
    prepare("nq", tmp_path / "n", source=str(source))
    assert lines_of(tmp_path / "n" / "dev.jsonl")[1] == {
        "id": "nq_dev_1",
        "question": "who sang song 13",
        "answers": ["Singer 13", "Band 13"],
        "hops": 1,
        "source": "nq",
    }


def test_passages_of_many_questions_are_written_once(tmp_path: Path) -> None:
    card = prepare("hotpotqa", tmp_path / "out", source=str(official(tmp_path / "source")))
    titles = [p["title"] for p in lines_of(tmp_path / "out" / "corpus.jsonl")]
    assert titles.count("Rivers") == 1
    assert len(titles) == 2 * 16 + 1
    assert card["corpus"]["repeated"] == 15


def test_what_has_no_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    records = [made.musique(i) for i in range(5)]
    records += [made.musique(0, answerable=False), made.musique(6, answer="")]
    write_lines(tmp_path / "musique_full_v1.0_dev.jsonl", records)
    card = prepare("musique", tmp_path / "out", source=str(tmp_path))
    counts = card["splits"]["dev"]["sources"]["musique"]
    assert (counts["questions"], counts["read"]) == (5, 7)
    assert counts["left_out"] == {"unanswerable": 1, "no_answer": 1}
    assert counts["hops"] == {"2": 5}


def test_rows_of_ours_keep_ids_columns_and_corpus(tmp_path: Path) -> None:
    folder = write_own(tmp_path / "in" / "hotpotqa", None, train=[made.own(3, ctx="full")])
    write_lines(tmp_path / "in" / "corpus.jsonl.gz", [made.passage(3, src="x"), made.passage(4)])
    shutil.move(folder / "train.jsonl", folder / "dev.jsonl")
    prepare("hotpotqa", tmp_path / "out", source=str(tmp_path / "in"))
    assert lines_of(tmp_path / "out" / "dev.jsonl") == [made.own(3, ctx="full", source="hotpotqa")]
    assert lines_of(tmp_path / "out" / "corpus.jsonl") == [made.passage(3), made.passage(4)]


@pytest.mark.parametrize("n", [None, 3])
def test_rows_of_ours_count_as_what_they_are_read_for_unless_they_say_a_set(
    tmp_path: Path, n: int | None
) -> None:
    sources = ["mine", None, "2wiki", "", "nq"]
    rows = [made.own(i, source=source) for i, source in enumerate(sources)]
    write_own(tmp_path / "in", train=[*rows, made.own(9)], dev=[made.own(20, answers=[])])
    (tmp_path / "in" / "dev.jsonl").unlink()
    card = prepare("nq", tmp_path / "out", source=str(tmp_path / "in"), n=n)
    counts = card["splits"]["train"]["sources"]
    assert {name: count["read"] for name, count in counts.items()} == {"nq": 5, "2wiki": 1}
    written = lines_of(tmp_path / "out" / "train.jsonl")
    by_id = {f"q{i}": source or "nq" for i, source in enumerate([*sources, *[None] * 5])}
    assert all(row["source"] == by_id[row["id"]] for row in written)
    assert sum(count["questions"] for count in counts.values()) == len(written) == (n or 6)
    for count in counts.values():
        assert count["questions"] + sum(count["left_out"].values()) == count["read"]
    assert card["licences"].keys() == {"nq", "2wiki"}


def test_a_split_is_added_to_rows_of_another_source(tmp_path: Path) -> None:
    train = [made.own(i, source="mine") for i in range(4)]
    source = str(write_own(tmp_path / "in", train=train, dev=[made.own(2, source="mine")]))
    for split in ("train", "dev"):
        card = prepare("nq", tmp_path / "out", splits=[split], source=source)
    counts = card["splits"]["train"]["sources"]["nq"]
    assert (counts["questions"], counts["read"], counts["left_out"]) == (3, 4, {"overlap": 1})


def test_aliases_beside_the_official_file_are_answers_too(tmp_path: Path) -> None:
    records = [made.twowiki(i, answer=f"A{i}", answer_id=f"Q{i}") for i in range(3)]
    write_array(tmp_path / "in" / "dev.json", records)
    aliases = [
        {"Q_id": "Q1", "aliases": ["One", "A1"], "demonyms": ["Onish"]},
        {"Q_id": "Q2", "aliases": [], "demonyms": []},
    ]
    path = write_lines(tmp_path / "in" / "id_aliases.json", aliases)
    card = prepare("2wiki", tmp_path / "out", source=str(tmp_path / "in"))
    rows = lines_of(tmp_path / "out" / "dev.jsonl")
    assert [row["answers"] for row in rows] == [["A0"], ["A1", "One", "Onish"], ["A2"]]
    assert stamp_of(path) in card["splits"]["dev"]["origins"]["2wiki"]["files"]
    write_lines(path, [{"Q_id": "Q1", "aliases": "One"}])
    with pytest.raises(ValueError, match=r"id_aliases.json, line 1: 'aliases' must be a list"):
        prepare("2wiki", tmp_path / "other", source=str(tmp_path / "in"))


def test_what_was_written_can_be_read_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    prepare("musique", first, source=str(official(tmp_path / "source")))
    prepare("musique", second, source=str(first))
    for name in ("train.jsonl", "dev.jsonl", "corpus.jsonl"):
        assert lines_of(second / name) == lines_of(first / name)


def test_the_readme_says_what_the_card_says(tmp_path: Path) -> None:
    out = tmp_path / "out"
    card = prepare(
        "2wiki", out, source=str(official(tmp_path / "s")), n=3, command=["data", "2wiki"]
    )
    text = (out / "README.md").read_text()
    assert json.loads((out / "card.json").read_text()) == card
    assert card["licences"] == {"2wiki": DATA_SETS["2wiki"].licence}
    for words in (
        "| train | 2wiki | 3 | 12 | 9 not in the sample |",
        "2wiki, type: bridge_comparison 3",
        DATA_SETS["2wiki"].licence,
        "train.json (sha256 ",
        f"`{card['corpus']['sha256']}`",
        "    agentr1 data 2wiki\n",
    ):
        assert words in text


def test_gold_ids_are_written_only_where_they_are_all(tmp_path: Path) -> None:
    records = [made.hotpotqa(i) for i in range(3)]
    records[1]["context"].pop()  # as where a retriever chose the passages
    records[2]["context"][1][1] = [""]
    write_array(tmp_path / "in" / "hotpot_dev_fullwiki_v1.json", records)
    prepare("hotpotqa", tmp_path / "out", source=str(tmp_path / "in"))
    rows = lines_of(tmp_path / "out" / "dev.jsonl")
    assert [len(row.get("gold_ids", ())) for row in rows] == [2, 0, 0]
    assert [len(row["supporting_titles"]) for row in rows] == [2, 2, 2]
    assert "gold_ids" not in rows[1].keys() | rows[2].keys()


# Drawing ---------------------------------------------------------------------------------------


def test_a_sample_does_not_shrink_the_corpus(tmp_path: Path) -> None:
    source = str(official(tmp_path / "source"))
    whole = prepare("hotpotqa", tmp_path / "whole", source=source)
    drawn = prepare("hotpotqa", tmp_path / "drawn", source=source, n=3)
    assert drawn["corpus"]["sha256"] == whole["corpus"]["sha256"]
    assert {s: r["questions"] for s, r in drawn["splits"].items()} == {"dev": 3, "train": 3}


def test_a_seed_names_its_rows(tmp_path: Path) -> None:
    source = official(tmp_path / "source", train=60)
    turned = tmp_path / "turned" / "hotpot_train_v1.1.json"
    write_array(turned, [made.hotpotqa(i) for i in reversed(range(60))])

    def rows(source: Path, seed: int) -> list[dict[str, Any]]:
        out = tmp_path / f"{source.name}{seed}"
        prepare("hotpotqa", out, splits=["train"], source=str(source), n=20, seed=seed)
        return lines_of(out / "train.jsonl")

    assert rows(source, 1) == rows(turned.parent, 1)
    assert rows(source, 2) != rows(source, 1)


def test_more_than_there_is_is_an_error_with_the_number(tmp_path: Path) -> None:
    source = official(tmp_path / "source")
    with pytest.raises(ValueError, match=r"13 .* only 12 are there: 12 questions .*--n 12"):
        prepare("nq", tmp_path / "out", splits=["train"], source=str(source), n=13)
    assert not (tmp_path / "out").exists()


def test_the_paper_mix_is_one_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    card = prepare("agent-r1", out, source=str(official(tmp_path / "source", train=40)), n=25)
    train = lines_of(out / "train.jsonl")
    assert {s: c["questions"] for s, c in card["splits"]["train"]["sources"].items()} == {
        "hotpotqa": 25,
        "2wiki": 25,
    }
    assert 5 < [row["source"] for row in train[:25]].count("2wiki") < 20
    assert [row["source"] for row in lines_of(out / "dev.jsonl")] == (
        ["hotpotqa", "2wiki", "musique"] * 4  # the first rows of dev are of every data set
    )
    titles = {p["title"] for p in lines_of(out / "corpus.jsonl")}
    assert {"River 39", "Film 39", "A41"} <= titles
    assert "A39" not in titles  # MuSiQue's train split is not read


def test_the_mix_takes_the_papers_number_and_refuses_one_file_for_two_sets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"25,600 questions are wanted and only 12 are there"):
        prepare("agent-r1", tmp_path / "out", source=str(official(tmp_path / "source")))
    write_own(tmp_path / "flat", train=[made.own(1)], dev=[made.own(2)])
    with pytest.raises(ValueError, match="one file for several data sets"):
        prepare("agent-r1", tmp_path / "out", source=str(tmp_path / "flat"), n=1)
    with pytest.raises(ValueError, match="--n 5 counts train rows"):
        prepare("agent-r1", tmp_path / "out", splits=["dev"], source=str(tmp_path / "flat"), n=5)
    shutil.rmtree(tmp_path / "source" / "musique")
    write_lines(tmp_path / "source" / "musique" / "train.jsonl", [made.own(1)])
    with pytest.raises(FileNotFoundError, match="no dev split of musique, it has train"):
        prepare("agent-r1", tmp_path / "out", source=str(tmp_path / "source"), n=1)


# Overlap ---------------------------------------------------------------------------------------

SAME = ["WHICH is the number 2", "which is number 2?!"]
"""Question 2 in other letters."""


def test_train_questions_that_dev_asks_are_left_out(tmp_path: Path) -> None:
    train = [made.own(i) for i in range(5)] + [made.own(9, question=SAME[0])]
    write_own(tmp_path / "in", train=train, dev=[made.own(2), made.own(7, question=SAME[1])])
    card = prepare("hotpotqa", tmp_path / "out", source=str(tmp_path / "in"))
    assert [row["id"] for row in lines_of(tmp_path / "out" / "train.jsonl")] == [
        *("q0", "q1", "q3", "q4")
    ]
    assert card["splits"]["train"]["sources"]["hotpotqa"]["left_out"] == {"overlap": 2}
    assert card["splits"]["dev"]["questions"] == 2


@pytest.mark.parametrize("pieces", [["train test"], ["test", "train"], ["train", "test"]])
def test_train_questions_that_test_asks_are_left_out(tmp_path: Path, pieces: list[str]) -> None:
    train = [made.own(1), made.own(9, question=SAME[0])]
    write_own(tmp_path / "in", train=train, test=[made.own(2)])
    for splits in pieces:
        prepare("nq", tmp_path / "out", splits=splits.split(), source=str(tmp_path / "in"))
    assert [row["id"] for row in lines_of(tmp_path / "out" / "train.jsonl")] == ["q1"]


def test_train_alone_says_that_overlap_was_not_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_own(tmp_path / "in", train=[made.own(i) for i in range(4)], dev=[made.own(2)])
    out = tmp_path / "out"
    command = ["data", "hotpotqa", "--source", str(source), "--out", str(out), "--split"]
    for split, checked in (("train", False), ("dev", True)):
        assert main([*command, split]) == 0
        assert ("the folder has neither" in capsys.readouterr().out) is not checked
        assert ("the folder has neither" in (out / "README.md").read_text()) is not checked
        card = json.loads((out / "card.json").read_text())
        assert card["splits"]["train"]["overlap_checked"] is checked


@pytest.mark.parametrize("order", [("dev", "train"), ("train", "dev")])
def test_splits_added_one_by_one_are_the_same_as_at_once(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    train = [made.own(i) for i in range(6)]
    source = str(write_own(tmp_path / "in", train=train, dev=[made.own(2), made.own(9)]))
    whole = prepare("hotpotqa", tmp_path / "whole", source=source)
    for split in order:
        card = prepare("hotpotqa", tmp_path / "out", splits=[split], source=source)
    for name in ("train.jsonl", "dev.jsonl", "corpus.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert card["splits"] == whole["splits"]
    assert len(card["commands"]) == 2


def test_official_splits_added_one_by_one_share_their_corpus(tmp_path: Path) -> None:
    source = str(official(tmp_path / "source"))
    whole = prepare("hotpotqa", tmp_path / "whole", source=source)
    for split in ("train", "dev"):
        card = prepare("hotpotqa", tmp_path / "out", splits=[split], source=source)
    assert card["corpus"]["passages"] == whole["corpus"]["passages"]
    ids = {p["id"] for p in lines_of(tmp_path / "out" / "corpus.jsonl")}
    assert ids == {p["id"] for p in lines_of(tmp_path / "whole" / "corpus.jsonl")}


@pytest.mark.parametrize(("early", "late"), [("dev", "train"), ("train", "dev"), ("dev", "dev")])
def test_what_another_command_wrote_meanwhile_is_added_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: str, late: str
) -> None:
    train = [made.own(i) for i in range(6)]
    source = str(write_own(tmp_path / "in", train=train, dev=[made.own(2), made.own(9)]))
    wanted = prepare("hotpotqa", tmp_path / "at once", splits=[early, late], source=source)
    out = tmp_path / "out"

    class Late(Staging):
        """The real one, after another command has come and gone."""

        def __enter__(self) -> Self:
            monkeypatch.undo()
            prepare("hotpotqa", out, splits=[early], source=source)
            return super().__enter__()

    monkeypatch.setattr("agentr1.prepare.Staging", Late)
    card = prepare("hotpotqa", out, splits=[late], source=source)
    assert json.loads((out / "card.json").read_text()) == card
    assert (card["splits"], card["corpus"]["sha256"]) == (
        wanted["splits"],
        wanted["corpus"]["sha256"],
    )
    assert len(card["commands"]) == len({early, late})
    check_files(out, card)


def test_a_drawn_train_split_that_shrinks_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [made.own(i) for i in range(6)]
    source = write_own(tmp_path / "in", train=train, dev=[made.own(2), made.own(9)])
    said = "1 of the 6 train questions drawn were taken out again"
    command = ["data", "hotpotqa", "--source", str(source), "--out", str(tmp_path / "out")]
    for split, n, shrunk in (("train", 6, False), ("dev", 2, True)):
        assert main([*command, "--split", split, "--n", str(n)]) == 0
        assert (said in capsys.readouterr().out) is shrunk
        assert (said in (tmp_path / "out" / "README.md").read_text()) is shrunk
    assert main([*command[:-1], str(tmp_path / "at_once"), "--n", "2"]) == 0
    assert "taken out again" not in capsys.readouterr().out


def left_by_an_interrupt(monkeypatch: pytest.MonkeyPatch, at: int, work: Callable[[], Any]) -> bool:
    """Do something whose rename number `at` is interrupted; whether it came to that."""
    rename, renamed = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) > at:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replace)
        try:
            work()
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("force", [False, True])
def test_wherever_it_is_cut_off_the_same_command_again_repairs_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    train = [made.own(i) for i in range(6)]
    first = write_own(tmp_path / "1", train=train, dev=[made.own(2), made.own(9)])
    other = write_own(tmp_path / "2", None, test=[made.own(7, gold_ids=[])])

    def begin(out: Path) -> None:
        prepare("hotpotqa", out, splits=() if force else ["train"], source=str(first))

    def command(out: Path) -> dict[str, Any]:
        source = str(other if force else first)
        return prepare("hotpotqa", out, source=source, force=force, command=["again"])

    begin(tmp_path / "undisturbed")
    command(tmp_path / "undisturbed")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}
    for at in range(9):
        out = tmp_path / f"cut at {at}"
        begin(out)
        cut = left_by_an_interrupt(monkeypatch, at, lambda out=out: command(out))
        card = command(out)
        check_files(out, card)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == wanted
        if not cut:
            break
    assert at == (4 if force else 6)  # one for the list, one a file


# What is refused -------------------------------------------------------------------------------


def test_the_same_again_changes_nothing(tmp_path: Path) -> None:
    source, out = str(official(tmp_path / "source")), tmp_path / "out"
    first = prepare("nq", out, source=source, n=3)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare("nq", out, source=source, n=3) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gsm8k", {}, "holds nq"),
        ("nq", {"n": 3}, "holds another"),
        ("nq", {"n": 2, "seed": 1}, "holds another"),
    ],
)
def test_other_data_is_not_replaced_unasked(
    tmp_path: Path, name: str, options: dict[str, Any], said: str
) -> None:
    source, out = str(official(tmp_path / "source")), tmp_path / "out"
    prepare("nq", out, source=source, n=2)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match=f"{said}.* --force"):
        prepare(name, out, source=source, **options)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    card = prepare(name, out, source=source, force=True, **options)
    assert json.loads((out / "card.json").read_text()) == card
    assert {f"{s}.jsonl" for s in card["splits"]} | {"card.json", "README.md"} == names(out)


def test_other_content_under_the_same_names_is_other_data(tmp_path: Path) -> None:
    source, out = official(tmp_path / "source"), tmp_path / "out"
    prepare("nq", out, source=str(source))
    write_lines(source / "nq" / "NQ-open.dev.jsonl", [made.nq(99)])
    with pytest.raises(FileExistsError, match="holds another dev of nq"):
        prepare("nq", out, source=str(source))


def test_a_changed_file_is_noticed_before_a_split_is_added(tmp_path: Path) -> None:
    source, out = str(official(tmp_path / "source")), tmp_path / "out"
    prepare("nq", out, splits=["dev"], source=source)
    (out / "dev.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"dev.jsonl has changed"):
        prepare("nq", out, splits=["train"], source=source)


def broken(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    """A folder of rows after a change."""

    def make(folder: Path) -> Path:
        write_own(folder, train=[made.own(i) for i in range(4)], dev=[made.own(5)])
        change(folder)
        return folder

    return make


MISTAKES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "malformed": (
        lambda f: write_lines(f / "train.jsonl", [made.own(0), '{"id": ']),
        ["train.jsonl, line 2", "one JSON object"],
    ),
    "missing field": (
        lambda f: write_lines(f / "train.jsonl", [made.own(0), {"id": "x", "answers": ["a"]}]),
        ["train.jsonl, line 2", "'question'"],
    ),
    "duplicate id": (
        lambda f: write_lines(f / "train.jsonl", [made.own(0), made.own(1), made.own(0)]),
        ["train.jsonl, line 3", "'q0'", "unique"],
    ),
    "no UTF-8": (
        lambda f: (f / "train.jsonl").write_bytes(b'{"id": "\xff"}\n'),
        ["train.jsonl, line 1", "UTF-8", "iconv"],
    ),
    "empty corpus": (
        lambda f: (f / "corpus.jsonl").write_text("\n"),
        ["corpus.jsonl", "holds no passages"],
    ),
    "malformed corpus": (
        lambda f: write_lines(f / "corpus.jsonl", [made.passage(0), "x"]),
        ["corpus.jsonl, line 2"],
    ),
    "duplicate passage": (
        lambda f: write_lines(f / "corpus.jsonl", [made.passage(0), made.passage(0, text="y")]),
        ["corpus.jsonl, line 2", "'p0'"],
    ),
    "dangling gold": (
        lambda f: write_lines(f / "train.jsonl", [made.own(0), made.own(77)]),
        ["train.jsonl, line 2", "'gold_ids'", "'p77'"],
    ),
    "no answers at all": (
        lambda f: write_lines(f / "train.jsonl", [made.own(0, answers=[])]),
        ["train.jsonl", "gives no row", "1 without an answer"],
    ),
    "no questions": (
        lambda f: (f / "train.jsonl").write_text(""),
        ["train.jsonl", "gives no row", "0 questions"],
    ),
}


@pytest.mark.parametrize(("change", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], Any],
    said: list[str],
) -> None:
    source = broken(change)(tmp_path / "in")
    out = tmp_path / "out"
    assert main(["data", "hotpotqa", "--source", str(source), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    for words in ("error: ", *said):
        assert words in error
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--split", "validation"], "invalid choice: 'validation'"),
        (["--split", "test"], "no split test in"),
        (["--n", "0"], "--n must be at least 1"),
        (["--n", "99"], "only 1 are there"),
        (["--source", "nowhere"], "does not exist"),
        (["--out", "in"], "is where"),
    ],
)
def test_a_wrong_option_says_what_was_expected(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_own(tmp_path / "in", train=[made.own(0)], dev=[made.own(1)])
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    try:
        code = main(["data", "hotpotqa", "--source", "in", "--out", "out", *options])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before
    assert not (tmp_path / "out").exists()


def test_a_long_passage_is_kept_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_own(tmp_path / "in", None, train=[made.own(0)])
    write_lines(tmp_path / "in" / "corpus.jsonl", [made.passage(0, text="x " * (1 << 19) + "y")])
    out = tmp_path / "out"
    assert main(["data", "hotpotqa", "--source", str(tmp_path / "in"), "--out", str(out)]) == 0
    assert "1 passages have 20,000 characters or more, the longest 1,048,577" in (
        capsys.readouterr().out
    )
    assert load_passages(out / "corpus.jsonl")[0].text.endswith("y")


# Memory ----------------------------------------------------------------------------------------


def test_nothing_heavy_is_imported() -> None:
    heavy = ("torch", "transformers", "datasets", "numpy", "pyarrow")
    script = f"import sys, agentr1.prepare; print(*(set({heavy!r}) & sys.modules.keys()))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["musique", "hotpotqa"])
def test_a_passage_costs_some_bytes_whatever_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    from benchmarks.data_memory import LIMIT_KIB, make, measure

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    used = {}
    for passages in (20_000, 220_000):
        folder = tmp_path / f"{passages}"
        folder.mkdir()
        make(folder, shape, passages // 50, passages, characters=400)
        used[passages] = measure(folder, shape)
        shutil.rmtree(folder)
    small, large = used.values()
    # 24 bytes a passage at most, twice while the set grows; the text alone would be 400.
    assert (large.resident_mib - small.resident_mib) * (1 << 20) < 60 * 200_000
    assert large.address_mib < LIMIT_KIB / 1024 / 4
    assert large.heavy == ()


# Real data -------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data beside the repository")
@pytest.mark.parametrize(
    "name", ["hotpotqa", *(pytest.param(n, marks=pytest.mark.slow) for n in REAL_TOO)]
)
def test_real_rows_come_through_whole(tmp_path: Path, name: str) -> None:
    source = SHARED / "multihop"
    card = prepare(name, tmp_path / "out", source=str(source))
    assert card["corpus"]["passages"] == 67_264
    for split in card["splits"]:
        given = load_rows(find_split(source / name, split))
        rows = load_rows(find_split(tmp_path / "out", split))
        assert len(rows) == len(given)
        assert all(
            row.items() >= (old | {"answers": row["answers"]}).items()
            for row, old in zip(rows, given, strict=True)
        )


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data beside the repository")
def test_real_word_problems_and_the_mix(tmp_path: Path) -> None:
    card = prepare("gsm8k", tmp_path / "g", source=str(SHARED / "gsm8k"))
    assert {s: r["questions"] for s, r in card["splits"].items()} == {"test": 1319, "train": 7473}
    assert all(
        r["answers"][0].lstrip("-").replace(".", "").isdigit()
        for r in lines_of(tmp_path / "g" / "test.jsonl")
    )
    card = prepare("agent-r1", tmp_path / "m", source=str(SHARED / "multihop"), n=500)
    assert card["splits"]["train"]["questions"] == 1000
    assert card["splits"]["dev"]["questions"] == 828 + 336 + 300


# The page --------------------------------------------------------------------------------------


def test_the_page_names_every_set_as_the_table_does() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for name, dataset in DATA_SETS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"| {', '.join(dataset.hub_splits)} |" in line
        assert f"`{dataset.repository}`" in line
        assert dataset.licence.partition(";")[0].removesuffix(" with the data") in line
    for name in re.findall(r"agentr1 data ([\w-]+)", page):
        assert name in NAMES
    assert f"{MIX_ROWS:,} questions of HotpotQA" in page
