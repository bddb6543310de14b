"""Agent-R1's two rewards pay what its equation and its code pay."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.agent_r1_rewards import legacy, paper
from agentr1.parsing import render_call
from agentr1.types import Message, StopReason, Trajectory, Turn

CALL = render_call("search", {"query": "x"})
THOUGHT_CALL = f"<think>Hm.</think>\n{CALL}"
RIGHT = "<think>So.</think>\n<answer>Paris</answer>"


def episode(*texts: str, answers: Sequence[str] = ("Paris",), stop=StopReason.ENVIRONMENT):
    turns = tuple(Turn((1,), (0.0,), Message("assistant", text)) for text in texts)
    return Trajectory({"answers": list(answers)}, (Message("user", "Where?"),), turns, stop)


def paid(reward, *texts: str, **settings):
    (value,) = reward(trajectories=[episode(*texts, **settings)], prompts=[], completions=[])
    return pytest.approx(value)


# paper


def test_paper_pays_exact_match_once_the_form_is_right():
    assert paid(paper, CALL, "<answer>Paris</answer>") == 1.0
    assert paid(paper, CALL, "<answer>the paris.</answer>") == 1.0
    assert paid(paper, CALL, "<answer>Paris, France</answer>") == 0.0
    assert paid(paper, "<answer>Paris</answer>") == 1.0
    assert paid(paper, RIGHT) == 1.0
    assert paid(paper, render_call("answer", {"text": "Paris"})) == 1.0
    assert paid(paper, render_call("answer", {"text": "Rome"})) == 0.0


@pytest.mark.parametrize(
    "last",
    ["Paris", "<answer>Paris</answer>, I think", "<answer></answer>", "<answer>Paris", ""],
)
def test_paper_takes_half_a_point_for_an_answer_in_bad_form(last):
    assert paid(paper, CALL, last) == -0.5


def test_paper_takes_half_a_point_for_one_call_in_bad_form_and_a_whole_one_for_both():
    assert paid(paper, CALL, "<tool_call>{</tool_call>", "<answer>Paris</answer>") == -0.5
    assert paid(paper, CALL, "<tool_call>{</tool_call>", "Paris") == -1.0


@pytest.mark.parametrize("stop", [reason for reason in StopReason if not reason.is_terminal])
def test_paper_knows_no_answer_of_a_truncated_episode(stop):
    assert paid(paper, CALL, "<answer>Paris</answer>", stop=stop) == -0.5


def test_paper_pays_one_number_per_trajectory():
    both = [episode("<answer>Paris</answer>"), episode("Paris")]
    assert paper(trajectories=both) == [1.0, -0.5]
    assert legacy(trajectories=[]) == []


# legacy


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        ([THOUGHT_CALL, RIGHT], 1.0),
        ([THOUGHT_CALL, THOUGHT_CALL, RIGHT], 1.0),  # more calls add nothing
        ([RIGHT], 0.5),  # no call: half the form
        ([CALL, RIGHT], 0.5),  # a call without thinking is not well formed
        ([f"<think></think> so {CALL}", RIGHT], 0.5),  # nor one with words before it
        ([f"<think></think>{CALL}{CALL}", RIGHT], 0.5),  # nor two
        ([f"<think></think>{CALL}\n", f"{RIGHT}\n"], 1.0),  # one line break at the end is none
        ([f"<think></think>{CALL}\n\n", f"{RIGHT}\n\n"], -1.0),
        ([THOUGHT_CALL, "<answer>Paris</answer>"], 0.5),  # half the form, but the answer counts
        ([CALL, "<answer>Paris</answer>"], -1.0),
        ([THOUGHT_CALL, "<think></think><answer>It is in Paris, France.</answer>"], 1.0),
        ([THOUGHT_CALL, "<think>Paris?</think><answer>Rome</answer>"], 0.2),
        ([THOUGHT_CALL, "<think></think><answer>Rome</answer>"], 0.0),
        # The first block counts, be it in the thinking.
        ([THOUGHT_CALL, "<think><answer>Rome</answer></think><answer>Paris</answer>"], 0.2),
        # A policy that never answers still gets the form of its calls, and the words of the last.
        ([THOUGHT_CALL, THOUGHT_CALL, THOUGHT_CALL], 0.0),
        ([THOUGHT_CALL] * 2 + ["<think></think>" + render_call("search", {"query": "Paris"})], 0.2),
        ([THOUGHT_CALL], -1.0),
        ([""], -1.0),
    ],
)
def test_legacy_by_hand(texts, value):
    assert paid(legacy, *texts) == value


def test_legacy_looks_for_letters_not_words_and_finds_nothing_everywhere():
    last = "<think></think><answer>I know</answer>"
    assert paid(legacy, THOUGHT_CALL, last, answers=["no"]) == 1.0
    assert paid(legacy, THOUGHT_CALL, last, answers=["The"]) == 1.0
    assert paid(legacy, THOUGHT_CALL, last, answers=["Rome", "I know"]) == 1.0


def test_legacy_scores_truncated_episodes_like_others():
    assert paid(legacy, THOUGHT_CALL, RIGHT, stop=StopReason.MAX_TURNS) == 1.0


def test_legacy_takes_thinking_that_the_template_opened_as_opened():
    opened = [text.removeprefix("<think>") for text in (THOUGHT_CALL, RIGHT)]
    assert paid(legacy, *opened) == 1.0


def reference(texts: Sequence[str], answers: Sequence[str]) -> float:
    """That code's way: the whole chat as one text, taken apart by expressions."""
    chat = "<|im_start|>user\nWhere?<|im_end|>\n"
    for text in texts:
        chat += f"<|im_start|>assistant\n{text}<|im_end|>\n<|im_start|>user\nresult<|im_end|>\n"
    blocks = re.findall(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", chat, re.DOTALL)

    def plain(text: str) -> str:
        letters = "".join(c for c in text.lower() if c not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())

    def inside(text: str) -> bool:
        return any(plain(answer) in plain(text) for answer in answers)

    points = 0.0
    for block in blocks[:-1]:
        once = [block.count(t) for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
        shape = r"^<think>(.*?)</think>(\s*)<tool_call>(.*?)</tool_call>$"
        points += 0.5 * (once == [1] * 4 and bool(re.search(shape, block, re.DOTALL)))
    shape = r"^<think>(.*?)</think>(.*?)<answer>(.*?)</answer>$"
    points += 0.5 * bool(re.search(shape, blocks[-1], re.DOTALL))
    points = min(points, 1.0)
    found = re.search(r"<answer>(.*?)</answer>", blocks[-1], re.DOTALL)
    answer = 1.0 if found and inside(found[1].strip()) else 0.2 * inside(blocks[-1])
    return points - 1.0 + (answer if points >= 0.5 else 0.0)


PIECES = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "<answer>", "</answer>", "\n", " ", "x"]
    + ["Paris", "paris.", "the", THOUGHT_CALL, RIGHT, CALL]
)
TEXTS = st.lists(PIECES, max_size=7).map("".join)
ANSWERS = st.lists(st.sampled_from(["Paris", "no", "x", "The", "Rome"]), min_size=1, max_size=2)


@given(st.lists(TEXTS, min_size=1, max_size=4), ANSWERS)
def test_legacy_is_that_code(texts, answers):
    # A block that the template opened never lacks its tag there: the injected tag is text of it.
    texts = [f"<think>{t}" if "</think>" in t and "<think>" not in t else t for t in texts]
    assert paid(legacy, *texts, answers=answers) == reference(texts, answers)
