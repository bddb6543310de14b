"""What tools answered is kept whole, and given back the same without the tools."""

import asyncio
import dataclasses
import json
import logging
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.parsing import MalformedCall
from agentr1.tools.base import ToolError, schema
from agentr1.tools.policy import EpisodeCalls, ToolPolicy
from agentr1.tools.tape import RecordingRunner, ReplayingRunner
from agentr1.types import ToolCall, ToolResult
from fakes import CountingTool


class Changing(CountingTool):
    """Never answers twice alike."""

    async def __call__(self, key):
        self.calls.append(key)
        return f"{key}, answer {len(self.calls)}"


def ask(runner, *keys, row="r", turn=0, name="lookup"):
    calls = [ToolCall(f"call_{turn}_{i}", name, {"key": key}) for i, key in enumerate(keys)]
    return asyncio.run(runner.run(calls, EpisodeCalls(row_id=row, turn=turn)))


def texts(outcomes):
    return [outcome.content for outcome in outcomes]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "tape.jsonl"


# Round trip


@pytest.mark.parametrize(
    "answer",
    [
        "found",
        "naïve ❄ \u2028 \x00 \ud800",
        "x" * 300,
        ToolResult("paid", reward=0.25),
        {"a": [1, None]},
        None,
        ToolError("no such key"),
        OSError("down"),
    ],
)
def test_an_outcome_comes_back_as_it_was(path, answer):
    policy = ToolPolicy(max_chars=100, retries=1, backoff=0, cache=True)
    recorder = RecordingRunner(path, [CountingTool(answer)], default_policy=policy)
    recorded = [ask(recorder, "ä", "b", turn=turn) for turn in (0, 1)]
    replayer = ReplayingRunner(path)
    replayed = [ask(replayer, "ä", "b", turn=turn) for turn in (0, 1)]
    assert replayed == recorded  # with reward, failure, seconds, attempts and all


KEYS = st.text(max_size=3) | st.sampled_from(["a", "b"])


@given(
    turns=st.lists(
        st.tuples(st.sampled_from("rs"), st.lists(KEYS, max_size=4)), min_size=1, max_size=6
    )
)
def test_calls_made_again_are_answered_as_in_their_own_place(tmp_path_factory, turns):
    path = tmp_path_factory.mktemp("tape") / "tape.jsonl"
    recorder = RecordingRunner(path, [Changing()])
    recorded = [ask(recorder, *keys, row=row, turn=i) for i, (row, keys) in enumerate(turns)]
    replayer = ReplayingRunner(path)
    backwards = [
        ask(replayer, *keys, row=row, turn=i) for i, (row, keys) in reversed([*enumerate(turns)])
    ]
    assert backwards[::-1] == recorded


def test_the_policy_is_shown_the_same_tools_and_refused_the_same_calls(path):
    tools = [CountingTool(name="b"), CountingTool(name="a")]
    policy = ToolPolicy(max_calls=1)
    recorder = RecordingRunner(path, tools, default_policy=policy)
    replayer = ReplayingRunner(path, default_policy=policy)
    assert [schema(t) for t in replayer.tools] == [schema(t) for t in recorder.tools]
    good, other = ToolCall("c", "a", {"key": "x"}), ToolCall("d", "none", {})
    wrong, torn = ToolCall("e", "a", {"key": 3}), MalformedCall("f", "<tool_call>", "not closed")
    calls = [good, other, wrong, torn, good]
    assert asyncio.run(recorder.run(calls)) == asyncio.run(ReplayingRunner(path).run(calls[:4])) + (
        asyncio.run(replayer.run([good, good]))[1],
    )


# Which answer


def test_the_closest_place_answers_and_of_several_the_last(path):
    recorder = RecordingRunner(path, [Changing()])
    ask(recorder, "k", row="r", turn=0)  # answer 1
    ask(recorder, "k", row="r", turn=3)  # answer 2
    ask(recorder, "j", "k", "k", row="s", turn=0)  # j has answer 3, k answers 4 and 5
    ask(recorder, "k", row="r", turn=0)  # answer 6
    replayer = ReplayingRunner(path)
    for _ in range(2):
        assert texts(ask(replayer, "k", row="r", turn=0)) == ["k, answer 6"]
        assert texts(ask(replayer, "k", row="r", turn=3)) == ["k, answer 2"]
        assert texts(ask(replayer, "j", "k", "k", row="s")) == [
            "j, answer 3",
            "k, answer 4",
            "k, answer 5",
        ]
        assert texts(ask(replayer, "k", row="s")) == ["k, answer 5"]  # no such place in the turn
        assert texts(ask(replayer, "k", row="s", turn=9)) == ["k, answer 5"]  # no such turn
        assert texts(ask(replayer, "k", row="t")) == ["k, answer 6"]  # no such row


