"""An evaluation on the disk: what is done is done, what was cut is not, nothing is mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentr1.eval_folder import (
    EvalFolder,
    digest_of_rows,
    fingerprint,
    fingerprint_of_corpus,
    newest_evaluation,
)
from agentr1.retrieval.build import IndexSettings, build_index

IDS = [f"q{i}" for i in range(7)]
SETTINGS = {"policy": {"model": "m", "limits": {"max_turns": 4, "max_turn_tokens": None}}}


def line(row_id: str) -> str:
    return json.dumps({"id": row_id, "values": {}, "text": "ü" * 20}, ensure_ascii=False) + "\n"


def written(folder: Path, text: str) -> EvalFolder:
    found = EvalFolder(folder)
    found.accept(SETTINGS)
    found.transcripts("policy").write_text(text, encoding="utf-8")
    return found


def test_every_place_to_be_killed_at_leaves_whole_batches(tmp_path: Path) -> None:
    lines = [line(i) for i in IDS]
    whole = "".join(lines).encode()
    ends = [len("".join(lines[:n]).encode()) for n in range(8)]
    for cut in range(0, len(whole) + 1, 7):
        found = written(tmp_path, "")
        path = found.transcripts("policy")
        path.write_bytes(whole[:cut])
        complete = sum(end <= cut for end in ends) - 1
        expected = 7 if complete == 7 else complete // 3 * 3
        assert found.done("policy", IDS, 3) == expected
        assert path.read_bytes() == whole[: ends[expected]]


def test_the_last_batch_may_be_short_and_nothing_is_done_without_a_file(tmp_path: Path) -> None:
    found = written(tmp_path, "".join(map(line, IDS)))
    assert found.done("policy", IDS, 3) == 7
    assert found.done("naive_rag", IDS, 3) == 0


def test_two_processes_do_not_write_to_one_evaluation(tmp_path: Path) -> None:
    found = written(tmp_path, "")
    with found.alone(), pytest.raises(RuntimeError, match="another process is writing"):
        EvalFolder(tmp_path).alone()
    with EvalFolder(tmp_path / "new").alone():
        EvalFolder(tmp_path / "new").accept(SETTINGS)  # the lock alone makes it no foreign folder


def test_what_is_only_checked_is_not_written(tmp_path: Path) -> None:
    found = EvalFolder(tmp_path / "new")
    assert found.check(SETTINGS) == SETTINGS
    assert not found.path.exists()
    found.accept(SETTINGS)
    assert found.check({"naive_rag": {}}) == SETTINGS | {"naive_rag": {}}
    assert found.settings() == SETTINGS


def test_noting_how_good_an_index_is_makes_it_no_other(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "title": "T", "text": "one two"}\n')
    build_index(corpus, tmp_path / "index", IndexSettings("bm25"))
    before = fingerprint_of_corpus(tmp_path / "index")
    (tmp_path / "index" / "quality.json").write_text("{}")
    assert fingerprint_of_corpus(tmp_path / "index") == before
    with (tmp_path / "index" / "passages.jsonl").open("a") as file:
        file.write("x")
    assert fingerprint_of_corpus(tmp_path / "index") != before
    assert fingerprint_of_corpus(corpus) == fingerprint(corpus)


@pytest.mark.parametrize("names", [["q0", "q2", "q1"], [*IDS, "q7"], ["q0", "q0"]])
def test_transcripts_of_other_questions_are_not_added_to(tmp_path: Path, names: list[str]) -> None:
    found = written(tmp_path, "".join(map(line, names)))
    before = found.transcripts("policy").read_bytes()
    with pytest.raises(ValueError, match=r"after.jsonl, line \d: expected question .*, got 'q"):
        found.done("policy", IDS, 3)
    assert found.transcripts("policy").read_bytes() == before


def test_other_settings_are_refused_by_name_and_other_systems_are_welcome(tmp_path: Path) -> None:
    found = written(tmp_path, "")
    found.accept(SETTINGS)
    found.accept({"naive_rag": {"model": "other"}})
    assert found.settings() == SETTINGS | {"naive_rag": {"model": "other"}}
    changed = {"policy": {"model": "m", "limits": {"max_turns": 5, "max_turn_tokens": None}}}
    with pytest.raises(ValueError, match="policy.*: limits.max_turns was 4 and is 5; give another"):
        found.accept(changed)
    assert found.settings()["policy"] == SETTINGS["policy"]


def test_baselines_share_their_untrained_model(tmp_path: Path) -> None:
    found = written(tmp_path, "")
    found.accept({"closed_book": {"untrained": "a"}, "cold_start": {"untrained": None}})
    found.accept({"naive_rag": {"untrained": "a"}})
    with pytest.raises(ValueError, match="different untrained models: .*'few_shot': 'b'"):
        found.accept({"few_shot": {"untrained": "b"}})
    assert "few_shot" not in found.settings()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: \\['thesis.txt'\\]; give another --out"):
        EvalFolder(tmp_path).accept(SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_contents_are_told_apart_by_size_beginning_and_end(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    seen = set()
    for content in (b"a" * 3_000_000, b"a" * 2_999_999 + b"b", b"b" + b"a" * 2_999_999, b"a"):
        weights.write_bytes(content)
        seen |= {fingerprint(folder), fingerprint(weights)}
    assert len(seen) == 8
    assert fingerprint(folder) == fingerprint(str(folder))
    moved = tmp_path / "moved"
    before = fingerprint(folder)
    folder.rename(moved)
    assert fingerprint(moved) == before
    assert fingerprint("Qwen/Qwen2.5-3B-Instruct") == "Qwen/Qwen2.5-3B-Instruct"


def test_questions_are_told_apart_by_content_not_by_order() -> None:
    a, b = {"id": "1", "answers": ["x"]}, {"id": "2", "answers": ["y"]}
    assert digest_of_rows([a, b]) == digest_of_rows([b, a])
    assert digest_of_rows([a, b]) != digest_of_rows([a, b | {"answers": ["z"]}])


def test_the_newest_evaluation_goes_on(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--resume found no evaluation .* --out"):
        newest_evaluation("x/grpo", tmp_path)
    for stamp in ("20260101-000000", "20260102-000000"):
        EvalFolder(tmp_path / "eval" / "x" / "grpo" / stamp).accept(SETTINGS)
    (tmp_path / "eval/x/grpo/latest").symlink_to("20260101-000000")
    assert newest_evaluation("x/grpo", tmp_path).name == "20260102-000000"
