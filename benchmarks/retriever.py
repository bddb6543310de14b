"""A retriever under load: many clients that ask one question after another.

Makes a corpus that counts like English, builds its index, starts the real server in a process of
its own and asks it from as many connections as there are clients, each waiting for its answer
before it asks again: with the gathering of concurrent queries and without, in turn. Then as one
trainer with as many episodes, gathering and not; in process; and one query at a time. Under load a
client waits for the queries before its own.

    python -m benchmarks.retriever --json retriever.json
    python -m benchmarks.retriever --passages 100000 --seconds 5
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from agentr1.retrieval.base import Index, Retriever
from agentr1.retrieval.build import IndexSettings, build_index
from agentr1.retrieval.encoders import DEFAULT
from agentr1.retrieval.gathering import Gathered
from agentr1.retrieval.http import HttpIndex
from agentr1.retrieval.opening import open_index
from benchmarks.comparison import Comparison, finish
from benchmarks.corpus import questions, write_corpus

QUESTIONS = 2000
"""Different ones; the clients go round."""
GATHERED, SINGLE, TWO = "gathered", "one by one", "two at once"
SIDES: dict[str, tuple[str, ...]] = {
    GATHERED: (),
    SINGLE: ("--max-batch", "1"),
    TWO: ("--searches", "2"),
}
"""The server's options on each side."""
TRAINER, HASTY = "trainer gathers", "trainer does not"
TRAINERS: dict[str, dict[str, int]] = {
    TRAINER: {"at_once": 4},
    HASTY: {"at_once": 64, "max_batch": 1},
}
"""How a trainer asks the first of them, which its episodes share."""
Ask = Callable[[str], Awaitable[None]]


class Load(NamedTuple):
    """What clients saw.

    Attributes:
        waits: seconds of each answer.
        seconds: all of it took.
    """

    waits: Sequence[float]
    seconds: float

    @property
    def rate(self) -> float:
        """Queries a second."""
        return len(self.waits) / self.seconds

    @property
    def p50(self) -> float:
        """Milliseconds half of the answers took at most."""
        return 1000 * statistics.median(self.waits)

    @property
    def p99(self) -> float:
        """Milliseconds 99 of 100 answers took at most."""
        return 1000 * statistics.quantiles(self.waits, n=100)[98]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retriever", description=__doc__)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=64, help="at once")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each round of load")
    parser.add_argument("--rounds", type=int, default=2, help="of each side, in turn")
    parser.add_argument("--kind", default="bm25", help="of the index: bm25, dense or hybrid")
    parser.add_argument("--encoder", default=DEFAULT, help="of a dense index")
    parser.add_argument("--k", type=int, default=3, help="passages a query returns")
    parser.add_argument("--seed", type=int, default=0, help="of corpus and questions")
    parser.add_argument("--folder", help="keeps corpus and index for the next run")
    parser.add_argument("--json", help="file to write the result to")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        place, built = _index(options, folder)
        asked = questions(options.passages, QUESTIONS, options.seed)
        return finish(measured(options, place, asked, built), options.json)


def measured(
    options: argparse.Namespace, place: Path, asked: Sequence[str], built: float
) -> list[Comparison]:
    """Put the index under load in all ways, and say what came out."""
    loads: dict[str, list[Load]] = {side: [] for side in (*SIDES, *TRAINERS)}
    with contextlib.ExitStack() as servers:
        ports = {s: servers.enter_context(server(place, *more)) for s, more in SIDES.items()}
        for port in ports.values():
            asyncio.run(over_http(options, port, asked, seconds=2.0))  # files into memory
        for _ in range(options.rounds):
            for side, port in ports.items():
                loads[side].append(asyncio.run(over_http(options, port, asked)))
            for side, limits in TRAINERS.items():
                remote = HttpIndex(f"http://127.0.0.1:{ports[GATHERED]}")
                retriever = Gathered(remote, **limits)
                loads[side].append(asyncio.run(by_finding(options, retriever, asked)))
    # The round that the rest of the machine disturbed least.
    served = {side: max(rounds, key=lambda load: load.rate) for side, rounds in loads.items()}
    index = open_index(place)
    local = asyncio.run(by_finding(options, Gathered(index), asked))
    alone = one_at_a_time(index, asked, options.k)
    workload = {
        **{"passages": options.passages, "clients": options.clients, "kind": options.kind},
        **{"k": options.k, "seed": options.seed, "cores": len(os.sched_getaffinity(0))},
        "index_seconds": round(built, 1),
    }
    return [
        _shown("HTTP", served[GATHERED], workload),
        _shown("HTTP, one trainer", served[TRAINER], workload),
        _shown("in process", local, workload),
        _shown("alone", alone, {**workload, "clients": 1}),
        _ratio("server gathers, over one by one", served[GATHERED], served[SINGLE], workload),
        _ratio("trainer gathers, over one by one", served[TRAINER], served[HASTY], workload),
        _ratio("two searches at once, over one", served[TWO], served[GATHERED], workload),
    ]