def test_a_call_that_was_never_recorded_is_a_fault_that_says_what_to_do(path, caplog):
    RecordingRunner(path, [CountingTool()])
    with caplog.at_level(logging.WARNING):
        (outcome,) = ask(ReplayingRunner(path), "x" * 1000, row="q7", turn=2)
    assert (outcome.failure, outcome.attempts) == ("fault", 0)
    for part in ("tape.jsonl", "lookup", '{"key": "xxx', "--tools record:FILE"):
        assert part in outcome.content
    assert len(outcome.content) < 300
    assert "turn 2 of row q7" in caplog.text


def test_latency_is_replayed_only_where_asked_for(path):
    ask(RecordingRunner(path, [CountingTool()]), "k")
    header, line = path.read_text().splitlines()
    path.write_text(f"{header}\n{json.dumps({**json.loads(line), 'seconds': 1.0})}\n")
    start = time.perf_counter()
    ask(ReplayingRunner(path), "k")
    assert time.perf_counter() - start < 0.9
    start = time.perf_counter()
    (outcome,) = ask(ReplayingRunner(path, latency=0.05), "k")
    assert 0.05 <= time.perf_counter() - start < 0.9
    assert outcome.seconds == 1.0
    with pytest.raises(ValueError, match="latency is -1"):
        ReplayingRunner(path, latency=-1)


# Files

WRITER = """
import asyncio, os, signal, sys
from agentr1.tools.policy import EpisodeCalls
from agentr1.tools.tape import RecordingRunner
from agentr1.types import ToolCall
from fakes import CountingTool
path, row = sys.argv[1:]
runner = RecordingRunner(path, [CountingTool("answer " * 200)])
async def main():
    for turn in range(100):
        calls = [ToolCall("c", "lookup", {"key": str(i)}) for i in range(3)]
        await runner.run(calls, EpisodeCalls(row_id=row, turn=turn))
asyncio.run(main())
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_share_a_file_and_a_kill_loses_nothing(path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), row], env={"PYTHONPATH": p})
        for row in "abc"
        for p in [":".join(sys.path)]
    ]
    assert [writer.wait(60) for writer in writers] == [-9] * 3
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    places = {(r["row"], r["turn"], r["index"]) for r in records if "row" in r}
    assert places == {(row, turn, i) for row in "abc" for turn in range(100) for i in range(3)}
    assert len(records) == len(places) + 3  # and a header by each
    assert texts(ask(ReplayingRunner(path), "2", row="b", turn=99)) == ["answer " * 200]


def test_half_a_line_at_the_end_is_passed_over_and_can_be_recorded_after(path, caplog):
    ask(RecordingRunner(path, [Changing()]), "a", "b")
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        replayer = ReplayingRunner(path)
    assert "line 3 is incomplete" in caplog.text
    assert [o.failure for o in ask(replayer, "a", "b")] == [None, "fault"]
    ask(RecordingRunner(path, [Changing()]), "b")
    assert [o.failure for o in ask(ReplayingRunner(path), "a", "b")] == [None, None]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no recording of tools: line 1"),
        ('{"id": "1", "question": "Why?"}\n', "no recording of tools: line 1"),
        ("just text\n", "no recording of tools: line 1"),
        ("[1]\n", "no recording of tools: line 1"),
        ('{"schema": 99, "tools": []}\n', "has schema 99, expected 1"),
        ('{"schema": 1, "tools": []}\n{"row": "r"}\n', "line 2 is not what"),
        ('{"schema": 1, "tools": []}\n{"row":\n{"row": 1}\n', "line 2 is not what"),
        ('{"schema": 1, "tools": []}\n{"row":\n{"row":\n', "line 2 is not what"),
        ('{"schema": 1, "tools": []}\n{"schema": 1, "tools": [{}]}\n', "line 2 is not what"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(tmp_path, text, said):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as refused:
        ReplayingRunner(path)
    assert str(path) in str(refused.value)


def test_a_file_of_other_tools_is_not_added_to(path):
    RecordingRunner(path, [CountingTool()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"other tools than \['other'\].*another file"):
        RecordingRunner(path, [CountingTool(name="other")])
    path.write_text("rows\n")
    with pytest.raises(ValueError, match="no recording of tools"):
        RecordingRunner(path, [CountingTool()])
    path.write_bytes(before)
    RecordingRunner(path, [CountingTool()])


def test_a_recording_that_went_away_stops_the_run(path):
    runner = RecordingRunner(path, [CountingTool()])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        ask(runner, "k")


def test_every_field_of_an_outcome_but_the_call_is_on_the_tape(path):
    (outcome,) = ask(RecordingRunner(path, [CountingTool()]), "k")
    record = json.loads(path.read_text().splitlines()[1])
    fields = {field.name for field in dataclasses.fields(outcome)} - {"call_id"}
    assert record.keys() == fields | {"schema", "row", "turn", "index"}
