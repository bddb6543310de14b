"""`agentr1 demonstrate`: which rows are used, what is written, what is told."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentr1 import cli
from agentr1.codec import Codec
from agentr1.sft import read_conversations, training_rows

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "multihop"
NAMES = ["Ada", "Bea", "Cleo", "Dora", "Edna", "Flora"]
RECIPE = """
dataset: data
environment: agentr1.envs.multi_hop.MultiHopEnv
tools: [agentr1.tools.search.Search.from_corpus]
search_top_k: 1
max_turns: 4
dev_limit: 1
test_limit: 1
use_cpu: true
bf16: false
"""


def row(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "question": f"Where was the mother of {name} Fisher born?",
        "answers": [f"Town {name}"],
        "supporting_titles": [f"{name} Fisher", f"Old {name} Miller"],
        "official_split": "train",
    } | changes


def passages() -> list[dict[str, str]]:
    children = [(f"{n} Fisher", f"She is a daughter of Old {n} Miller.") for n in NAMES]
    mothers = [(f"Old {n} Miller", f"She was born in Town {n}.") for n in NAMES]
    return [
        {"id": str(i), "title": title, "text": text}
        for i, (title, text) in enumerate([*children, *mothers])
    ]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write a dataset and a recipe into an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def write(train: list[dict[str, Any]], dev: tuple[dict[str, Any], ...] = ()) -> None:
        (tmp_path / "data").mkdir(exist_ok=True)
        files = {"train": train, "dev": (row("Zoe"), *dev), "corpus": passages()}
        for name, records in files.items():
            text = "\n".join(map(json.dumps, records))
            (tmp_path / "data" / f"{name}.jsonl").write_text(text)
        (tmp_path / "r.yaml").write_text(RECIPE)

    return write


def run(*options: str) -> int:
    return cli.main(["demonstrate", "r.yaml", "--out", "d.jsonl", *options])


def ids() -> list[str]:
    return [json.loads(line)["id"] for line in Path("d.jsonl").read_text().splitlines()]


def test_what_is_written_is_what_sft_reads(write: Any, codec: Codec, capsys: Any) -> None:
    write([row(name) for name in NAMES])
    assert run() == 0
    assert ids() == NAMES
    said = capsys.readouterr().out
    assert "6 demonstrations in d.jsonl, of 6 rows looked at" in said
    assert "searches: 2 in 6 rows" in said
    assert "left out" not in said
    rows = list(training_rows(read_conversations(Path("d.jsonl")), codec))
    assert len(rows) == 6
    trained = codec.tokenizer.decode([t for t in rows[0]["labels"] if t >= 0])
    assert trained.count("<tool_call>") == 2
    assert "<answer>Town Ada</answer>" in trained
    assert "She is a daughter" not in trained
    assert list(Path().glob("*.unfinished")) == []


def test_rows_that_fall_out_are_counted_by_reason(write: Any, capsys: Any) -> None:
    other_case = "where was mother of the  'Cleo Fisher' BORN"
    train = [
        row("Ada"),
        row("Bea", official_split="dev"),
        row("Cleo"),
        row("Dora", supporting_titles=[]),
        row("Edna", answers=["Nowhere"]),
    ]
    write(train, (row("Yara", question=other_case),))  # not only the first dev row
    assert run() == 0
    assert ids() == ["Ada"]
    said = capsys.readouterr().out
    for reason in (
        "1 because its official split is not train",
        "1 because its question stands in dev or test",
        "1 because it has no supporting titles",
        "1 because its answer stands in no passage shown",
    ):
        assert reason in said


def test_what_test_asks_beyond_its_limit_is_left_out_too(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write([row("Ada"), row("Cleo")])
    held = [row("Zoe"), row("Cleo", id="asked")]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, held)))
    assert run() == 0
    kept = (tmp_path / "d.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in kept] == ["Ada"]


def test_order_and_number_are_drawn_by_the_seed_alone(write: Any) -> None:
    write([row(name) for name in NAMES])
    assert run("--n", "3") == 0
    assert ids() == NAMES[:3]
    drawn = []
    for seed in ("1", "1", "2"):
        assert run("--n", "3", "--seed", seed) == 0
        drawn.append(ids())
    assert drawn[0] == drawn[1]
    assert len({tuple(found) for found in (*drawn, NAMES[:3])}) == 3


def test_overrides_reach_the_recipe(write: Any, capsys: Any) -> None:
    write([row("Ada")])
    assert run("--max_turns", "2") == 2
    assert "no row of data was kept: 1 because it needs more turns" in capsys.readouterr().err
    assert not Path("d.jsonl").exists()
    assert run("--think") == 0
    assert "<think>" in Path("d.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--n", "0"], "--n is 0, expected 1 or more"),
        (["--out", "d.json"], "--out is 'd.json', expected a file that ends in .jsonl"),
        (["--environment", "agentr1.envs.one_shot.ClosedBookEnv"], "is no ToolEnv"),
        (["--tools", "agentr1.tools.finish.answer"], "expected one search tool"),
    ],
)
def test_mistakes_are_one_line(write: Any, capsys: Any, options: list[str], said: str) -> None:
    write([row("Ada")])
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize("split", ["dev", "test"])
def test_dev_and_test_are_refused(write: Any, capsys: Any, split: str) -> None:
    write([row("Ada")])
    with pytest.raises(SystemExit) as refused:
        run("--split", split)
    assert refused.value.code == 2
    assert f"'{split}' is refused" in capsys.readouterr().err
    assert run("--split", "train") == 0


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not there")
def test_most_real_rows_with_supporting_titles_give_a_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("top_k: 1", "top_k: 3"))
    options = ["--dataset", str(SHARED / "2wiki"), "--train_limit", "60", "--max_turns", "6"]
    assert run(*options) == 0
    with gzip.open(SHARED / "2wiki" / "train.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(60), strict=False)]
    titled = [one for one in rows if one.get("supporting_titles")]
    assert len(ids()) > 0.75 * len(titled)
