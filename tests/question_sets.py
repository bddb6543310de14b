"""Made-up records of every data set, in the shapes that they are published in."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def hotpotqa(i: int = 0, **more: Any) -> Record:
    """As in the official array; passage 0 is common to all questions."""
    return {
        "_id": f"hp{i}",
        "question": f"Which river runs through town {i}?",
        "answer": f"River {i}",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [[f"Town {i}", 0], [f"River {i}", 1], [f"Town {i}", 1]],
        "context": [
            ["Rivers", ["Rivers are wet.", " They run."]],
            [f"River {i}", [f"River {i} is long.", f" It runs through town {i}."]],
            [f"Town {i}", [f"Town {i} is small.", " It has a river."]],
        ],
    } | more


def hotpotqa_hub(i: int = 0, **more: Any) -> Record:
    """The same question in the columns of the Hub."""
    record = hotpotqa(i, **more)
    facts, context = record["supporting_facts"], record["context"]
    return record | {
        "id": record.pop("_id"),
        "supporting_facts": {"title": [t for t, _ in facts], "sent_id": [n for _, n in facts]},
        "context": {"title": [t for t, _ in context], "sentences": [s for _, s in context]},
    }


def twowiki(i: int = 0, **more: Any) -> Record:
    """HotpotQA's shape; sentences have no leading space."""
    return {
        "_id": f"2w{i}",
        "type": "bridge_comparison",
        "question": f"Are films {i} and {i + 1} by directors of one country?",
        "answer": "yes",
        "evidences": [[f"Film {i}", "director", f"Director {i}"]],
        "supporting_facts": [[f"Film {i}", 0], [f"Director {i}", 0]],
        "context": [
            [f"Film {i}", [f"Film {i} is old.", f"Director {i} made it."]],
            [f"Director {i}", [f"Director {i} is French."]],
        ],
    } | more


def musique(i: int = 0, **more: Any) -> Record:
    """Three paragraphs; the one for the first hop is the last."""
    return {
        "id": f"2hop__{i}_{i + 1}",
        "paragraphs": [
            {"idx": 0, "title": "Noise", "paragraph_text": "Nothing.", "is_supporting": False},
            {"idx": 1, "title": f"B{i}", "paragraph_text": f"B{i} ends.", "is_supporting": True},
            {"idx": 2, "title": f"A{i}", "paragraph_text": f"A{i} is B{i}.", "is_supporting": True},
        ],
        "question": f"What ends what A{i} is?",
        "question_decomposition": [
            {"id": 1, "question": f"A{i} >> is", "answer": f"B{i}", "paragraph_support_idx": 2},
            {"id": 2, "question": "#1 >> end", "answer": f"end {i}", "paragraph_support_idx": 1},
        ],
        "answer": f"end {i}",
        "answer_aliases": [f"the end {i}", f"end {i}", ""],
        "answerable": True,
    } | more


def bamboogle(i: int = 0, **more: Any) -> Record:
    return {"Question": f'Who was "king" of town {i},\nand when?', "Answer": f"King {i}"} | more


def nq(i: int = 0, **more: Any) -> Record:
    return {"question": f"who sang song {i}", "answer": [f"Singer {i}", f"Band {i}"]} | more


def gsm8k(i: int = 0, **more: Any) -> Record:
    solution = f"He has 1000 + {i} = <<1000+{i}={1000 + i}>>{1000 + i}.\n#### {1000 + i:,}"
    return {"question": f"He has 1000 and {i}. How many?", "answer": solution} | more


def own(i: int = 0, **more: Any) -> Record:
    """A row of this project; its passages are in a corpus."""
    return {
        "id": f"q{i}",
        "question": f"Which is number {i}?",
        "answers": [f"number {i}"],
        "hops": 2,
        "supporting_titles": [f"T{i}"],
        "gold_ids": [f"p{i}"],
    } | more


def passage(i: int = 0, **more: Any) -> Record:
    return {"id": f"p{i}", "title": f"T{i}", "text": f"Text {i}."} | more


def write_lines(path: Path, records: Iterable[Record | str]) -> Path:
    """JSONL, or gzip; a text is a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_array(path: Path, records: Iterable[Record]) -> Path:
    """One JSON array on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return path


def write_csv(path: Path, records: Iterable[Mapping[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["Question", "Answer"])
        writer.writeheader()
        writer.writerows(records)
    return path


def write_own(folder: Path, corpus: int | None = 10, **splits: Iterable[Record]) -> Path:
    """A folder of this project's rows with so many passages beside them."""
    for split, records in splits.items():
        write_lines(folder / f"{split}.jsonl", records)
    if corpus is not None:
        write_lines(folder / "corpus.jsonl", map(passage, range(corpus)))
    return folder


def lines_of(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
