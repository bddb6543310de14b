"""A build needs about what was estimated, and what does not fit is refused with numbers."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from agentr1.retrieval import memory
from agentr1.retrieval.base import Passage
from agentr1.retrieval.memory import Need, available_memory, estimate_need, refuse_too_large
from agentr1.retrieval.passages import line_of
from processes import ROOT, environment
from retrieval.corpora import random_passages, write_corpus

REAL = ROOT.parent / "shared" / "data" / "multihop" / "corpus.jsonl.gz"
PROGRAM = """
import json, sys, threading, time
from pathlib import Path
from agentr1.retrieval.build import IndexSettings, build_index

def own():  # memory that is not a mapped file
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) * 1024

def watch():
    while True:
        seen[1] = max(seen[1], own())
        time.sleep(0.002)

def announce(need, available):
    seen.extend([own(), own(), need])
    threading.Thread(target=watch, daemon=True).start()

seen = []
build_index(Path(sys.argv[1]), Path(sys.argv[2]), IndexSettings(), announce)
print(json.dumps([seen[1] - seen[0], seen[2].memory]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc")
def test_a_build_takes_less_than_was_estimated_and_not_much_less(tmp_path: Path) -> None:
    _compare(write_corpus(tmp_path / "corpus.jsonl", random_passages(60_000)), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason="the real passages are not there")
def test_a_build_of_real_passages_takes_less_than_was_estimated(tmp_path: Path) -> None:
    """Three million postings, where they are most of the need."""
    _compare(REAL, tmp_path / "out")


def _compare(corpus: Path, folder: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(corpus), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    taken, estimated = json.loads(done.stdout)
    assert taken < estimated < 6 * taken + 100_000_000


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_the_beginning_tells_how_many_passages_there_are(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = random_passages(5000)
    path = write_corpus(tmp_path / "corpus.jsonl", passages)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
    assert estimate_need(tmp_path / name, words=True).passages == 5000
    monkeypatch.setattr(memory, "_SAMPLE", 500)
    assert estimate_need(tmp_path / name, words=True).passages == pytest.approx(5000, rel=0.15)


@pytest.mark.parametrize("packed", [False, True])
def test_a_sample_of_long_passages_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    long = [Passage(str(n), "", f"w{n} " * 500) for n in range(100, 400)]
    path = write_corpus(tmp_path / "corpus.jsonl", long)
    whole = estimate_need(path, words=True)
    if packed:
        (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "corpus.jsonl.gz"
    seen = []
    monkeypatch.setattr(memory, "_SAMPLE_BYTES", 64_000)
    monkeypatch.setattr(memory, "line_of", lambda passage: seen.append(passage) or line_of(passage))
    need = estimate_need(path, words=True)
    assert 20 < len(seen) < 40
    assert need.passages == pytest.approx(300, rel=0.15)
    assert need.disk == pytest.approx(whole.disk, rel=0.2)


def test_other_fields_and_escapes_do_not_count_as_passages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "corpus.jsonl"
    records = [
        {"id": f"{n}", "title": "ü", "text": "Слова " * 5, "vector": [0.25] * 60}
        for n in range(3000)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(memory, "_SAMPLE", 500)
    assert estimate_need(path, words=True).passages == pytest.approx(3000, rel=0.05)


def test_a_word_of_every_passage_is_sorted_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", random_passages(200))
    monkeypatch.setattr(memory, "_SAMPLE", 199)
    size = path.stat().st_size
    monkeypatch.setattr(memory, "_plain_bytes", lambda corpus: 300_000 * size)
    need = estimate_need(path, words=True)
    assert need.passages == pytest.approx(60_000_000, rel=0.01)
    # One word of all of them is 60 million postings at once, whatever a block usually is.
    assert need.memory > 46 * need.passages


def test_more_takes_more(tmp_path: Path) -> None:
    few = write_corpus(tmp_path / "few.jsonl", random_passages(100))
    many = write_corpus(tmp_path / "many.jsonl", random_passages(5000))
    words, more = (estimate_need(path, words=True) for path in (few, many))
    vectors = estimate_need(many, words=False, dimensions=64)
    packed = estimate_need(many, words=True, dimensions=64, ivfpq=True)
    assert words.memory <= more.memory and words.disk < more.disk
    assert vectors.disk > 4 * 64 * 5000
    assert packed.disk > vectors.disk and packed.memory >= vectors.memory
    assert packed.mapped > vectors.mapped


def test_what_cannot_fit_is_refused_with_the_numbers_and_a_way_out(tmp_path: Path) -> None:
    need = Need(passages=5_000_000, memory=3_100_000_000, mapped=0, disk=1000)
    with pytest.raises(
        RuntimeError, match=r"5000000 passages needs about 3.1 GB of memory, 2.0 GB"
    ):
        refuse_too_large(need, tmp_path / "new", 2_000_000_000)
    refuse_too_large(need, tmp_path / "new", 3_100_000_000)
    refuse_too_large(need, tmp_path / "new", None)
    with pytest.raises(RuntimeError, match=r"of disk, .* choose another --out"):
        refuse_too_large(need._replace(disk=1 << 60), tmp_path / "new" / "deep", None)


def _system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemAvailable:  4000000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "sys/fs/cgroup/memory"
SYSTEMS = {
    "machine alone": ({}, 4_096_000_000),
    "second version": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.max": "1000\n",
            "sys/fs/cgroup/a/memory.current": "700\n",
            "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 50\n",
        },
        350,
    ),
    "second version, path of the host": (
        {
            "proc/self/cgroup": "0::/kubepods/x\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "200\n",
        },
        800,
    ),
    "first version": (
        {
            "proc/self/cgroup": "4:cpu,memory:/job\n1:name=x:/job\n",
            f"{V1}/job/memory.limit_in_bytes": "1000\n",
            f"{V1}/job/memory.usage_in_bytes": "400\n",
            f"{V1}/job/memory.stat": "total_inactive_file 5\n",
            f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{V1}/memory.usage_in_bytes": "400\n",
        },
        605,
    ),
    "over its limit": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "1200\n",
        },
        0,
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_least_of_machine_and_control_groups_is_available(tmp_path: Path, name: str) -> None:
    files, expected = SYSTEMS[name]
    assert available_memory(root=_system(tmp_path, files)) == expected


def test_nothing_is_known_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert available_memory(root=tmp_path) is None


def test_the_limit_of_the_process_counts_and_mapped_files_count_against_it() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("asks /proc")
    program = (
        "from agentr1.retrieval.memory import available_memory as a\n"
        "print(a(), a(mapped=500_000_000))"
    )
    limit = 3_000_000_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(OPENBLAS_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        preexec_fn=limited,
        check=True,
    )
    left, less = map(int, done.stdout.split())
    assert 500_000_000 < left < limit
    assert less == pytest.approx(left - 500_000_000, abs=20_000_000)
