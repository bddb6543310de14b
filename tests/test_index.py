"""`agentr1 index`: builds, measures, and says in one line what is wrong."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from agentr1 import index
from agentr1.cli import main
from agentr1.retrieval.opening import open_index
from processes import ROOT, environment
from retrieval.corpora import WORDS, random_passages, static_encoder, write_corpus

PASSAGES = random_passages(300)
REAL = ROOT.parent / "shared" / "data" / "multihop"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", PASSAGES)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    folder = tmp_path / "made_up"
    folder.mkdir()
    rows = [
        {
            "id": passage.id,
            "question": f"{passage.title} {passage.text}",
            "answers": ["yes"] if number == 0 else ["w1"],
            "gold_ids": [passage.id],
        }
        for number, passage in enumerate(PASSAGES[:20])
    ]
    path = folder / "dev.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_a_corpus_is_indexed_and_measured_in_one_command(
    corpus: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "indexes" / "bm25"
    arguments = [str(corpus), "--out", str(out), "--questions", str(questions), "--k", "1", "300"]
    assert main(["index", *arguments]) == 0
    printed = capsys.readouterr()
    assert "about 300 passages; building needs about 0.1 GB of memory" in printed.err
    assert "bm25, 300 passages" in printed.out and "recall@300" in printed.out
    record = json.loads((out / "quality.json").read_text())["made_up/dev"]
    assert record["questions"] == record["with_support"] == 20
    assert record["yes_no"] == 1 and record["answer_coverage"] == record["ceiling"] == 1.0
    assert record["recall"]["1"] > 0.8
    assert record["recall"]["300"] == record["all_found"]["300"] == 1.0


def test_measuring_again_keeps_what_was_measured_of_other_questions(
    corpus: Path, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    assert main(["index", str(corpus), "--out", str(out), "--questions", str(questions)]) == 0
    other = questions.with_name("test.jsonl")
    other.write_text('{"id": "q", "question": "w1", "answers": ["nowhere"]}\n')
    before = json.loads((out / "quality.json").read_text())
    assert main(["index", str(out), "--questions", str(other)]) == 0
    after = json.loads((out / "quality.json").read_text())
    assert after.keys() == {"made_up/dev", "made_up/test"}
    assert after["made_up/dev"] == before["made_up/dev"]
    assert after["made_up/test"]["answer_coverage"] == 0.0 and "recall" not in after["made_up/test"]
    open_index(out)  # the numbers are no part of what the manifest holds


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_the_other_kinds_take_their_encoder_and_prefixes(
    corpus: Path, questions: Path, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("model2vec")
    out, encoder = tmp_path / "index", static_encoder(tmp_path / "model")
    options = ["--kind", kind, "--encoder", encoder, "--query-prefix", "w1 "]
    options += ["--questions", str(questions)]
    assert main(["index", str(corpus), "--out", str(out), *options]) == 0
    assert json.loads((out / "manifest.json").read_text())["settings"]["query_prefix"] == "w1 "
    assert json.loads((out / "quality.json").read_text())["made_up/dev"]["recall"]["5"] > 0.5
    assert main(["index", str(corpus), "--out", str(out), *options[:-4]]) == 2


def test_long_passages_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passages = [*PASSAGES, PASSAGES[0].__class__("long", "w1", "w2 " * 340_000)]
    corpus = write_corpus(tmp_path / "corpus.jsonl", passages)
    assert main(["index", str(corpus), "--out", str(tmp_path / "index")]) == 0
    assert "1 passages have 20,000 characters or more, the longest 1,020,000" in (
        capsys.readouterr().out
    )


def test_broken_numbers_of_before_are_named(
    corpus: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "index"
    assert main(["index", str(corpus), "--out", str(out)]) == 0
    (out / "quality.json").write_text('{"a"')
    assert main(["index", str(out), "--questions", str(questions)]) == 2
    assert "quality.json is broken" in capsys.readouterr().err.replace("\n", " ")


def test_options_are_not_shortened(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["index", str(corpus), "--ou", "x"])
    assert "unrecognized arguments: --ou" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{corpus}"], "where to? `agentr1 index "),
        (["{folder}"], "is a folder: `agentr1 index "),
        (["{folder}", "--questions", "{questions}"], "is no index: it has no manifest.json"),
        (["{corpus}", "--questions", "{corpus}", "--out", "{folder}/new"], "'question' must be"),
        (["{corpus}", "--out", "{folder}/new", "--k", "0"], "--k: expected values of at least 1"),
        (["{corpus}", "--out", "{folder}"], "holds something else than an index"),
        (["{folder}/none.jsonl", "--out", "{folder}/new"], "there is no corpus"),
        (["{corpus}", "--out", "{folder}/new", "--kind", "dense", "--encoder", "x"], "LIBRARY:MOD"),
    ],
)
def test_mistakes_are_one_line(
    corpus: Path,
    questions: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    places = {"corpus": corpus, "folder": corpus.parent, "questions": questions}
    given = [text.format(**places) for text in arguments]
    assert index.main(given) == 2
    error = capsys.readouterr().err
    assert reason in error.replace("\n", " ") and "Traceback" not in error
    assert error.startswith("error: ") and error.count("\n") == 2
    assert not (corpus.parent / "new").exists()


def test_a_build_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    """Under `ulimit -v`, and the same build runs where there is room."""
    if not Path("/proc/self/status").exists():
        pytest.skip("asks /proc")
    words = len(WORDS)
    corpus = write_corpus(tmp_path / "corpus.jsonl", random_passages(2000))
    # So that the vocabulary is large: every passage brings words of its own.
    lines = [json.loads(line) for line in corpus.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["text"] = " ".join(f"x{number}y{n}" for n in range(200 + words))
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = "import resource, agentr1.index\nprint(open('/proc/self/status').read())"
    status = _run([sys.executable, "-c", base]).stdout.split()
    used = int(status[status.index("VmPeak:") + 1]) * 1024

    command = [sys.executable, "-m", "agentr1", "index", str(corpus), "--out"]
    refused = _run([*command, str(tmp_path / "refused")], limit=used + 180_000_000)
    assert refused.returncode == 2, refused.stderr
    assert "needs about 0.2 GB of memory" in refused.stderr and "available" in refused.stderr
    assert "ulimit -v" in refused.stderr
    assert not (tmp_path / "refused").exists()
    built = _run([*command, str(tmp_path / "built")], limit=used + 600_000_000)
    assert built.returncode == 0, built.stderr


def _run(command: list[str], limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return subprocess.run(
        command,
        env=environment(OPENBLAS_NUM_THREADS="1", MALLOC_ARENA_MAX="2"),
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real questions are not there")
def test_real_questions_find_their_passages(tmp_path: Path) -> None:
    files = [REAL / name / "dev.jsonl.gz" for name in ("hotpotqa", "2wiki", "musique", "bamboogle")]
    names = [str(path) for path in files]
    arguments = [str(REAL / "corpus.jsonl.gz"), "--out", str(tmp_path), "--questions", *names]
    assert main(["index", *arguments]) == 0
    record = json.loads((tmp_path / "quality.json").read_text())
    all_found = [
        record[f"{name}/dev"]["all_found"]["5"] for name in ("hotpotqa", "2wiki", "musique")
    ]
    assert all_found == pytest.approx([0.455, 0.289, 0.073], abs=0.005)
    assert record["hotpotqa/dev"]["answer_coverage"] > 0.99
    assert record["bamboogle/dev"]["answer_coverage"] == pytest.approx(0.863, abs=0.005)
