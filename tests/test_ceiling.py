"""The ceiling: which questions the corpus can answer, or why that is not known."""

from __future__ import annotations

import json
from pathlib import Path

from agentr1.ceiling import ceiling_of
from agentr1.retrieval.build import IndexSettings, build_index

ROWS = [
    {"id": "a", "answers": ["the Eiffel Tower", "La Tour"]},
    {"id": "b", "answers": ["Berlin"]},
    {"id": "c", "answers": ["yes"]},
    {"id": "d", "answers": ["Iffel"]},
]


def corpus(folder: Path) -> Path:
    passages = [
        {"id": "1", "title": "Paris", "text": "Home of the Eiffel\nTower."},
        {"id": "2", "title": "Rome", "text": "A city."},
    ]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in passages), encoding="utf-8")
    return path


def test_answers_count_where_their_words_stand_in_a_passage(tmp_path: Path) -> None:
    found = ceiling_of(corpus(tmp_path), ROWS)
    assert found.covered == {"a": True, "b": False, "c": True, "d": False}
    assert found.share == 0.5
    assert "yes or no (1 questions)" in found.note


def test_an_index_folder_is_read_like_the_file_it_was_built_from(tmp_path: Path) -> None:
    place = corpus(tmp_path)
    build_index(place, tmp_path / "index", IndexSettings())
    assert ceiling_of(tmp_path / "index", ROWS) == ceiling_of(place, ROWS)


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    place = corpus(tmp_path)
    for where, rows, why in (
        (None, ROWS, "no search tool"),
        ("http://localhost:8000", ROWS, "behind http://localhost:8000"),
        (place, [{"id": "a"}], "without answers"),
    ):
        found = ceiling_of(where, rows)
        assert found.covered is None
        assert found.share is None
        assert why in found.note


def test_what_a_search_cuts_off_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    passage = {"id": "1", "title": "Paris", "text": "far behind the cut: Berlin"}
    path.write_text(json.dumps(passage) + "\n", encoding="utf-8")
    assert ceiling_of(path, ROWS[1:2]).share == 1.0
    assert ceiling_of(path, ROWS[1:2], 10).share == 0.0
