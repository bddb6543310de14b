"""The two outcome rewards of Agent-R1, under their own names: `paper` and `legacy`.

Layer 1, beside `rewards.py`, named by recipes as `agentr1.agent_r1_rewards.paper`. They differ: the
paper (arXiv 2511.14460, Eq. 6) pays exact match once the form is right, the code of the `legacy`
branch pays whatever contains an accepted answer. A number trained with one says nothing about the
other, so a recipe and a model card say which it was.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentr1.rewards import exact_match_reward, format_reward, gold_answers, normalize_answer
from agentr1.types import Trajectory


def paper(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    """Equation 6: exact match where the form is right, else the form's mark minus 1.

    The form is `rewards.format_reward`, the mean of answer and calls: an episode gets 1, 0, -0.5 or
    -1. What the paper leaves open is settled there: no thinking is asked for, and an episode that
    makes no call has none in bad form.
    """
    forms = format_reward(trajectories)
    matches = exact_match_reward(trajectories)
    return [
        match if form == 1.0 else form - 1.0 for form, match in zip(forms, matches, strict=True)
    ]


def legacy(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    """What the code of Agent-R1's `legacy` branch pays, from -1 to 1.

    Half a point for every turn but the last that is `<think>...</think>` and one call, half a point
    for a last turn that begins with thinking and ends with `</answer>`, together at most 1: so one
    call and an answer are enough, and so are two calls without one. 1 is taken off. With at least
    half a point the answer is added: 1 where an accepted answer is contained in the first
    `<answer>`, 0.2 where it is contained anywhere in the last turn, its thinking and queries
    included.

    Contained is as letters, not as words: "no" is in "I know", and an accepted answer that
    normalises to nothing is in everything. A truncated episode is scored like any other. Only the
    policy's own turns are read, where that code also finds turns quoted in the prompt.
    """
    return [_legacy(trajectory) for trajectory in trajectories]


def _legacy(trajectory: Trajectory) -> float:
    *before, last = [_as_shown(turn.message.content) for turn in trajectory.turns]
    answers = [normalize_answer(answer) for answer in gold_answers(trajectory.row)]
    form = 0.5 * (sum(map(_is_thought_and_call, before)) + _is_thought_and_answer(last))
    form = min(form, 1.0)
    return form - 1.0 + (_contained(last, answers) if form >= 0.5 else 0.0)


def _as_shown(text: str) -> str:
    """The turn with the opening of its thinking, where the chat template wrote that."""
    return f"<think>{text}" if "</think>" in text and "<think>" not in text else text


def _is_thought_and_call(text: str) -> bool:
    """Thinking, white space and one call, nothing else."""
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    gap, _, call = text.partition("</think>")[2].partition("<tool_call>")
    return (
        all(text.count(tag) == 1 for tag in tags)
        and text.startswith("<think>")
        and not gap.strip()
        and call.removesuffix("\n").endswith("</tool_call>")
    )


def _is_thought_and_answer(text: str) -> bool:
    """Thinking first, an answer last, anything in between."""
    answer = text.partition("</think>")[2].partition("<answer>")[2]
    return text.startswith("<think>") and answer.removesuffix("\n").endswith("</answer>")


def _contained(text: str, answers: Sequence[str]) -> float:
    """What an accepted answer in the last turn is worth, by where it is."""
    inside, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    predicted = normalize_answer(inside)
    if closed and any(answer in predicted for answer in answers):
        return 1.0
    return 0.2 if any(answer in normalize_answer(text) for answer in answers) else 0.0
