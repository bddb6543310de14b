"""An index folder is built once, finished when interrupted, refused when not what it says.

The interruptions are real ones where it matters: a process killed while it works.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from agentr1.retrieval import build, dense, memory, postings
from agentr1.retrieval.base import Index, Passage
from agentr1.retrieval.bm25 import Bm25Index
from agentr1.retrieval.build import IndexSettings, build_index
from agentr1.retrieval.hybrid import fuse
from agentr1.retrieval.manifest import check_manifest, read_manifest
from agentr1.retrieval.opening import open_index
from processes import environment
from retrieval.corpora import random_passages, random_queries, static_encoder, write_corpus

PASSAGES = random_passages(400)
QUERIES = random_queries(20)
WORDS = IndexSettings()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", PASSAGES)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("faiss")
    pytest.importorskip("model2vec")
    return static_encoder(tmp_path_factory.mktemp("model"))


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_bm25_folder_answers_as_the_passages_in_memory(corpus: Path, tmp_path: Path) -> None:
    build_index(corpus, tmp_path / "index", WORDS)
    index = open_index(tmp_path / "index", corpus)
    assert len(index) == len(PASSAGES)
    assert index.search(QUERIES, 5) == Bm25Index(PASSAGES).search(QUERIES, 5)


def test_a_hybrid_folder_fuses_its_two_parts(corpus: Path, tmp_path: Path, encoder: str) -> None:
    settings = IndexSettings("hybrid", encoder)
    build_index(corpus, tmp_path / "index", settings)
    build_index(corpus, tmp_path / "dense", IndexSettings("dense", encoder))
    hybrid, alone = open_index(tmp_path / "index"), open_index(tmp_path / "dense")
    both = zip(Bm25Index(PASSAGES).rank(QUERIES, 100), alone.rank(QUERIES, 100), strict=True)
    assert hybrid.rank(QUERIES, 4) == [fuse(rankings)[:4] for rankings in both]
    hits: list[list] = hybrid.search(QUERIES, 4)
    assert [[hit.passage for hit in of_query] for of_query in hits] == [
        [PASSAGES[place] for place, _ in of_query] for of_query in hybrid.rank(QUERIES, 4)
    ]


def test_every_kind_is_an_index(corpus: Path, tmp_path: Path, encoder: str) -> None:
    for kind in ("bm25", "dense", "hybrid"):
        build_index(corpus, tmp_path / kind, IndexSettings(kind, encoder))
        index: Index = open_index(tmp_path / kind)
        assert [len(hits) for hits in index.search(QUERIES, 3)] == [3] * len(QUERIES)
        with pytest.raises(ValueError, match="k of at least 1, got 0"):
            index.search(QUERIES, 0)


def test_prefixes_are_kept_with_the_index(corpus: Path, tmp_path: Path, encoder: str) -> None:
    plain, prefixed = IndexSettings("dense", encoder), IndexSettings("dense", encoder, "w1 ", "w2 ")
    indexes = []
    for number, settings in enumerate((plain, prefixed)):
        build_index(corpus, tmp_path / str(number), settings)
        indexes.append(open_index(tmp_path / str(number)))
    assert read_manifest(tmp_path / "1").settings["passage_prefix"] == "w2 "
    assert indexes[1].rank(["w3"], 1) != indexes[0].rank(["w3"], 1)


def test_a_model_in_a_folder_is_found_from_any_other(
    corpus: Path, tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, _, folder = encoder.partition(":")
    with monkeypatch.context() as patch:
        patch.chdir(Path(folder).parent)
        relative = IndexSettings("dense", f"{library}:{Path(folder).name}")
        first = build_index(corpus, tmp_path / "index", relative)
        assert build_index(corpus, tmp_path / "index", relative) == first
    assert open_index(tmp_path / "index").search(QUERIES, 3)
    assert build_index(corpus, tmp_path / "index", IndexSettings("dense", encoder)) == first
    assert IndexSettings("dense").recorded["encoder"] == IndexSettings("dense").encoder


@pytest.mark.parametrize("stage", ["words", "postings", "vectors"])
def test_finished_stages_are_not_done_again(
    corpus: Path, tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    settings = IndexSettings("hybrid", encoder)
    work = {
        "passages": (build, "store"),
        "words": (postings, "count_words"),
        "postings": (postings, "write_postings"),
        "vectors": (dense, "encode_passages"),
    }
    before = list(work)[: list(work).index(stage)]

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*work[stage], interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_index(corpus, tmp_path / "index", settings)
    assert list(read_manifest(tmp_path / "index").stages) == before
    with pytest.raises(ValueError, match="half built.*run the command that built it again"):
        open_index(tmp_path / "index")
    with monkeypatch.context() as patch:
        for done in before:
            patch.setattr(*work[done], interrupt)
        build_index(corpus, tmp_path / "index", settings)
    build_index(corpus, tmp_path / "whole", settings)
    found = [open_index(tmp_path / name).search(QUERIES, 5) for name in ("index", "whole")]
    assert found[0] == found[1]


def test_a_stop_before_the_last_record_is_mended(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts may only go when the postings are on record."""

    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(postings, "drop_counts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_index(corpus, tmp_path / "index", WORDS)
    build_index(corpus, tmp_path / "index", WORDS)
    assert {path.name for path in (tmp_path / "index" / "bm25").iterdir()} == set(postings.FILES)
    assert open_index(tmp_path / "index").search(QUERIES, 5)


def test_two_builders_do_not_share_a_folder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second says so, whatever the first is doing, and what the first does comes out whole."""
    second = []
    write = postings.write_postings

    def meanwhile(folder: Path) -> None:
        with pytest.raises(RuntimeError, match="another process is writing .*index; wait for it"):
            build_index(corpus, tmp_path / "index", WORDS)
        second.append(folder)
        write(folder)

    monkeypatch.setattr(postings, "write_postings", meanwhile)
    build_index(corpus, tmp_path / "index", WORDS)
    assert second
    assert open_index(tmp_path / "index").search(QUERIES, 5)


def _stop_before_postings(corpus: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(postings, "write_postings", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_index(corpus, folder, WORDS)


@pytest.mark.parametrize("left", [None, 1200])
def test_counts_that_are_gone_or_cut_are_made_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int | None
) -> None:
    """They are no part of an index, so nothing else would tell that they are missing."""
    _stop_before_postings(corpus, tmp_path / "index", monkeypatch)
    if left is None:
        postings.drop_counts(tmp_path / "index" / "bm25")
    else:
        for name in ("words.i32", "counts.i32", "lengths.i32"):
            os.truncate(tmp_path / "index" / "bm25" / name, left)
    build_index(corpus, tmp_path / "index", WORDS)
    index = open_index(tmp_path / "index")
    assert index.search(QUERIES, 5) == Bm25Index(PASSAGES).search(QUERIES, 5)


@pytest.mark.parametrize(("name", "size"), [("passages.jsonl", 1000), ("passages.ends.i64", 0)])
def test_a_half_built_folder_whose_passages_were_cut_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    folder = tmp_path / "index"
    _stop_before_postings(corpus, folder, monkeypatch)
    os.truncate(folder / name, size)
    reason = rf"{name} has {size} bytes, its manifest says \d+: .* remove {folder} and build"
    with pytest.raises(ValueError, match=reason):
        build_index(corpus, folder, WORDS)
    shutil.rmtree(folder)
    build_index(corpus, folder, WORDS)


def test_a_half_built_folder_of_something_else_can_be_removed(
    corpus: Path, tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands there may have taken hours, so it is not begun anew without being asked."""
    folder = tmp_path / "index"
    _stop_before_postings(corpus, folder, monkeypatch)
    way_out = f"remove {folder}: no finished index is lost"
    with pytest.raises(ValueError, match=f"another, half built index of this .*{way_out}"):
        build_index(corpus, folder, IndexSettings("dense", encoder))
    other = write_corpus(tmp_path / "other.jsonl", PASSAGES[:300])
    with pytest.raises(ValueError, match=f"a half built index of another corpus: .*{way_out}"):
        build_index(other, folder, WORDS)
    build_index(corpus, folder, WORDS)


def test_a_build_goes_on_where_the_rest_fits_the_disk(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_before_postings(corpus, tmp_path / "index", monkeypatch)
    there = sum(p.stat().st_size for p in (tmp_path / "index").rglob("*") if p.is_file())
    left = memory.estimate_need(corpus, words=True).disk - there
    assert left > 0
    for free in (left - 1, left):
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr(memory.shutil, "disk_usage", lambda path, usage=usage: usage)
        if free < left:
            with pytest.raises(RuntimeError, match="of disk"):
                build_index(corpus, tmp_path / "index", WORDS)
        else:
            build_index(corpus, tmp_path / "index", WORDS)
    assert open_index(tmp_path / "index").search(QUERIES, 5)


@pytest.mark.slow
def test_a_killed_build_is_finished_by_the_same_command(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", random_passages(60_000))
    command = [sys.executable, "-m", "agentr1", "index", str(corpus)]
    kills = 0
    for attempt in range(12):
        folder = str(tmp_path / "index")
        process = subprocess.Popen(
            [*command, "--out", folder], env=environment(), stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=3 + attempt)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            time.sleep(0.1)
    assert process.returncode == 0 and kills
    mapped = open_index(tmp_path / "index")
    assert mapped.search(QUERIES, 5) == Bm25Index(random_passages(60_000)).search(QUERIES, 5)


def test_a_finished_index_is_left_as_it_is(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_index(corpus, tmp_path / "index", WORDS)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")}
    assert build_index(corpus, tmp_path / "index", WORDS) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")} == times


def test_a_folder_of_something_else_is_not_touched(
    corpus: Path, tmp_path: Path, encoder: str
) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else than an index: choose another"):
        build_index(corpus, folder, WORDS)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    (folder / "thesis.tex").unlink()
    build_index(corpus, folder, WORDS)
    with pytest.raises(ValueError, match=r"another index of this corpus: bm25, asked for dense, e"):
        build_index(corpus, folder, IndexSettings("dense", encoder))
    other = write_corpus(tmp_path / "other.jsonl", PASSAGES[:300])
    for attempt in (lambda: build_index(other, folder, WORDS), lambda: open_index(folder, other)):
        with pytest.raises(ValueError, match=r"another corpus: of corpus.jsonl .* not of other.js"):
            attempt()


def test_a_malformed_corpus_leaves_nothing_that_opens_and_can_be_mended(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", [*PASSAGES, PASSAGES[3]])
    for _ in range(2):
        with pytest.raises(ValueError, match="line 401: the id 'p3' is also on line 4"):
            build_index(corpus, tmp_path / "index", WORDS)
    with pytest.raises(ValueError, match="half built"):
        open_index(tmp_path / "index")
    write_corpus(corpus, PASSAGES)
    build_index(corpus, tmp_path / "index", WORDS)
    assert len(open_index(tmp_path / "index")) == 400
    write_corpus(corpus, [Passage("a", "?", "!")])
    with pytest.raises(ValueError, match="no passage holds a word"):
        build_index(corpus, tmp_path / "words", WORDS)
    write_corpus(corpus, PASSAGES)
    build_index(corpus, tmp_path / "words", WORDS)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no passages"):
        build_index(tmp_path / "empty.jsonl", tmp_path / "new", WORDS)
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError, match="there is no corpus"):
        build_index(tmp_path / "none.jsonl", tmp_path / "new", WORDS)


def test_a_passage_of_a_megabyte_is_found_by_every_kind(tmp_path: Path, encoder: str) -> None:
    passages = [Passage("a", "w1", "w2"), Passage("b", "w3", "w4 " * 350_000)]
    corpus = write_corpus(tmp_path / "corpus.jsonl", passages)
    for kind in ("bm25", "dense", "hybrid"):
        manifest = build_index(corpus, tmp_path / kind, IndexSettings(kind, encoder))
        assert manifest.stages["passages"] == {"passages": 2, "long": 1, "longest": 1_050_000}
        assert open_index(tmp_path / kind).search(["w4"], 1)[0][0].passage == passages[1]


def test_too_few_passages_for_compression_are_refused_before_encoding(
    corpus: Path, tmp_path: Path, encoder: str
) -> None:
    settings = IndexSettings("dense", encoder, layout="ivfpq")
    with pytest.raises(ValueError, match="at least 5000 passages .* build with --layout flat"):
        build_index(corpus, tmp_path / "index", settings)
    assert not list((tmp_path / "index").rglob(dense.VECTORS))
    build_index(corpus, tmp_path / "index", IndexSettings("dense", encoder, layout="flat"))


def test_a_compressed_folder_opens(
    corpus: Path, tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "LEAST_FOR_IVFPQ", 300)
    monkeypatch.setattr(dense, "FLAT_UP_TO", 399)
    manifest = build_index(corpus, tmp_path / "index", IndexSettings("dense", encoder))
    assert list(manifest.stages) == ["passages", "vectors", "ivfpq"]
    assert [len(hits) for hits in open_index(tmp_path / "index").search(QUERIES, 3)] == [3] * 20


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"schema": 0},
            "has schema 0, this version reads 2: remove .*index and build the index again",
        ),
        ({"kind": "sparse"}, "is broken: .* and 'sparse'"),
        ({"schema": 1}, "has schema 1, this version reads 2"),
        ({"colour": "red"}, "is broken: expected the keys"),
        ({"files": [1]}, "is broken: 'files' is .1., expected dict"),
        ({"settings": None}, "is broken: 'settings' is None, expected dict"),
        ({"complete": "yes"}, "is broken: 'complete' is 'yes', expected bool"),
        ({"corpus": {}}, "is broken: it lacks name, bytes or sha256 of its corpus"),
        ({"stages": {}}, "is broken: it lacks the stage of its passages"),
        ({"stages": {"passages": {}}}, "is broken: it lacks passages, long, longest in the stage"),
        ({"kind": "dense"}, "is broken: it lacks one of the settings encoder"),
        ({"complete": False}, "is half built"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    corpus: Path, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    build_index(corpus, tmp_path / "index", WORDS)
    _edit(tmp_path / "index", **changes)
    with pytest.raises(ValueError, match=reason):
        open_index(tmp_path / "index")


def test_a_broken_or_missing_manifest_and_a_changed_file_are_refused(
    corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "index"
    with pytest.raises(FileNotFoundError, match="is no index: it has no manifest.json"):
        open_index(tmp_path)
    build_index(corpus, folder, WORDS)
    manifest = check_manifest(folder)
    assert manifest.passages == 400 and manifest.versions["bm25s"]
    with (folder / "passages.jsonl").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"passages.jsonl has \d+ bytes, its manifest says"):
        open_index(folder)
    (folder / "passages.jsonl").unlink()
    for attempt in (lambda: build_index(corpus, folder, WORDS), lambda: open_index(folder)):
        with pytest.raises(ValueError, match=rf"jsonl is missing, .* remove {folder} and build"):
            attempt()
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=rf"is broken .*: remove {folder} and build"):
        open_index(folder)


def test_settings_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="kind 'colbert': expected one of bm25, dense, hybrid"):
        IndexSettings("colbert")
    with pytest.raises(ValueError, match="layout 'hnsw': expected one of auto, flat, ivfpq"):
        IndexSettings(layout="hnsw")
