"""Multi-hop question answering with search: a `ToolEnv` with instructions and numbers of its own.

Layer 2. The policy searches as often as it needs and answers in one of two ways: by
`<answer>...</answer>` in its last turn, or by the tool `agentr1.tools.finish.answer`, named as the
finish tool. What an episode does is `ToolEnv`'s matter; here is what the policy is told about
it, and what is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from agentr1.envs.tool_env import ProcessReward, ToolEnv
from agentr1.rewards import new_supporting_title, passages_in, repeated_query
from agentr1.tools.runner import ToolRunner
from agentr1.types import Message, StepResult

SEARCH_FIRST = (
    "Answer the question with the help of the search tool. Search for one thing at a time; what "
    "you find may tell you what to search for next."
)
ANSWER_IN_TAGS = (
    "When you know the answer, reply with <answer>the answer alone</answer>: a name, a number, a "
    "date, yes or no."
)
ANSWER_BY_CALL = (
    "When you know the answer, call {tool} with the answer alone: a name, a number, a date, yes or "
    "no."
)


class MultiHopEnv(ToolEnv):
    """An episode of searches and one answer.

    `info` of each turn adds to `ToolEnv`'s numbers, so that their sums over an episode are:
    `gold_found`, the share of the row's supporting titles that were shown (0 for a row without
    any); `passages`, how many passages were shown; `repeated_calls`.

    Args:
        runner: the tools, a search among them; see `ToolEnv`.
        system_prompt: instructions; None for those of the way of answering, "" for none at all.
        process_rewards: see `ToolEnv`.
        finish_tool: name of the tool that takes the answer; None for an answer in tags.
        max_calls: see `ToolEnv`.
    """

    def __init__(
        self,
        runner: ToolRunner,
        system_prompt: str | None = None,
        process_rewards: Sequence[tuple[ProcessReward, float]] = (),
        finish_tool: str | None = None,
        max_calls: int | None = None,
    ) -> None:
        if system_prompt is None:
            how = ANSWER_BY_CALL.format(tool=finish_tool) if finish_tool else ANSWER_IN_TAGS
            system_prompt = f"{SEARCH_FIRST} {how}"
        super().__init__(runner, system_prompt, process_rewards, finish_tool, max_calls)

    async def step(self, message: Message) -> StepResult:
        """Run the turn's calls; without one, or with the finish tool, the episode is over."""
        past = self._past
        result = await super().step(message)
        new = self._past[len(past) :]
        titled = bool(self._row.get("supporting_titles"))
        shown = [outcome.content for outcome in new if outcome.failure is None]
        numbers = {
            "gold_found": new_supporting_title(self._row, new, past) if titled else 0.0,
            "passages": float(sum(len(passages_in(text)) for text in shown)),
            "repeated_calls": abs(repeated_query(self._row, new, past)),
        }
        return dataclasses.replace(result, info={**result.info, **numbers})
