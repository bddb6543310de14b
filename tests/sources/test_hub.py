"""Rows streamed as the Hub has them, from a repository on disk; and the Hub out of reach."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from datasets import Dataset
from datasets import config as datasets_config

import question_sets as made
from agentr1.sources.hub import read_hub
from agentr1.sources.table import DATA_SETS

RECORDS = {
    "hotpotqa": made.hotpotqa_hub,
    "2wiki": lambda i: made.hotpotqa_hub(i, type="comparison"),
    "musique": made.musique,
    "bamboogle": made.bamboogle,
    "nq": made.nq,
    "gsm8k": made.gsm8k,
}
OFFICIAL = RECORDS | {"hotpotqa": made.hotpotqa}


@pytest.mark.parametrize("name", DATA_SETS)
def test_rows_of_a_repository_are_read_as_the_official_records_are(
    tmp_path: Path, name: str
) -> None:
    dataset = DATA_SETS[name]
    split, hub_split = list(dataset.hub_splits.items())[-1]
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    rows = [RECORDS[name](i) for i in range(5)]
    Dataset.from_list(rows[:3]).to_parquet(folder / "data" / f"{hub_split}-0.parquet")
    Dataset.from_list(rows[3:]).to_parquet(folder / "data" / f"{hub_split}-1.parquet")
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {dataset.config}\n  data_files:\n"
        f"  - split: {hub_split}\n    path: data/{hub_split}-*\n---\n"
    )
    local = dataclasses.replace(dataset, repository=str(folder))
    found = list(read_hub(local, split))
    assert [place.rpartition(", ")[2] for place, _ in found] == [f"row {i}" for i in range(1, 6)]
    assert [dataset.read(row, place) for place, row in found] == [
        dataset.read(OFFICIAL[name](i), "") if name != "2wiki" else dataset.read(rows[i], "")
        for i in range(5)
    ]


def test_without_the_hub_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError) as raised:
        next(read_hub(DATA_SETS["gsm8k"], "train"))
    for words in ("openai/gsm8k", "main", "--source PATH", DATA_SETS["gsm8k"].home):
        assert words in str(raised.value)


def test_every_data_set_names_a_commit_and_its_splits() -> None:
    for dataset in DATA_SETS.values():
        assert len(dataset.revision) == 40
        assert int(dataset.revision, 16) > 0
        assert dataset.repository.count("/") == 1
        assert set(dataset.files) == set(dataset.hub_splits)
