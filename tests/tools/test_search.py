"""Search renders passages best first and never holds up the event loop with a slow retriever."""

import asyncio
import json
import subprocess
import sys
import threading

import pytest

from agentr1.retrieval.base import Passage
from agentr1.tools.base import schema
from agentr1.tools.runner import ToolRunner
from agentr1.tools.search import Search
from agentr1.types import ToolCall

PASSAGES = [
    Passage("1", "Ada Lovelace", "wrote the first program."),
    Passage("2", "Charles Babbage", "designed the analytical engine, the program's machine."),
    Passage("3", "Ulm", "is a city."),
]


class Recorder:
    """A retriever that remembers in which thread it was asked."""

    def __init__(self):
        self.threads = []

    def search(self, query, k):
        self.threads.append(threading.current_thread())
        return PASSAGES[:k]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = (json.dumps({"id": p.id, "title": p.title, "text": p.text}) for p in PASSAGES)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_passages_are_shown_one_a_line_best_first(corpus):
    search = Search.from_corpus(corpus, k=2)
    assert asyncio.run(search(query="Who wrote the first program?")) == (
        "Ada Lovelace: wrote the first program.\n"
        "Charles Babbage: designed the analytical engine, the program's machine."
    )


def test_nothing_found_is_said(corpus):
    assert asyncio.run(Search.from_corpus(corpus)(query="zzz")) == "No results."


def test_the_runner_accepts_it_as_a_tool(corpus):
    runner = ToolRunner([Search.from_corpus(corpus, k=1)])
    good, bad = asyncio.run(
        runner.run(
            [
                ToolCall("a", "search", {"query": "Ulm"}),
                ToolCall("b", "search", {"query": "Ulm", "k": 9}),
            ]
        )
    )
    assert (good.content, good.failure) == ("Ulm: is a city.", None)
    assert bad.failure == "mistake"
    assert "Expected search(query: string)" in bad.content


def test_the_schema_has_one_required_argument(corpus):
    function = schema(Search(Recorder()))["function"]
    assert function["name"] == "search"
    assert function["description"] == "Search the corpus for passages."
    assert function["parameters"]["required"] == ["query"]
    assert function["parameters"]["properties"]["query"]["description"] == "What to look for."


def test_only_a_retriever_known_to_be_fast_runs_on_the_event_loop():
    slow, fast = Recorder(), Recorder()
    asyncio.run(Search(slow)(query="x"))
    asyncio.run(Search(fast, in_thread=False)(query="x"))
    assert slow.threads != [threading.main_thread()]
    assert fast.threads == [threading.main_thread()]


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="k is 0"):
        Search(Recorder(), k=0)


def test_the_search_tool_imports_no_torch():
    script = (
        "import sys, agentr1.tools.search\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
