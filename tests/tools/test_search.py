"""Search renders passages best first, one a line, whatever is in them and wherever they are."""

import asyncio
import json
import subprocess
import sys

import pytest

from agentr1.retrieval.base import Hit, Passage
from agentr1.retrieval.build import IndexSettings, build_index
from agentr1.retrieval.opening import open_index
from agentr1.retrieval.server import make_app
from agentr1.tools.base import ToolError, schema
from agentr1.tools.runner import ToolRunner
from agentr1.tools.search import Search
from agentr1.types import ToolCall
from retrieval.indexes import free_port, served

PASSAGES = [
    Passage("1", "Ada Lovelace", "wrote the first program."),
    Passage("2", "Charles Babbage", "designed the analytical engine, the program's machine."),
    Passage("3", "Ulm", "is a city."),
]


class Canned:
    """A retriever that gives the same passages for every query, and keeps the queries."""

    def __init__(self, *passages):
        self.passages = passages
        self.queries = []

    async def find(self, query, k):
        self.queries.append(query)
        return [Hit(passage, 1.0) for passage in self.passages[:k]]


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
    function = schema(Search(Canned()))["function"]
    assert function["name"] == "search"
    assert function["description"] == "Search the corpus for passages."
    assert function["parameters"]["required"] == ["query"]
    assert function["parameters"]["properties"]["query"]["description"] == "What to look for."


def test_a_passage_is_one_line_whatever_is_in_it():
    passage = Passage("1", "Ada\u2028Lovelace", "She wrote\nthe first\r\nprogram.  Yes.")
    shown = asyncio.run(Search(Canned(passage))(query="x"))
    assert shown == "Ada Lovelace: She wrote the first program.  Yes."


@pytest.mark.parametrize(
    ("chars", "text"),
    [
        (None, "one two three"),
        (13, "one two three"),
        (12, "one two ..."),
        (7, "one two ..."),
        (6, "one ..."),
        (2, "on ..."),
    ],
)
def test_a_passage_is_cut_at_the_end_of_a_word_and_its_title_is_not(chars, text):
    search = Search(Canned(Passage("1", "A long title", "one two three")), passage_chars=chars)
    assert asyncio.run(search(query="x")) == f"A long title: {text}"


def test_an_overlong_query_is_the_models_mistake_and_never_sent():
    retriever = Canned(*PASSAGES)
    with pytest.raises(ToolError, match="the query has 2001 characters, expected at most 2000"):
        asyncio.run(Search(retriever)(query="x" * 2001))
    assert not retriever.queries


def test_half_a_surrogate_pair_in_a_query_cannot_break_the_queries_beside_it():
    retriever = Canned(*PASSAGES)
    asyncio.run(Search(retriever)(query=json.loads('"a \\ud800 b"')))
    assert retriever.queries == ["a ? b"]


def test_it_searches_an_index_folder_and_a_server_like_a_file(corpus, tmp_path):
    build_index(corpus, tmp_path / "index", IndexSettings())
    places = [Search.from_corpus(place, k=2) for place in (corpus, tmp_path / "index")]
    with served(make_app(open_index(tmp_path / "index"), {})) as url:
        places.append(Search.from_corpus(url, k=2))
        shown = [asyncio.run(search(query="the first program")) for search in places]
    assert shown[0].startswith("Ada Lovelace: ")
    assert len(shown[0].splitlines()) == 2
    assert shown == shown[:1] * 3


def test_a_server_that_is_down_is_an_error_before_anything_is_searched():
    with pytest.raises(ConnectionError, match="no retriever answers at http://127.0.0.1:"):
        Search.from_corpus(f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("limits", [{"k": 0}, {"passage_chars": 0}])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(ValueError, match="is 0, expected at least"):
        Search(Canned(), **limits)


def test_the_search_tool_imports_no_torch():
    script = (
        "import sys, agentr1.tools.search\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
