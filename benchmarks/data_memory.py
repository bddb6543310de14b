"""What `agentr1 data` needs to prepare many questions and passages: memory and time.

Writes a made-up file in MuSiQue's or HotpotQA's official shape, runs the verb on it in a process
whose address space is limited as `ulimit -v` does it, and prints what that process took. No passage
occurs twice, so the set of passages seen is as large as it can be.

    python -m benchmarks.data_memory --questions 100000 --passages 5000000
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.comparison import Comparison, finish

LIMIT_KIB = 4 << 20
"""Of address space: 4 GiB, in the unit of `ulimit -v`."""
FILES = {"musique": "musique_ans_v1.0_train.jsonl", "hotpotqa": "hotpot_train_v1.1.json"}
_SEEDS = 1000
"""Different openings of passages; their numbers make them unique."""
_CHILD = """
import resource, sys
limit = int(sys.argv[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from agentr1.cli import main
code = main(sys.argv[2:])
heavy = [name for name in ("torch", "datasets", "numpy") if name in sys.modules]
fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
print("USED", fields["VmHWM"].split()[0], fields["VmPeak"].split()[0], *heavy)
sys.exit(code)
"""


class Used(NamedTuple):
    """What one run took.

    Attributes:
        resident_mib: peak of memory in use.
        address_mib: peak of address space, which the limit is about.
        seconds: from start to end of the process.
        heavy: of torch, datasets and numpy, those that were imported.
    """

    resident_mib: float
    address_mib: float
    seconds: float
    heavy: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 where the verb fails within the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_memory", description=__doc__)
    parser.add_argument("--questions", type=int, default=20_000)
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--characters", type=int, default=500, help="of a passage")
    parser.add_argument("--shape", choices=sorted(FILES), default="musique")
    parser.add_argument("--folder", type=Path, help="where the files are made (a temporary one)")
    parser.add_argument("--json", help="file to write the result to")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = make(folder, options.shape, options.questions, options.passages, options.characters)
        used = measure(folder, options.shape)
    workload = {
        "questions": options.questions,
        "passages": options.passages,
        "shape": options.shape,
        "file_mib": size >> 20,
        "address_limit_mib": LIMIT_KIB >> 10,
        "resident_mib": round(used.resident_mib),
        "seconds": round(used.seconds, 1),
        "imported": list(used.heavy),
    }
    line = Comparison(
        f"data, {options.passages:,} passages",
        used.address_mib,
        workload,
        unit="MiB of address space",
        target=LIMIT_KIB >> 10,
        direction="at most",
        ours=used.resident_mib,
        measure="MiB",
        note=f"{used.seconds:.0f} s",
    )
    return finish([line], options.json)


def make(folder: Path, shape: str, questions: int, passages: int, characters: int) -> int:
    """Write an official file of so many questions and different passages; its bytes."""
    each, rest = divmod(passages, questions)
    if rest or each < 2:
        raise ValueError(f"{passages} passages cannot be shared out evenly among {questions}")
    records = _records(shape, questions, each, characters)
    path = folder / FILES[shape]
    with path.open("w", encoding="utf-8") as file:
        if shape == "musique":
            file.writelines(json.dumps(record) + "\n" for record in records)
        else:  # one array on one line, as HotpotQA is published
            file.write("[")
            for i, record in enumerate(records):
                file.write(f"{', ' if i else ''}{json.dumps(record)}")
            file.write("]")
    return path.stat().st_size


def measure(folder: Path, shape: str) -> Used:
    """Run the verb on a file that `make` wrote, under the limit.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    verb = ["data", shape, "--source", str(folder), "--split", "train", "--out"]
    command = [sys.executable, "-c", _CHILD, str(LIMIT_KIB), *verb, str(folder / "out")]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    resident, address, *heavy = done.stdout.rpartition("USED")[2].split()
    return Used(int(resident) / 1024, int(address) / 1024, seconds, tuple(heavy))


def _records(shape: str, questions: int, each: int, characters: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=characters // 8)) for _ in range(_SEEDS)]
    for i in range(questions):
        first = i * each
        passages = [(f"Title {j}", f"{j} {texts[j % _SEEDS]}") for j in range(first, first + each)]
        yield (_musique if shape == "musique" else _hotpotqa)(i, passages)


def _musique(i: int, passages: Sequence[tuple[str, str]]) -> dict[str, Any]:
    paragraphs = [
        {"idx": k, "title": title, "paragraph_text": text, "is_supporting": k < 2}
        for k, (title, text) in enumerate(passages)
    ]
    steps = [
        {"id": k, "question": f"step {k}", "answer": f"answer {k}", "paragraph_support_idx": k}
        for k in range(2)
    ]
    return {
        "id": f"2hop__{i}_{i}",
        "paragraphs": paragraphs,
        "question": f"Which {i} is it?",
        "question_decomposition": steps,
        "answer": f"number {i}",
        "answer_aliases": [],
        "answerable": True,
    }


def _hotpotqa(i: int, passages: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "_id": f"{i:024x}",
        "question": f"Which {i} is it?",
        "answer": f"number {i}",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [[title, 0] for title, _ in passages[:2]],
        "context": [[title, [text]] for title, text in passages],
    }


if __name__ == "__main__":
    sys.exit(main())
