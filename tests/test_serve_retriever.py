"""The verb, as a user runs it: a process that serves, says what is wrong, and stops when asked."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from agentr1.cli import main
from agentr1.engines.base import Sampling
from agentr1.envs.tool_env import ToolEnv
from agentr1.parsing import render_call
from agentr1.recipe import load_recipe
from agentr1.retrieval.base import load_passages
from agentr1.retrieval.bm25 import Bm25Index
from agentr1.retrieval.build import IndexSettings, build_index
from agentr1.retrieval.http import HttpIndex
from agentr1.rollout import Limits, rollout_batch
from agentr1.segments import flatten
from agentr1.task import build_task
from agentr1.tools.policy import ToolPolicy
from agentr1.tools.runner import ToolRunner
from agentr1.tools.search import Search
from agentr1.types import Trajectory
from fakes import ScriptedPolicy
from processes import Job, job
from retrieval.indexes import free_port

CORPUS = Path(__file__).resolve().parents[1] / "data" / "quickstart" / "corpus.jsonl"


@contextmanager
def server(place: Path, log: Path, *options: str) -> Iterator[tuple[Job, str]]:
    """`agentr1 serve-retriever` on a free port, ready; its process and its address."""
    verb = [sys.executable, "-m", "agentr1", "serve-retriever", str(place), "--port", "0"]
    with job([*verb, *options], log) as running:
        running.wait_for(lambda: "serving " in running.output)
        found = re.search(r"serving [\d,]+ passages at (http://\S+)/retrieve", running.output)
        assert found
        running.wait_for(lambda: _healthy(found[1]))
        yield running, found[1]


def _healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", trust_env=False).is_success
    except httpx2.HTTPError:
        return False


@pytest.mark.slow
def test_an_index_folder_is_served_as_it_is_searched_here_and_stops_on_sigterm(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "index"
    build_index(CORPUS, folder, IndexSettings())
    with server(folder, tmp_path / "log", "--max-k", "7") as (running, url):
        index = HttpIndex(url)
        index.check()
        assert index.about["index"] == "bm25"
        assert re.fullmatch(r"[0-9a-f]{64}", index.about["manifest"])
        assert index.about["max_k"] == 7
        here = Bm25Index(load_passages(CORPUS))
        assert len(index) == len(here)
        queries = [passage.title for passage in load_passages(CORPUS)[:50]]
        assert index.search(queries, 3) == here.search(queries, 3)
        with pytest.raises(ConnectionError, match="topk is 8, expected 1 to 7"):
            index.search(["a"], 8)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0, running.output
        assert "stopped" in running.output
        assert "Traceback" not in running.output


@pytest.mark.slow
def test_a_request_under_way_is_answered_before_the_server_stops(tmp_path: Path) -> None:
    with server(CORPUS, tmp_path / "log") as (running, url):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"queries": ["city"]}).encode()
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            head = f"POST /retrieve HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body[:5])
            running.wait_for(lambda: "requests_in_flight 1.0" in _metrics(url))
            running.process.send_signal(signal.SIGTERM)
            connection.sendall(body[5:])
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 200")
        assert running.wait(20) == 0


def test_a_server_that_stops_waits_as_long_as_a_request_may_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graces = []

    def run(server: uvicorn.Server, sockets: Any) -> None:
        graces.append(server.config.timeout_graceful_shutdown)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    assert main(["serve-retriever", str(CORPUS), "--port", "0"]) == 0
    assert main(["serve-retriever", str(CORPUS), "--port", "0", "--max-seconds", "2"]) == 0
    assert "stopped" in capsys.readouterr().out
    assert 60 < graces[0] < 70 and 2 < graces[1] < 12


def _metrics(url: str) -> str:
    return httpx2.get(f"{url}/metrics", trust_env=False).text


class Killing(ToolEnv):
    """Kills the server before the second turn of the episodes has been heard."""

    running: Job

    async def step(self, message: Any) -> Any:
        if "two" in message.content:
            self.running.process.kill()
            self.running.process.wait()
        return await super().step(message)


def play(codec: Any, runner: ToolRunner, turns: Sequence[str], rows: int) -> list[Trajectory]:
    scripts = {f"<{i}>": turns for i in range(rows)}
    return asyncio.run(
        rollout_batch(
            [{"id": str(i), "question": f"Question <{i}>?"} for i in range(rows)],
            lambda: Killing(runner),
            codec,
            ScriptedPolicy(codec, scripts),
            limits=Limits(max_turns=5, max_completion_length=100_000),
            samplings=[Sampling(1, 1.0, i) for i in range(rows)],
        )
    )


@pytest.mark.slow
def test_a_server_that_dies_during_rollouts_gives_faults_and_no_crash(
    tmp_path: Path, codec: Any
) -> None:
    turns = [render_call("search", {"query": word}) for word in ("one city", "two", "three")]
    with server(CORPUS, tmp_path / "log") as (running, url):
        Killing.running = running
        policy = ToolPolicy(retries=2, backoff=0.01, timeout=5.0)
        runner = ToolRunner([Search.from_corpus(url, k=1)], default_policy=policy)
        episodes = play(codec, runner, [*turns, "The answer."], rows=8)
    assert len(episodes) == 8
    for episode in episodes:
        assert [turn.fault is None for turn in episode.turns] == [True, False, False, True]
        assert "ConnectionError" in str(episode.turns[1].fault)
        (segment,) = flatten(episode)
        trained = {t for t, kept in zip(segment.turn_ids, segment.loss_mask, strict=True) if kept}
        assert trained == {0, 3}


def test_a_server_that_is_down_fails_the_recipe_before_weights_are_loaded() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    recipe = load_recipe("quickstart", ["--corpus", url])
    with pytest.raises(ConnectionError, match=f"no retriever answers at {url}"):
        build_task(recipe.arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "{taken}"], "choose another --port"),
        (["--port", "99999"], "choose another --port"),
        (["--host", "not an address"], "cannot listen on"),
        (["--port", "0", "--max-k", "0"], "max_k is 0, expected at least 1"),
        (["--port", "0"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [option.format(taken=port) for option in options]
        assert main(["serve-retriever", "nowhere/corpus.jsonl", *given]) == 2
    errors = capsys.readouterr().err
    assert "error: " in errors
    assert words in errors


def test_without_the_servers_libraries_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve-retriever", str(CORPUS)]) == 2
    assert 'pip install "agentr1[serve]"' in capsys.readouterr().err