def _shown(side: str, load: Load, workload: Mapping[str, Any]) -> Comparison:
    p50, p99 = round(load.p50, 2), round(load.p99, 2)
    return Comparison(
        f"retriever, {side}",
        load.rate,
        {**workload, "p50_ms": p50, "p99_ms": p99},
        unit="queries/s",
        note=f"p50 {p50:.3g} ms, p99 {p99:.3g} ms",
    )


def _ratio(name: str, ours: Load, theirs: Load, workload: Mapping[str, Any]) -> Comparison:
    return Comparison(
        f"retriever, {name}",
        ours.rate / theirs.rate,
        workload,
        ours=ours.rate,
        theirs=theirs.rate,
        measure="queries/s",
        note=f"p99 {ours.p99:.3g} and {theirs.p99:.3g} ms",
    )


async def over_http(
    options: argparse.Namespace, port: int, asked: Sequence[str], seconds: float | None = None
) -> Load:
    """The load of clients with a connection each."""

    async def connected() -> Ask:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        return lambda query: _post(reader, writer, query, options.k)

    asks = [await connected() for _ in range(options.clients)]
    return await _load(asks, asked, seconds or options.seconds)


async def by_finding(
    options: argparse.Namespace, retriever: Retriever, asked: Sequence[str]
) -> Load:
    """The load of episodes that share a retriever in this process."""

    async def ask(query: str) -> None:
        assert await retriever.find(query, options.k)

    return await _load([ask] * options.clients, asked, options.seconds)


def one_at_a_time(index: Index, asked: Sequence[str], k: int) -> Load:
    """What a search takes when nobody else asks."""
    waits = []
    for query in asked[:300]:
        start = time.perf_counter()
        index.search([query], k)
        waits.append(time.perf_counter() - start)
    return Load(waits, sum(waits))


@contextmanager
def server(place: Path, *options: str) -> Iterator[int]:
    """`agentr1 serve-retriever` in a process of its own; its port."""
    verb = [sys.executable, "-m", "agentr1", "serve-retriever", str(place), "--port", "0"]
    running = subprocess.Popen([*verb, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        said = running.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/retrieve", said)
        if found is None:
            raise RuntimeError(f"the server did not start, it said {said!r}")
        port = int(found[1])
        _wait_for(port)
        yield port
    finally:
        running.terminate()
        running.wait(30)


def _wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"nobody answers on port {port}")


async def _load(asks: Sequence[Ask], asked: Sequence[str], seconds: float) -> Load:
    queries = itertools.cycle(asked)
    waits: list[float] = []
    start = time.perf_counter()

    async def client(ask: Ask) -> None:
        while (now := time.perf_counter()) - start < seconds:
            await ask(next(queries))
            waits.append(time.perf_counter() - now)

    await asyncio.gather(*map(client, asks))
    return Load(waits, time.perf_counter() - start)


async def _post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, query: str, k: int
) -> None:
    """One request by hand: a client library would take more of the cores than the server."""
    body = json.dumps({"queries": [query], "topk": k, "return_scores": True}).encode()
    head = f"POST /retrieve HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", answer)
    found = await reader.readexactly(int(length[1]) if length else 0)
    if b" 200 " not in answer[:20] or not json.loads(found)["result"][0]:
        raise RuntimeError(f"the server answered {answer + found[:200]!r}")


def _index(options: argparse.Namespace, folder: Path) -> tuple[Path, float]:
    """Corpus and index, made where they are not there yet, and the seconds that building took."""
    name = f"{options.passages}_{options.seed}"
    corpus = folder / f"corpus_{name}.jsonl"
    if not corpus.exists():
        print(f"writing {corpus}", flush=True)
        write_corpus(corpus, options.passages, options.seed)
    settings = {"kind": options.kind}
    if options.kind != "bm25":
        settings["encoder"] = options.encoder
    place = folder / f"{options.kind}_{name}"
    start = time.perf_counter()
    build_index(corpus, place, IndexSettings(**settings))
    return place, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
