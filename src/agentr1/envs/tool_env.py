"""Conversation with tools: the environment most tasks need.

Reads the calls out of the policy's turn, runs them together, answers in call order and pays
process rewards. Every mistake of the policy becomes an observation that names it; an
infrastructure fault is reported to the rollout, which keeps the turn out of the loss. The episode
ends when the policy answers without a call, or with a successful call of the finish tool.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from agentr1.envs.base import Env
from agentr1.parsing import parse_turn
from agentr1.tools.base import schema
from agentr1.tools.policy import EpisodeCalls
from agentr1.tools.runner import ToolRunner
from agentr1.types import Message, Row, StepResult, ToolOutcome

ProcessReward = Callable[[Row, tuple[ToolOutcome, ...], tuple[ToolOutcome, ...]], float]
"""`(row, outcomes of this turn, outcomes of earlier turns) -> reward of this turn`."""

CUT_NOTICE = (
    "Your turn was cut at its length limit before it ended, so nothing in it was run. "
    "Write a shorter turn."
)
EMPTY_NOTICE = (
    "Your turn held neither a tool call nor an answer. Close your thinking with </think> if you "
    "opened it, then call a tool or answer."
)


class ToolEnv(Env):
    """An episode in which the policy may call tools.

    Args:
        runner: the tools with their policies; share one among episodes, so that concurrency
            limits hold across all of them.
        system_prompt: opens the conversation where given.
        process_rewards: pairs of function and weight; their weighted sum is added to what the
            tools themselves pay.
        finish_tool: name of the tool whose successful call ends the episode.
        max_calls: calls the episode may make, of all tools but the finish tool together; one more
            is the policy's mistake and is not run. A tool's own limit is in its `ToolPolicy`.
    """

    def __init__(
        self,
        runner: ToolRunner,
        system_prompt: str | None = None,
        process_rewards: Sequence[tuple[ProcessReward, float]] = (),
        finish_tool: str | None = None,
        max_calls: int | None = None,
    ) -> None:
        known = [tool.name for tool in runner.tools]
        if finish_tool is not None and finish_tool not in known:
            raise ValueError(
                f"finish_tool is {finish_tool!r}, but the tools are {known}; name one of them or "
                "add the finish tool to the tools"
            )
        if max_calls is not None and max_calls < 1:
            raise ValueError(
                f"max_calls is {max_calls}, expected 1 or more; leave the tools out for none"
            )
        self.runner = runner
        self.system_prompt = system_prompt
        self.process_rewards = tuple(process_rewards)
        self.finish_tool = finish_tool
        self._row: Row = {}
        self._past: tuple[ToolOutcome, ...] = ()
        self._evidence: set[str] = set()  # of each result, so that a turn reads only its own
        self._calls = EpisodeCalls(turn=-1, max_calls=max_calls, finish_tool=finish_tool)

    @property
    def tool_schemas(self) -> Sequence[dict[str, Any]]:
        """Schemas of the runner's tools, in its order."""
        return [schema(tool) for tool in self.runner.tools]

    async def reset(self, row: Row) -> Sequence[Message]:
        """Open with the system prompt and the row's question.

        Raises:
            ValueError: the row has neither `prompt` (messages) nor `question`.
        """
        self._row = row
        self._calls.row_id = str(row.get("id", "?"))
        system = [Message("system", self.system_prompt)] if self.system_prompt else []
        return [*system, *_opening(row)]

    async def step(self, message: Message) -> StepResult:
        """Run the turn's calls; without one, the episode is over."""
        self._calls.turn += 1
        if message.cut:
            notice = Message("user", CUT_NOTICE)
            info = self._numbers(()) | {"cut": 1.0}
            return StepResult((notice,), info=info, anchor=self._anchor())
        parsed = parse_turn(message.content, id_prefix=f"call_{self._calls.turn + 1}")
        calls = parsed.calls
        if not calls and not parsed.content.strip():
            notice = Message("user", EMPTY_NOTICE)
            info = self._numbers(()) | {"mistakes": 1.0}
            return StepResult((notice,), info=info, anchor=self._anchor())
        outcomes = tuple(map(self._unsaid, await self.runner.run(calls, self._calls)))
        reward = self._pay(outcomes)
        self._past += outcomes
        self._evidence.update(_digest(o.name, o.content) for o in outcomes if o.failure is None)
        finished = any(o.name == self.finish_tool and o.failure is None for o in outcomes)
        ended = not calls or finished
        return StepResult(
            observation=() if ended else tuple(map(_observation, outcomes)),
            reward=reward,
            terminated=ended,
            info=self._numbers(outcomes),
            fault=next((o.content for o in outcomes if o.failure == "fault"), None),
            anchor=self._anchor(),
        )

    def _unsaid(self, outcome: ToolOutcome) -> ToolOutcome:
        """A finish tool's result is shown to nobody, so it is no evidence and earns as none.

        Most give back what they were given: the policy could pay itself.
        """
        finishes = outcome.name == self.finish_tool and outcome.failure is None
        return dataclasses.replace(outcome, content="") if finishes else outcome

    def _anchor(self) -> str:
        """The evidence gathered so far: what the tools have found, in whatever order.

        Failed calls add nothing to it; without any evidence it is the state of the first turn.
        """
        return _digest(*sorted(self._evidence)) if self._evidence else ""

    def _pay(self, outcomes: tuple[ToolOutcome, ...]) -> float:
        paid = sum((outcome.reward for outcome in outcomes), start=0.0)
        return paid + sum(
            weight * function(self._row, outcomes, self._past)
            for function, weight in self.process_rewards
        )

    def _numbers(self, outcomes: Sequence[ToolOutcome]) -> dict[str, float]:
        """What happened, in numbers; each episode reports every tool, be it that none was called.

        A mean over episodes or processes needs each name in each of them.
        """
        known = [tool.name for tool in self.runner.tools]
        called = {outcome.name for outcome in outcomes}
        shown = [name for name in known if name in called or self._calls.turn == 0]
        numbers = _counts(outcomes)
        for name in shown:
            own = [outcome for outcome in outcomes if outcome.name == name]
            numbers[f"tools/{name}/calls"] = float(len(own))
            numbers[f"tools/{name}/failures"] = float(sum(o.failure is not None for o in own))
            numbers[f"tools/{name}/seconds"] = sum((o.seconds for o in own), start=0.0)
        return numbers


def _digest(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _opening(row: Row) -> list[Message]:
    if "question" in row:
        return [Message("user", str(row["question"]))]
    if "prompt" in row:
        return [Message(m["role"], m["content"]) for m in row["prompt"]]
    raise ValueError(
        f"a row needs 'question' (text) or 'prompt' (a list of messages), got columns {sorted(row)}"
    )


def _observation(outcome: ToolOutcome) -> Message:
    return Message("tool", outcome.content, tool_call_id=outcome.call_id, name=outcome.name)


def _counts(outcomes: Sequence[ToolOutcome]) -> dict[str, float]:
    return {
        "calls": float(len(outcomes)),
        "mistakes": float(sum(o.failure == "mistake" for o in outcomes)),
        "faults": float(sum(o.failure == "fault" for o in outcomes)),
        "retries": float(sum(max(0, o.attempts - 1) for o in outcomes)),
        "cached": float(sum(o.cached for o in outcomes)),
        "tool_seconds": sum((o.seconds for o in outcomes), start=0.0),
        "slot_seconds": sum((o.waited for o in outcomes), start=0.0),
        "cut": 0.0,
    }
